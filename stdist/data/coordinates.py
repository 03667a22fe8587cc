"""The arrays of a store that do not change with time: axes, ids, places, graph, static features."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr

from stdist.data.schema import GridSpec, NodeSpec

SIDE = 2048
"""Largest side of a chunk of two dimensions: the graph of ten thousand nodes has 400 MB."""


@dataclass(frozen=True, eq=False)
class Coordinate:
    """One array, with its CF attributes. ``located``: xarray is told that it is a coordinate of the channels."""

    name: str
    data: np.ndarray
    dims: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    located: bool = False

    @property
    def chunks(self) -> tuple[int, ...]:
        limit = SIDE if self.data.ndim > 1 else self.data.size
        return tuple(min(side, limit) for side in self.data.shape)


def coordinates(spec: GridSpec | NodeSpec) -> Iterator[Coordinate]:
    """Every array that is known before the first value is."""
    yield time_coordinate(spec.minutes)
    yield from _of_grid(spec) if isinstance(spec, GridSpec) else _of_nodes(spec)
    for name, degrees in (("latitude", spec.latitude), ("longitude", spec.longitude)):
        if degrees is not None:
            units = "degrees_north" if name == "latitude" else "degrees_east"
            place = {"units": units, "standard_name": name}
            yield Coordinate(name, np.asarray(degrees, float), spec.dims, place, located=True)
    for name, values in (spec.static or {}).items():
        yield Coordinate(f"static_{name}", np.asarray(values, np.float32), spec.dims)


def time_coordinate(minutes: np.ndarray) -> Coordinate:
    """minutes: UTC, since 1970-01-01, int64 [T]."""
    cf = {"units": "minutes since 1970-01-01 00:00:00", "calendar": "proleptic_gregorian", "standard_name": "time"}
    return Coordinate("time", minutes, ("time",), cf)


def present_coordinate(present: np.ndarray) -> Coordinate:
    """present: bool [T]."""
    attributes = {"long_name": "frame exists in the source, or fills a short absence"}
    return Coordinate("present", present, ("time",), attributes)


def _of_grid(spec: GridSpec) -> Iterator[Coordinate]:
    height, width = spec.shape
    rows = np.arange(height) if spec.rows is None else spec.rows
    cols = np.arange(width) if spec.cols is None else spec.cols
    yield Coordinate("row", np.asarray(rows, np.int64), ("row",), {"long_name": "row id of the data"})
    yield Coordinate("col", np.asarray(cols, np.int64), ("col",), {"long_name": "column id of the data"})
    ids = np.asarray(spec.cell_ids, np.int64)
    yield Coordinate("cell_id", ids, spec.dims, {"long_name": "cell id of the data"}, located=True)
    inside = np.ones(spec.shape, bool) if spec.inside is None else np.asarray(spec.inside, bool)
    yield Coordinate("inside", inside, spec.dims, {"long_name": "cell belongs to the city"})


def _of_nodes(spec: NodeSpec) -> Iterator[Coordinate]:
    ids = spec.node_ids if spec.node_ids.dtype.kind == "U" else np.asarray(spec.node_ids, np.int64)
    yield Coordinate("node", ids, spec.dims, {"long_name": "node id of the data"})
    yield Coordinate("inside", np.ones(spec.shape, bool), spec.dims, {"long_name": "node belongs to the city"})
    if spec.since is not None:
        days = spec.since.astype("datetime64[D]").astype(np.int32)
        cf = {"units": "days since 1970-01-01", "calendar": "proleptic_gregorian", "long_name": "first local day"}
        yield Coordinate("since", days, spec.dims, cf, located=True)
    if spec.adjacency is not None:
        weights = np.asarray(spec.adjacency, np.float32)
        yield Coordinate("adjacency", weights, ("node", "neighbour"), {"long_name": "weight of an edge"})


def create_array(group: zarr.Group, array: Coordinate) -> None:
    """Write an array into a store in the making, over one of its name."""
    text = array.data.dtype.kind == "U"
    created = group.create_array(
        array.name,
        shape=array.data.shape,
        # Of Zarr's types of text only this one has a specification.
        dtype="string" if text else array.data.dtype,
        chunks=array.chunks,
        dimension_names=array.dims,
        attributes=array.attributes,
        overwrite=True,
    )
    created[...] = array.data.astype(object) if text else array.data


def digest_of_arrays(arrays: Sequence[Coordinate]) -> str:
    """sha256 over names, shapes and values."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.name} {array.data.dtype.str} {array.data.shape}".encode())
        digest.update(np.ascontiguousarray(array.data).data)
    return digest.hexdigest()
