"""Reader of the Telecom Italia Big Data Challenge, Milan (Harvard Dataverse, ODbL): one text file a day.

The data's facts: 62 files (2013-11-01 … 2014-01-01, 20.8 GB), 319,896,289 rows, 10-minute slots, 100 x 100
squares of 235 m; 34,682 (square, slot) pairs have no row (0.04 %). Square ids run 1 … 10000 from the
south-west corner eastward, then north: row (id − 1) // 100 counts from the south, as in the store. Values are
rescaled activity, not counts. The text format is described in ``telecom_text``.

What is made of it: values are summed over country codes. An absent (square, slot) pair is missing; an empty
field in a pair that has a row is a measured zero; a slot without any row is a frame that does not exist.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from data_prep.common import existing, grid_spec, parse_split
from data_prep.plan import Day, Part, Plan
from data_prep.telecom_text import CHANNELS, SLOT_MS, SLOTS_PER_DAY, UTC_OFFSET_MINUTES, day_start_ms
from data_prep.text import explain_failure, require_columns
from stdist.errors import InputError

SIDE = 100
COLUMNS = {"cell": pl.Int64, "stamp": pl.Int64, "country": pl.Int64, **dict.fromkeys(CHANNELS, pl.Float64)}


def plan(
    sources: list[Path],
    *,
    city: str = "milan",
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
) -> Plan:
    """Plan of all five channels from day files, or from folders that hold them: a part for every day.

    train, validation, test: local days ``A:B``; the paper's spans by default where the data covers them.
    Raises InputError for a file of another format, and naming both files where two hold the same day.
    """
    files = _day_files(sources)
    first, last = min(files), max(files)
    spec = grid_spec(
        city,
        CHANNELS,
        (first, last),
        (SIDE, SIDE),
        cadence=SLOT_MS // 60_000,
        utc_offset=UTC_OFFSET_MINUTES,
        units="rescaled activity",
    )
    split = parse_split(train, validation, test, spec)
    parts = [Part(str(day), (int((day - first).astype(int)),), (files[day], day)) for day in sorted(files)]
    sources = [files[day] for day in sorted(files)]
    return Plan(spec, {"reader": "telecom-italia"}, sources, split, parts, _read)


def _read(part: Part) -> Iterator[Day]:
    """payload: file and local day. Raises InputError naming file and line of a broken row."""
    yield Day(part.days[0], *read_day(*part.payload))


def _day_files(sources: Sequence[Path]) -> dict[np.datetime64, Path]:
    """The file of every local day, by the stamp of its first row."""
    paths = [p for s in sources for p in (sorted(Path(s).glob("*.txt")) if Path(s).is_dir() else [existing(s)])]
    if not paths:
        raise InputError("telecom-italia needs the day files, or a folder that holds them; none was found")
    files: dict[np.datetime64, Path] = {}
    for path in paths:
        day = _first_day(path)
        if day in files:
            raise InputError(f"{files[day]} and {path} both hold {day}; give each day once")
        files[day] = path
    return files


def _first_day(path: Path) -> np.datetime64:
    if "-tn-" in path.name:
        raise InputError(f"{path} is Trentino, whose 6,575 squares are no rectangle; this reader places Milan only")
    with path.open("rb") as file:
        line = file.readline(1000).decode(errors="replace").rstrip("\r\n")
    if line.lower().startswith("datetime,"):
        raise InputError(
            f"{path} is the hourly re-release with a header (datetime,CellID,…); "
            "give the original tab-separated 10-minute files of Harvard Dataverse"
        )
    fields = line.split("\t")
    if len(fields) != len(COLUMNS) or not fields[1].isdigit():
        raise InputError(
            f"{path}, line 1: {line[:60]!r} is not a row of the raw format; "
            "it has 8 tab-separated columns: square, epoch ms, country, and five activities"
        )
    local = np.datetime64(int(fields[1]), "ms") + np.timedelta64(UTC_OFFSET_MINUTES, "m")
    return local.astype("datetime64[D]")


def read_day(path: Path, day: np.datetime64) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Values per channel, float32 [144, 100, 100] with NaN = missing, and which slots have any row, bool
    [144].
    """
    require_columns(path, "\t", len(COLUMNS))
    activities = [pl.col(name) for name in CHANNELS]
    try:
        rows = pl.scan_csv(path, separator="\t", has_header=False, schema=COLUMNS)
        pairs = (
            rows.group_by("cell", "stamp")
            .agg(*[activity.sum() for activity in activities], lowest=pl.min_horizontal(activities).min())
            .collect(engine="streaming")
        )
    except pl.exceptions.PolarsError as error:
        explain_failure(path, "\t", len(COLUMNS), range(1, len(COLUMNS) + 1), [""], error)
    cell, stamp = pairs["cell"].to_numpy(), pairs["stamp"].to_numpy()
    table = pairs.select(CHANNELS).to_numpy()
    slot, rest = np.divmod(stamp - day_start_ms(day), SLOT_MS)
    _require(path, (cell < 1) | (cell > SIDE**2), pl.col("cell"), cell, f"square outside 1 … {SIDE**2}")
    _require(path, rest != 0, pl.col("stamp"), stamp, "stamp off the 10-minute grid")
    _require(path, (slot < 0) | (slot >= SLOTS_PER_DAY), pl.col("stamp"), stamp, f"stamp outside {day} local time")
    if not np.isfinite(table).all():
        explain_failure(path, "\t", len(COLUMNS), range(4, len(COLUMNS) + 1), [""])
    lowest = pairs["lowest"].fill_null(0).to_numpy()
    _require(path, lowest < 0, pl.min_horizontal(activities), lowest, "negative activity")

    values = np.full((len(CHANNELS), SLOTS_PER_DAY, SIDE**2), np.nan, np.float32)
    values[:, slot, cell - 1] = table.T
    present = np.zeros(SLOTS_PER_DAY, bool)
    present[slot] = True
    return dict(zip(CHANNELS, values.reshape(-1, SLOTS_PER_DAY, SIDE, SIDE), strict=True)), present


def _require(path: Path, bad: np.ndarray, column: pl.Expr, found: np.ndarray, what: str) -> None:
    """Raise InputError naming the first line whose ``column`` holds one of the bad values found."""
    if not bad.any():
        return
    rows = pl.scan_csv(path, separator="\t", has_header=False, schema=COLUMNS).with_row_index("line", offset=1)
    wrong = rows.filter(column.is_in(np.unique(found[bad]).tolist())).select("line", column.alias("value")).head(1)
    line, value = wrong.collect(engine="streaming").row(0)
    raise InputError(f"{path}, line {line}: {what} ({value}); the file is damaged or not of Milan")
