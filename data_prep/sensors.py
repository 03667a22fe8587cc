"""What road sensors bring beside their readings: where each one stands, and the graph of the roads between them.

Files of whole states or cities list more sensors than the data has, in another order: rows are found by id.
"""

from pathlib import Path

import numpy as np
import polars as pl

from data_prep.common import existing
from data_prep.graphs import read_adjacency
from stdist.errors import InputError

THRESHOLD = 0.1
"""DCRNN's: weaker edges are cut."""
COLUMNS = {
    "sensor id": ("sensor_id", "id", "station_id", "station"),
    "latitude": ("latitude", "lat"),
    "longitude": ("longitude", "lng", "lon"),
}


def read_graph(path: Path, ids: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """Edge weights from sensor (row) to sensor (column), float32 [N, N], in the order of ``ids``; notes for the
    recipe.

    DCRNN's list of road distances, three columns (from, to, distance) with or without header, becomes the
    weights of ``gaussian_kernel``; pairs of other sensors are passed over. Other files are those of
    ``graphs.read_adjacency``. A pickled graph (``adj_mx.pkl``) is never loaded, since a pickle can run any
    program. Raises InputError for one, and where the file does not fit the sensors.
    """
    if path.suffix.lower() in (".pkl", ".pickle"):
        raise InputError(
            f"{path} is a pickle, which could run any program and is never loaded; "
            "give the distances it was made of (from,to,distance) or a matrix as .csv or .npy"
        )
    if path.suffix.lower() == ".csv":
        table = read_table(path, header=False)
        if len(table.columns) == 3 and len(ids) != 3:
            distances = _distances(path, table if _is_number(table[0, 2]) else table[1:], ids)
            sigma = float(distances[np.isfinite(distances)].std())
            return gaussian_kernel(distances).astype(np.float32), {
                "adjacency_sigma": sigma,
                "adjacency_threshold": THRESHOLD,
            }
    return read_adjacency(path, ids)


def gaussian_kernel(distances: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """w = exp(−(d / σ)²), 0 where below ``threshold``; distances [N, N], infinite where there is no road.

    σ is the standard deviation of the finite distances, each sensor's 0 to itself included; w is not made
    symmetric: "Diffusion Convolutional Recurrent Neural Network" (Li et al., 2018), section 4.1, and its
    scripts/gen_adj_mx.py. Where all distances are equal only infinite ones count as far.
    """
    sigma = distances[np.isfinite(distances)].std()
    weights = np.exp(-np.square(distances / sigma)) if sigma else np.isfinite(distances).astype(float)
    return np.where(weights < threshold, 0, weights)


def read_locations(path: Path, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latitude and longitude in degrees, float64 [N] each, in the order of ``ids``.

    A CSV with columns of sensor id, latitude and longitude under their usual names, or just these three without
    header, as graph_sensor_locations_bay.csv. Raises InputError where a sensor is absent.
    """
    table = read_table(path)
    if len(table.columns) == 3 and _is_number(table.columns[1]):
        table = read_table(path, header=False)
        table.columns = list(COLUMNS)
    sensor, latitude, longitude = (column_of(path, table, what, names) for what, names in COLUMNS.items())
    degrees = numbers(path, table[rows_of(path, table[sensor].to_list(), ids), [latitude, longitude]])
    return degrees[:, 0], degrees[:, 1]


def column_of(path: Path, table: pl.DataFrame, what: str, names: tuple[str, ...]) -> str:
    """The column under one of ``names``, upper or lower case; InputError where there is none."""
    found = next((column for name in (what, *names) for column in table.columns if column.lower() == name), None)
    if found is None:
        raise InputError(f"{path} has no column of the {what}; it has {', '.join(table.columns[:12])}")
    return found


def rows_of(path: Path, found: list[str], ids: np.ndarray) -> np.ndarray:
    """Row of each sensor in a file that lists the ids ``found``, int64 [N]; InputError where one is absent."""
    row = {label: number for number, label in enumerate(found)}
    wanted = [str(label) for label in ids.tolist()]
    absent = [label for label in wanted if label not in row]
    if absent:
        raise InputError(
            f"{path} lacks sensor {absent[0]} ({len(absent)} of {len(wanted)} absent); give the file of this data"
        )
    return np.array([row[label] for label in wanted], np.int64)


def read_table(path: Path, header: bool = True) -> pl.DataFrame:
    """A CSV file as text; InputError where it is none."""
    try:
        table = pl.read_csv(existing(path), has_header=header, infer_schema=False)
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
        raise InputError(f"{path}: {table[row, column]!r} in column {table.columns[column]} is not a finite number")
    return values


def _distances(path: Path, table: pl.DataFrame, ids: np.ndarray) -> np.ndarray:
    """float64 [N, N], infinite where the list has no such pair."""
    position = {str(label): number for number, label in enumerate(ids.tolist())}
    source, target, distance = table.columns
    known = table.filter(pl.col(source).is_in(list(position)), pl.col(target).is_in(list(position)))
    if known.is_empty():
        raise InputError(f"{path} names none of the {len(ids)} sensors; give the distances of this data")
    found = numbers(path, known.select(distance))[:, 0]
    if (found < 0).any():
        raise InputError(f"{path}: distance {found[found < 0][0]} is negative; check the file")
    distances = np.full((len(ids), len(ids)), np.inf)
    rows, columns = ([position[label] for label in known[name]] for name in (source, target))
    distances[rows, columns] = found
    return distances


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True
