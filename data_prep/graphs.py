"""What files say about the nodes of a graph: their ids and places, and who is whose neighbour."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.arrays import array_file
from data_prep.common import existing
from stdist.errors import InputError

ID_COLUMNS = ("sensor_id", "zone_id", "node_id", "station_id", "id")
POSITION_COLUMNS = ("graph_id", "index")


@dataclass(frozen=True, eq=False)
class NodeTable:
    """Ids of the nodes, int64 or str [N], in the data's order; latitude, longitude in degrees [N] or None."""

    ids: np.ndarray
    latitude: np.ndarray | None = None
    longitude: np.ndarray | None = None


def numbered(count: int) -> NodeTable:
    """Nodes without ids of their own are numbered from 0."""
    return NodeTable(np.arange(count))


def ids_of(names: list[str]) -> np.ndarray:
    """int64 [N] where every name is a whole number, else str [N]; InputError where one occurs twice."""
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"node {twice!r} occurs twice; give each node once")
    try:
        whole = np.array([int(name) for name in names], np.int64)
    except ValueError:
        return np.array(names)
    return whole if [str(number) for number in whole] == names else np.array(names)


def read_node_table(path: Path, count: int) -> NodeTable:
    """Ids from a text of one id a line (as PEMS03.txt), or a CSV with a header.

    Of a CSV, the column of ``ID_COLUMNS`` holds the ids, one of ``POSITION_COLUMNS`` the node's position in
    the data where it is there (else rows are in the data's order), ``latitude`` and ``longitude`` degrees.
    Raises InputError where the table has no such column, or not ``count`` nodes.
    """
    rows = _rows(path)
    header = [field.strip().lower() for field in rows[0]]
    column = next((header.index(name) for name in ID_COLUMNS if name in header), None)
    if column is None:
        if len(header) > 1:
            raise InputError(f"{path} has no column of ids; name one of its columns {', '.join(ID_COLUMNS)}")
        names = [row[0].strip() for row in rows]
        _require_count(path, len(names), count)
        return NodeTable(ids_of(names))
    rows = rows[1:]
    _require_count(path, len(rows), count)
    position = next((header.index(name) for name in POSITION_COLUMNS if name in header), None)
    if position is not None:
        rows = sorted(rows, key=lambda row: _number(path, row[position]))
        if [_number(path, row[position]) for row in rows] != list(range(count)):
            raise InputError(f"{path}: column {header[position]!r} does not count 0 … {count - 1}; check the table")
    degrees = [
        np.array([_number(path, row[header.index(name)]) for row in rows]) if name in header else None
        for name in ("latitude", "longitude")
    ]
    return NodeTable(ids_of([row[column].strip() for row in rows]), *degrees)


def read_adjacency(path: Path, ids: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """Weights of the edges between nodes ``ids`` [N], float32 [N, N], 0 where there is none; notes for the recipe.

    A square table of weights in .csv (with or without a header and a first column that name the nodes), .npy
    or .npz (its only array, as ``YYYY_adj.npz``) is taken as it is. A CSV of edges ``from,to,distance`` becomes
    exp(−(d / σ)²), σ the deviation of all its distances (Li et al., "Diffusion Convolutional Recurrent Neural
    Network", section 4.1, without the threshold), in the direction given; the notes hold σ.
    A table names nodes by id or by position, edges name them by id. Raises InputError where size or names do not fit.
    """
    if Path(path).suffix in (".npy", ".npz"):
        return _weights(path, np.asarray(array_file(path, None, "N, N").load()), len(ids)), {}
    rows = _rows(path)
    if [field.strip().lower() for field in rows[0][:2]] == ["from", "to"]:
        return _edges(path, rows[1:], ids)
    names, body = None, rows
    if len(rows) == len(ids) + 1:
        names, body = rows[0], rows[1:]
    if len(body) and len(body[0]) == len(ids) + 1:
        names = [row[0] for row in body]
        body = [row[1:] for row in body]
    if names is not None:
        named = [name.strip() for name in names[-len(ids) :]]
        if named not in ([str(node) for node in ids], [str(position) for position in range(len(ids))]):
            raise InputError(f"{path} names other nodes than the data, or in another order; sort it as the data")
    if len(body) != len(ids) or any(len(row) != len(ids) for row in body):
        raise InputError(f"{path} is {len(body)} x {len(body[0])}, the data has {len(ids)} nodes; give their table")
    return _weights(path, np.array([[_number(path, field) for field in row] for row in body]), len(ids)), {}


def _edges(path: Path, rows: list[list[str]], ids: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    by_id = {str(node): position for position, node in enumerate(ids)}
    weights = np.zeros((len(ids), len(ids)), np.float32)
    edges, distances = [], []
    for line, row in enumerate(rows, start=2):
        try:
            edges.append((by_id[row[0].strip()], by_id[row[1].strip()]))
        except (KeyError, IndexError):
            raise InputError(
                f"{path}, line {line}: {','.join(row)} names a node that the data lacks; "
                "give the ids of its nodes with --node-ids"
            ) from None
        distances.append(_number(path, row[2] if len(row) > 2 else ""))
    if not edges or not np.isfinite(distances).all() or min(distances) < 0:
        raise InputError(f"{path} holds no edges, or a distance that is negative or not finite; check the file")
    sigma = float(np.std(distances))
    scaled = np.square(np.array(distances) / sigma) if sigma else np.zeros(len(distances))
    source, target = np.array(edges).T
    # An edge stays an edge where its weight is too small for float32.
    weights[source, target] = np.maximum(np.exp(-scaled), np.finfo(np.float32).tiny)
    return weights, {"adjacency_sigma": sigma}


def _weights(path: Path, table: np.ndarray, count: int) -> np.ndarray:
    if table.shape != (count, count):
        raise InputError(f"{path} is {table.shape[0]} x {table.shape[1]}, the data has {count} nodes; give their table")
    if not np.isfinite(table).all() or (table < 0).any():
        raise InputError(f"{path} holds a weight that is negative or not finite; 0 means no edge")
    return table.astype(np.float32)


def _rows(path: Path) -> list[list[str]]:
    with existing(path).open(newline="") as file:
        try:
            rows = [row for row in csv.reader(file) if row]
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path} is no text table ({error}); check the file") from error
    if not rows:
        raise InputError(f"{path} is empty; give a file that holds data")
    return rows


def _number(path: Path, field: str) -> float:
    try:
        return float(field)
    except ValueError:
        raise InputError(f"{path}: {field[:40]!r} is not a number; check the file") from None


def _require_count(path: Path, found: int, count: int) -> None:
    if found != count:
        raise InputError(f"{path} names {found} nodes, the data has {count}; give the table of these nodes")
