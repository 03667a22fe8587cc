"""Files about the nodes of a graph: their ids and places, and who is whose neighbour.

Tables of whole states or cities list more sensors than the data has, in another order: rows are found by id.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from data_prep.arrays import array_file
from data_prep.common import existing, utc_offset_of
from data_prep.kinds import kind_of, refuse_kind
from stdist.data.schema import UNKNOWN_UNITS, NodeSpec
from stdist.errors import InputError

THRESHOLD = 0.1
"""DCRNN's: weaker edges are cut."""
EDGES = ("origin_id", "destination_id")
COLUMNS = {
    "ids": ("sensor_id", "zone_id", "node_id", "station_id", "id", "station", "geo_id"),
    "the latitude": ("latitude", "lat"),
    "the longitude": ("longitude", "lng", "lon"),
    "position": ("graph_id", "index"),
    "the district": ("district",),
}


@dataclass(frozen=True, eq=False)
class Nodes:
    """The nodes of a store: fields of ``NodeSpec``, the files that told them, and notes for the recipe."""

    ids: np.ndarray
    latitude: np.ndarray | None = None
    longitude: np.ndarray | None = None
    adjacency: np.ndarray | None = None
    static: dict[str, np.ndarray] | None = None
    files: list[Path] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def with_graph(self, adjacency: Path | None, dcrnn: bool, files: list[Path | None]) -> "Nodes":
        weights, notes = read_graph(adjacency, self.ids, dcrnn) if adjacency else (None, {})
        return replace(self, adjacency=weights, files=[Path(file) for file in files if file], notes=notes)

    def spec(
        self,
        city: str,
        channels: Sequence[str],
        stamps: np.ndarray,
        cadence: int,
        utc_offset: int | None,
        units: str = UNKNOWN_UNITS,
        since: np.ndarray | None = None,
    ) -> NodeSpec:
        """Over the local days of ``stamps``."""
        return NodeSpec(
            city=city,
            channels=tuple(channels),
            first_day=stamps.min().astype("datetime64[D]"),
            last_day=stamps.max().astype("datetime64[D]"),
            node_ids=self.ids,
            cadence_minutes=cadence,
            utc_offset_minutes=utc_offset_of(city, utc_offset),
            units=units,
            latitude=self.latitude,
            longitude=self.longitude,
            adjacency=self.adjacency,
            static=self.static,
            since=since,
        )


@dataclass(frozen=True)
class SensorFiles:
    """Options: files about nodes whose ids the data tells. adjacency: weights or road distances between nodes
    (``graphs.read_graph``). meta: places of the nodes (``graphs.read_nodes``)."""

    adjacency: Path | None = None
    meta: Path | None = None

    def nodes(self, ids: np.ndarray) -> Nodes:
        """The graph follows DCRNN's rule. Raises InputError where a file is not of these nodes."""
        nodes = read_nodes(self.meta, ids) if self.meta else Nodes(ids)
        return nodes.with_graph(self.adjacency, dcrnn=True, files=[self.adjacency, self.meta])


@dataclass(frozen=True)
class NodeFiles:
    """Options: files about nodes of which the data tells only the number. adjacency: square table of weights, or CSV of
    edges from,to,distance (``graphs.read_graph``). node_ids: ids one a line, or CSV with a column of ids and perhaps
    places (``graphs.read_nodes``); numbered from 0 by default."""

    adjacency: Path | None = None
    node_ids: Path | None = None

    def nodes(self, count: int) -> Nodes:
        """Raises InputError where a file is not of so many nodes."""
        nodes = read_nodes(self.node_ids, count) if self.node_ids else Nodes(np.arange(count))
        return nodes.with_graph(self.adjacency, dcrnn=False, files=[self.node_ids, self.adjacency])


def ids_of(names: list[str]) -> np.ndarray:
    """int64 [N] where every name is a whole number, else str [N]; InputError where one occurs twice."""
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"node {twice!r} occurs twice; give each node once")
    try:
        integers = np.array([int(name) for name in names], np.int64)
    except (ValueError, OverflowError):
        # No whole numbers, or beyond int64.
        return np.array(names)
    return integers if [str(number) for number in integers] == names else np.array(names)


def read_nodes(path: Path, expected: np.ndarray | int) -> Nodes:
    """Ids and places from a CSV with columns under their usual names, ``COLUMNS``, LibCity's .geo too; or without
    header, from ids one a line (as PEMS03.txt) or ids, latitude and longitude (as graph_sensor_locations_bay.csv).

    expected: the ids, whose rows are found by them and must tell places; or how many nodes there are, in the order of
    a column that counts their positions, else of the rows. Raises InputError where the table is not of these nodes.
    """
    table = read_table(path, header=False)
    if {str(title).lower() for title in table.row(0)} & {*COLUMNS["ids"]}:
        table = read_table(path)
    elif table.width == 1 or (table.width == 3 and _is_number(table[0, 1])):
        table.columns = ["id", "latitude", "longitude"][: table.width]
    if "coordinates" in table.columns:
        table = _with_degrees(table)
    ids, place = column_of(path, table, "ids"), ["the latitude", "the longitude"]
    if isinstance(expected, int):
        if len(table) != expected:
            raise InputError(f"{path} names {len(table)} nodes, the data has {expected}; give the table of these nodes")
        if position := find_column(table, "position"):
            positions = numbers(path, table.select(position))[:, 0]
            if sorted(positions) != list(range(expected)):
                raise InputError(f"{path}: column {position!r} does not count 0 … {expected - 1}; check the table")
            table = table[np.argsort(positions)]
        columns = [find_column(table, what) for what in place]
        if None in columns:
            return Nodes(ids_of(table[ids].to_list()))
    else:
        columns = [column_of(path, table, what) for what in place]
        table = table[rows_of(path, table[ids].to_list(), expected)]
    degrees = numbers(path, table.select(columns))
    return Nodes(ids_of(table[ids].to_list()) if isinstance(expected, int) else expected, degrees[:, 0], degrees[:, 1])


def read_graph(path: Path, ids: np.ndarray, dcrnn: bool = False) -> tuple[np.ndarray, dict[str, float]]:
    """Weights of the edges from node (row) to node (column), float32 [N, N], 0 where there is none; recipe notes.

    A square table of weights in .csv (with or without a header and a first column that name the nodes), .npy or .npz
    (its only array, as ``YYYY_adj.npz``) is taken as it is. A CSV of edges ``from,to,distance``, or LibCity's .rel,
    becomes the weights of ``gaussian_kernel``. DCRNN's lists may have no header, pairs of other nodes are passed over
    and weak edges cut; else all names must be known and no edge is cut. A pickled graph (``adj_mx.pkl``) is never
    loaded, since a pickle can run any program. Raises InputError for one, and where size or names do not fit.
    """
    if path.suffix.lower() in (".pkl", ".pickle"):
        raise InputError(
            f"{path} is a pickle, which could run any program and is never loaded; "
            "give the distances it was made of (from,to,distance) or a matrix as .csv or .npy"
        )
    if path.suffix.lower() in (".npy", ".npz"):
        return require_weights(path, np.asarray(array_file(path, None, "N, N").load()), len(ids)), {}
    table = read_table(path, header=False)
    titles = [str(title).lower() for title in table.row(0)]
    if {*EDGES} <= {*titles}:
        # LibCity's .rel: rel_id, type, origin_id, destination_id, and a distance.
        ends = [titles.index(name) for name in EDGES]
        if max(ends) + 1 == table.width:
            raise InputError(f"{path} has no distance behind {EDGES[1]}; give one, as cost")
        table, titles = table[:, [*ends, max(ends) + 1]], ["from", "to"]
    titled = titles[:2] == ["from", "to"]
    if titled or (dcrnn and table.width == 3 and len(ids) != 3):
        titled = titled or not _is_number(table[0, 2])
        return _weights_of_edges(path, table[1:] if titled else table, ids, dcrnn, first_line=1 + titled)
    names = None
    if len(table) == len(ids) + 1:
        names, table = list(table.row(0)), table[1:]
    if table.width == len(ids) + 1:
        names, table = table[:, 0].to_list(), table[:, 1:]
    if names and names[-len(ids) :] not in ([*map(str, ids.tolist())], [*map(str, range(len(ids)))]):
        raise InputError(f"{path} names other nodes than the data, or in another order; sort it as the data")
    return require_weights(path, numbers(path, table), len(ids)), {}


def _with_degrees(table: pl.DataFrame) -> pl.DataFrame:
    """LibCity's ``coordinates``, the text [longitude, latitude] of a point, as columns of numbers; none of polygons."""
    point = pl.col("coordinates").str.extract_groups(r"^\[\s*([-\d.eE]+)\s*,\s*([-\d.eE]+)\s*\]$")
    degrees = table.select(point.struct.rename_fields(["longitude", "latitude"]).alias("point")).unnest("point")
    return table.hstack(degrees) if degrees["latitude"].null_count() == 0 else table


def gaussian_kernel(distances: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """w = exp(−(d / σ)²), 0 where below ``threshold``; distances [N, N], infinite where there is no road, or [E].

    σ is the standard deviation of the finite distances, each sensor's 0 to itself included; w is not made
    symmetric: "Diffusion Convolutional Recurrent Neural Network" (Li et al., 2018), section 4.1, and its
    scripts/gen_adj_mx.py. Where all distances are equal only infinite ones count as far.
    """
    sigma = distances[np.isfinite(distances)].std()
    weights = np.exp(-np.square(distances / sigma)) if sigma else np.isfinite(distances).astype(float)
    return np.where(weights < threshold, 0, weights)


def column_of(path: Path, table: pl.DataFrame, what: str) -> str:
    """The column of ``COLUMNS``; InputError where there is none."""
    if (column := find_column(table, what)) is None:
        raise InputError(f"{path} has no column of {what}; it has {', '.join(table.columns[:12])}")
    return column


def find_column(table: pl.DataFrame, what: str) -> str | None:
    return next((column for name in COLUMNS[what] for column in table.columns if column.lower() == name), None)


def rows_of(path: Path, listed: list[str], ids: np.ndarray) -> np.ndarray:
    """Row of each sensor in a file that lists the ids ``listed``, int64 [N]; InputError where one is absent."""
    row = {label: number for number, label in enumerate(listed)}
    labels = [str(label) for label in ids.tolist()]
    absent = [label for label in labels if label not in row]
    if absent:
        raise InputError(
            f"{path} lacks sensor {absent[0]} ({len(absent)} of {len(labels)} absent); give the file of this data"
        )
    return np.array([row[label] for label in labels], np.int64)


def read_table(path: Path, header: bool = True) -> pl.DataFrame:
    """A CSV file as text; InputError where it is none."""
    if (kind := kind_of(path)) != "gzip":
        refuse_kind(path, kind)
    try:
        table = pl.read_csv(existing(path), has_header=header, infer_schema=False)
    except pl.exceptions.NoDataError as error:
        raise InputError(f"{path} is empty; give a file that holds data") from error
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{path} is no CSV table ({str(error).splitlines()[0]}); check the file") from error
    if table.is_empty():
        raise InputError(f"{path} holds no row; give a file that holds data")
    return table.with_columns(pl.all().str.strip_chars())


def numbers(path: Path, table: pl.DataFrame) -> np.ndarray:
    """Text as float64 [rows, columns]; InputError names the first field that is no finite number."""
    values = table.cast(pl.Float64, strict=False).to_numpy().astype(np.float64)
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        row, column = wrong[0].tolist()
        raise InputError(f"{path}: {table[row, column]!r} is not a number, in column {table.columns[column]}")
    return values


def _weights_of_edges(
    path: Path, table: pl.DataFrame, ids: np.ndarray, dcrnn: bool, first_line: int
) -> tuple[np.ndarray, dict[str, float]]:
    position = {str(label): number for number, label in enumerate(ids.tolist())}
    source, target, distance = table.columns[:3]
    named = pl.col(source).is_in([*position]) & pl.col(target).is_in([*position])
    unknown = table.with_row_index("line", offset=first_line).filter(~named)
    if table.is_empty() or (len(unknown) == len(table) and dcrnn):
        lacking = f"names none of the {len(ids)} sensors" if dcrnn else "holds no edges"
        raise InputError(f"{path} {lacking}; give the distances of this data")
    if len(unknown) and not dcrnn:
        line, *edge = unknown.row(0)
        raise InputError(
            f"{path}, line {line}: {','.join(map(str, edge))} names a node that the data lacks; "
            "give the ids of its nodes with --node-ids"
        )
    edges = table.filter(named)
    distances = numbers(path, edges.select(distance))[:, 0]
    if (distances < 0).any():
        raise InputError(f"{path}: distance {distances[distances < 0][0]} is negative; check the file")
    rows, columns = (np.array([position[label] for label in edges[name]]) for name in (source, target))
    weights = np.zeros((len(ids), len(ids)), np.float32)
    if dcrnn:
        # The authors' σ is that of a matrix: of a pair that occurs twice the last counts.
        matrix = np.full(weights.shape, np.inf)
        matrix[rows, columns] = distances
        rows, columns = np.nonzero(np.isfinite(matrix))
        distances = matrix[rows, columns]
        weights[rows, columns] = gaussian_kernel(distances)
        return weights, {"adjacency_sigma": float(distances.std()), "adjacency_threshold": THRESHOLD}
    # An edge stays an edge where its weight is too small for float32.
    weights[rows, columns] = np.maximum(gaussian_kernel(distances, 0), np.finfo(np.float32).tiny)
    return weights, {"adjacency_sigma": float(distances.std())}


def require_weights(path: Path, table: np.ndarray, count: int) -> np.ndarray:
    """float32 [count, count]; InputError for another shape, and a weight that is negative or not finite."""
    if table.shape != (count, count):
        raise InputError(f"{path} is {table.shape[0]} x {table.shape[1]}, the data has {count} nodes; give their table")
    if not np.isfinite(table).all() or (table < 0).any():
        raise InputError(f"{path} holds a weight that is negative or not finite; 0 means no edge")
    return table.astype(np.float32)


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True
