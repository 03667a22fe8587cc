"""Forecasts as Zarr arrays that plain xarray opens."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from jaxtyping import Float
from zarr.storage import LocalStore

from stdist.data.integrity import ROOT_METADATA, VerifiedStore, combined_digest, damage, record_of
from stdist.data.spans import AnyRegion
from stdist.errors import InputError
from stdist.evaluation.forecast_header import (
    METADATA_KEY,
    ForecastHeader,
    ReadBlock,
    ReadWindows,
    cut,
    read_metadata,
)
from stdist.evaluation.levels import FOR_COST, for_cost


def write_zarr(header: ForecastHeader, read: ReadWindows, path: Path) -> None:
    """Writes a group of Zarr v3 with consolidated metadata, a few windows at a time (``ForecastHeader.block``)."""
    contract = header.metadata.contract
    space = header.dims[2:]
    ids = header.cell_ids
    coords: dict[str, Any] = {
        "origin": ("origin", header.origins.astype("datetime64[ns]"), {"standard_name": "time"}),
        "step": ("step", np.arange(1, contract.K + 1)),
        **{dim: (dim, np.arange(s.start, s.stop)) for dim, s in zip(space, header.region.slices, strict=True)},
        # As objects, text becomes Zarr's one type of text that has a specification.
        "cell": (space, ids.astype(object) if ids.dtype.kind == "U" else ids),
        "target": (("origin", "step"), header.targets),
    }
    if header.local_targets is not None:
        coords["target_local"] = (("origin", "step"), header.local_targets.astype("datetime64[ns]"))
    if header.levels:
        coords["quantile"] = ("quantile", np.array(header.levels))
    xr.Dataset(coords=coords).to_zarr(path, mode="w", zarr_format=3, consolidated=False)
    group = zarr.open_group(path, mode="r+")
    block = header.block

    auxiliary = sorted({*coords} - {*header.dims, "quantile"})

    def create(name: str, *leading: tuple[str, int]) -> zarr.Array[Any]:
        return group.create_array(
            name,
            shape=(*(size for _, size in leading), *header.shape),
            chunks=(*(1 for _ in leading), *block),
            dtype="float32",
            fill_value=np.nan,
            dimension_names=(*(dim for dim, _ in leading), *header.dims),
            # xarray finds the coordinates that are not dimensions by this attribute alone.
            attributes={"units": contract.units, "coordinates": " ".join(auxiliary)},
        )

    point = create("point" if header.levels else "forecast")
    quantiles = create("forecast", ("quantile", len(header.levels))) if header.levels else None
    ratio = header.metadata.cost_ratio
    costs = create(FOR_COST) if ratio is not None else None
    for windows in cut(header.shape[0], block[0]):
        values = read(windows)
        point[windows] = values[0]
        if quantiles is not None:
            quantiles[:, windows] = values[1:]
        if costs is not None and ratio is not None:
            costs[windows] = for_cost(values[1:], header.levels, ratio)
    written = sorted(file for file in path.rglob("*") if file.is_file() and file != path / ROOT_METADATA)
    files = {file.relative_to(path).as_posix(): record_of(file) for file in written}
    attributes: dict[str, Any] = {METADATA_KEY: header.metadata.model_dump_json(), "files": files}
    group.attrs.put({**attributes, "digest": combined_digest(files, attributes)})
    with warnings.catch_warnings():
        # Consolidated metadata is an extension of Zarr v3 that xarray and zarr both read.
        warnings.filterwarnings("ignore", message="Consolidated metadata", category=UserWarning)
        zarr.consolidate_metadata(path)


def zarr_metadata(path: Path) -> str | None:
    """The metadata of forecasts in the folder ``path``; None where it holds anything else, or more."""
    known = {ROOT_METADATA, "forecast", "point", "origin", "step", "row", "col", "node", "cell", "quantile"}
    known |= {"target", "target_local", FOR_COST}
    if not path.is_dir() or not {file.name for file in path.iterdir()} <= known:
        return None
    try:
        return _attributes(path).get(METADATA_KEY)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _attributes(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / ROOT_METADATA).read_text())["attributes"])


def open_zarr(path: Path) -> tuple[ForecastHeader, ReadBlock]:
    """Opens a group that ``write_zarr`` wrote. Raises InputError where it says too little or contradicts itself,
    DamageError, also from what reads the values, where a file is not as it was written."""
    attributes = _attributes(path)
    files = attributes.get("files", {})
    if files and combined_digest(files, attributes) != attributes.get("digest"):
        raise damage(path, f"{ROOT_METADATA} is not as it was written")
    # Of forecasts older than these digests nothing is recorded.
    store = VerifiedStore(path, files) if files else LocalStore(path, read_only=True)
    with xr.open_zarr(store, consolidated=False, chunks=None) as dataset:
        header = ForecastHeader(
            read_metadata(dataset.attrs.get(METADATA_KEY), path),
            dataset["origin"].values.astype("datetime64[ns]"),
            np.array(dataset["cell"].values.tolist()),
            tuple(dataset["quantile"].values.tolist()) if "quantile" in dataset["forecast"].dims else (),
        )
    forecast = zarr.open_array(store, path="forecast", mode="r")
    point = zarr.open_array(store, path="point", mode="r") if header.levels else forecast
    if point.shape != header.shape:
        raise InputError(f"{path}: forecasts have shape {point.shape}, their origins and contract say {header.shape}")

    def read(windows: slice, tile: AnyRegion, quantiles: bool) -> Float[np.ndarray, "quantity n K *cells"]:
        place = header.place(windows, tile)
        values = np.asarray(point[place])[None]
        if not (quantiles and header.levels):
            return values
        return np.concatenate([values, np.asarray(forecast[(slice(None), *place)])])

    return header, read
