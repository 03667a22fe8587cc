"""The detectors of LargeST: which of them a region holds, where they stand, and their part of the road graph."""

from pathlib import Path

import numpy as np
import polars as pl

from data_prep.arrays import array_file
from data_prep.graphs import Nodes, column_of, numbers, read_table, require_weights, rows_of
from stdist.errors import InputError

REGIONS = {"SD": (11,), "GBA": (4,), "GLA": (7, 8, 12), "CA": (3, 4, 5, 6, 7, 8, 10, 11, 12)}
"""Caltrans districts of the regions that the authors publish scores for."""


def detectors_of(
    source: Path,
    found: np.ndarray,
    region: str | None,
    districts: str | None,
    meta: Path | None,
    adjacency: Path | None,
) -> Nodes:
    """The detectors to take from ``source``, whose columns are the ids ``found``, in the metadata's order.

    meta, adjacency: where None, the one ``*_meta.csv`` and ``*_rn_adj.npy`` beside the source, if there are any.
    static: ``district`` and ``lanes``, float32 [N]. Raises InputError where a region is unknown or asked for without
    metadata, where metadata and columns do not name the same detectors, and where the graph has another size.
    """
    chosen = _districts(region, districts)
    meta = meta or _beside(source, "*_meta.csv")
    adjacency = adjacency or _beside(source, "*_rn_adj.npy")
    graph = [adjacency] if adjacency else []
    if meta is None:
        if chosen:
            raise InputError(f"{source.parent} holds no *_meta.csv that tells the districts; give it with --meta")
        weights = _cut(adjacency, np.arange(len(found)), len(found)) if adjacency else None
        return Nodes(found, adjacency=weights, files=graph)
    table = read_table(meta)
    sensor, *place = (column_of(meta, table, what) for what in ("ids", "the latitude", "the longitude"))
    district = numbers(meta, table.select(column_of(meta, table, "the district")))[:, 0]
    rows = np.flatnonzero(np.isin(district, chosen)) if chosen else np.arange(len(table))
    if not len(rows):
        raise InputError(f"{meta} has no detector in district {', '.join(map(str, chosen))}; check --districts")
    ids = np.array(table[sensor].to_list())
    rows_of(meta, ids.tolist(), found)
    absent = np.setdiff1d(ids[rows], found)
    if len(absent):
        raise InputError(
            f"{source} lacks detector {absent[0]} ({len(absent)} of {len(rows)} absent); choose its --region"
        )
    degrees = numbers(meta, table.select(place))[rows]
    static = {"district": district[rows].astype(np.float32)}
    if "Lanes" in table.columns:
        static["lanes"] = numbers(meta, table.select("Lanes"))[rows, 0].astype(np.float32)
    weights = _cut(adjacency, _positions(table, adjacency)[rows], len(table)) if adjacency else None
    return Nodes(ids[rows], degrees[:, 0], degrees[:, 1], weights, static, [meta, *graph])


def _districts(region: str | None, districts: str | None) -> tuple[int, ...]:
    if region and districts:
        raise InputError("--region and --districts both choose detectors; give one of them")
    if region and region.upper() not in REGIONS:
        raise InputError(f"--region {region!r} is unknown; choose {', '.join(REGIONS)}, or give --districts")
    if region:
        return REGIONS[region.upper()]
    try:
        return tuple(int(number) for number in districts.split(",")) if districts else ()
    except ValueError as error:
        raise InputError(f"--districts {districts!r} are no numbers; write 11 or 7,8,12") from error


def _beside(source: Path, pattern: str) -> Path | None:
    """The one file of that name in the source's folder, or None; InputError where there are several."""
    files = sorted(source.parent.glob(pattern))
    if len(files) > 1:
        option = "--meta" if pattern.endswith(".csv") else "--adjacency"
        raise InputError(f"{source.parent} holds {' and '.join(f.name for f in files)}; choose one with {option}")
    return files[0] if files else None


def _positions(table: pl.DataFrame, adjacency: Path) -> np.ndarray:
    """Row of the graph of each detector: the column ID2 where the graph is the whole state's, else its row."""
    own = np.arange(len(table))
    size = array_file(adjacency, None, "N, N").shape[0]
    if size == len(table) or "ID2" not in table.columns:
        return own
    return numbers(adjacency, table.select("ID2"))[:, 0].astype(np.int64)


def _cut(adjacency: Path, rows: np.ndarray, listed: int) -> np.ndarray:
    """float32 [n, n]: the weights between the chosen rows of a graph, which stays on disk."""
    array = array_file(adjacency, None, "N, N")
    if array.shape[0] != array.shape[1] or rows.max() >= array.shape[0]:
        raise InputError(f"{adjacency} is {array.shape[0]} x {array.shape[1]}, there are {listed} detectors; check it")
    whole = array.load()
    weights = np.empty((len(rows), len(rows)), np.float32)
    for number, row in enumerate(rows):
        weights[number] = whole[row][rows]
    return require_weights(adjacency, weights, len(rows))
