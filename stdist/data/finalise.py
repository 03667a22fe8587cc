"""The last phase of a preparation: imputation and statistics by tile and channel, then digests and the name.

A kill anywhere in here costs time alone: imputation reads what was observed and nothing else, so that doing
it again gives the same values, and the final name is taken last, in one step.
"""

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from stdist.data.coordinates import Coordinate, create_array, present_coordinate
from stdist.data.imputation import Nearest, first_observed, interpolate, last_observed
from stdist.data.integrity import ROOT_METADATA, combined_digest, record_of, require_all_files
from stdist.data.journal import FOLDER, Journal
from stdist.data.parts import Executor, Part, PartResult, Tile
from stdist.data.schema import fill_short_absences, observed_name, train_mean_name, true_segments
from stdist.data.shards import Shards, present_of
from stdist.data.spans import Split, default_split
from stdist.data.statistics import StatisticsState
from stdist.errors import InputError

MAX_GAP = 6
"""Absent stretches of at most this many steps between present ones are imputed; longer ones are gaps."""

DaySegment = tuple[int, int, bool, bool]
"""[start, stop) of a gap-free segment inside one day; whether it comes from the day before, goes on into the next."""


def finalise(partial: Path, out: Path, session: str, split: Split | None, executor: Executor) -> None:
    """Turns a partial store whose parts are all there into ``out``; see ``GridWriter.finalise``."""
    journal, shards = Journal(partial), Shards.of(partial)
    finished = journal.finished()
    present = fill_short_absences(_present(shards, finished), MAX_GAP)
    if not present.any():
        raise InputError(f"{out}: no frame was written; the sources hold nothing for these days")
    create_array(shards.group, present_coordinate(present))
    days = tuple(sorted(day_segments(present, shards.slots_per_day)))
    split = split or default_split(np.unique(shards.local_days[present]))

    parts = [
        Part(f"impute {channel} {index}", days, channel, (tile,))
        for channel in shards.channels
        for index, tile in enumerate(shards.tiles)
    ]
    results = {result.name: result for result in executor(Imputation(partial, session, split), parts)}
    coverage, statistics, unseen = {}, {}, {}
    for channel in shards.channels:
        of_channel = [(part, results[part.name].result) for part in parts if part.payload == channel]
        coverage[channel] = {name: sum(r[name] for _, r in of_channel) for name in ("missing", "true_zeros")}
        state, seen, scored = StatisticsState(shards.shape), np.zeros(shards.shape, bool), np.zeros(shards.shape, bool)
        for part, result in of_channel:
            assert part.tiles is not None
            state.merge(result["state"], part.tiles[0])
            seen[part.tiles[0]], scored[part.tiles[0]] = result["seen"], result["scored"]
        unseen[channel] = count_unseen(shards.inside, seen, scored, state.cell_count > 0)
        if split.train is not None and state.count:
            fitted = state.result(split.train)
            statistics[channel] = fitted.as_attribute()
            create_array(shards.group, Coordinate(train_mean_name(channel), fitted.cell_mean, shards.dims))

    files = {name: file for result in (*finished.values(), *results.values()) for name, file in result.files.items()}
    computed = {"train_statistics": statistics, "coverage": coverage, "unseen": unseen, "max_gap": MAX_GAP}
    seal(partial, files, {"split": split.as_attribute(), **computed})
    if out.exists():
        raise InputError(f"{out} appeared meanwhile; remove it or choose another name")
    partial.rename(out)


@dataclass(frozen=True)
class Imputation:
    """Eq. 20 over the gap-free segments of one channel and tile, with one day of it in memory, and its statistics.

    ``Part``: payload the channel, days those that hold time steps. Result: ``missing`` and ``true_zeros``, over
    present steps and inside cells; ``state``, the ``StatisticsState`` of the training span; ``seen`` and ``scored``,
    the cells that were ever observed, and in validation or test days.
    """

    root: Path
    session: str
    split: Split

    def __call__(self, part: Part) -> PartResult:
        journal, shards = Journal(self.root), Shards.of(self.root)
        assert part.tiles is not None
        (tile,), channel = part.tiles, part.payload
        days = day_segments(shards.present, shards.slots_per_day)
        scratch = journal.scratch / part.name
        with journal.working(self.session):
            shutil.rmtree(scratch, ignore_errors=True)  # of a killed preparation
            note = lambda files: journal.add_imputed(part.name, files)  # noqa: E731
            result = fill_days(shards, channel, tile, days, self.split, scratch, note)
            shutil.rmtree(scratch, ignore_errors=True)
        return PartResult(part.name, *result)


def fill_days(
    shards: Shards,
    channel: str,
    tile: Tile,
    days: Mapping[int, list[DaySegment]],
    split: Split,
    scratch: Path,
    note: Callable[[dict[str, Any]], None],
    before: Nearest | None = None,
    after: Nearest | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Fills day after day; the nearest values seen are carried across midnight. Returns the files written, and counts
    and statistics of these days.

    before, after: the nearest values on either side of the days, where these are a piece of their segments.
    """
    inside = shards.inside[tile]
    nothing = Nearest.none(inside.shape)
    state, files = StatisticsState(inside.shape), dict[str, dict[str, Any]]()
    carried, missing, zeros = before or nothing, 0, 0
    seen, scored = np.zeros(inside.shape, bool), np.zeros(inside.shape, bool)
    train, scoring = shards.within(split.train), shards.within(split.validation) | shards.within(split.test)
    for day in sorted(days):
        slots = shards.slots(day)
        values, observed = shards.read(channel, day, tile), shards.read(observed_name(channel), day, tile)
        exists = np.broadcast_to(shards.exists(day, tile), inside.shape)
        filled = values.copy()
        for start, stop, goes_back, goes_on in days[day]:
            left, right = carried if goes_back else nothing, nothing
            part = slice(start - slots.start, stop - slots.start)
            if goes_on and (inside & exists & ~observed[-1]).any():
                if not scratch.exists():
                    _look_ahead(shards, channel, tile, {d: days[d] for d in days if d >= day}, scratch, after)
                with np.load(scratch / f"{day}.npz") as table:
                    right = Nearest(table["time"], table["value"])
            filled[part] = interpolate(values[part], observed[part], start, left, right)
            filled[part][:, ~exists] = 0
            carried = left.updated(last_observed(values[part], observed[part], start))
        counts = coverage_of(shards, values, observed, day, tile, days[day])
        missing, zeros = missing + counts["missing"], zeros + counts["true_zeros"]
        if not observed.all():
            file = shards.write(channel, day, tile, filled)
            note(file)
            files |= file
        seen |= observed.any(axis=0)
        scored |= observed[scoring[slots]].any(axis=0)
        state.add(values[train[slots]], observed[train[slots]])
    return files, {"missing": missing, "true_zeros": zeros, "state": state, "seen": seen, "scored": scored}


def coverage_of(
    shards: Shards, values: np.ndarray, observed: np.ndarray, day: int, tile: Tile, pieces: Sequence[DaySegment]
) -> dict[str, int]:
    """Counts, over the present slots of a day's tile and the cells that exist by then, values that are ``missing`` and
    ``true_zeros``. values, observed: [slots_per_day, *tile]."""
    there, first = shards.inside[tile] & shards.exists(day, tile), shards.slots(day).start
    missing = zeros = 0
    for start, stop, *_ in pieces:
        part = slice(start - first, stop - first)
        missing += int((~observed[part] & there).sum())
        zeros += int((observed[part] & (values[part] == 0)).sum())
    return {"missing": missing, "true_zeros": zeros}


def count_unseen(inside: np.ndarray, seen: np.ndarray, scored: np.ndarray, trained: np.ndarray) -> dict[str, int]:
    """``never_observed``: cells of the city without any observed value; ``never_in_training``: those without one in the
    training days that validation or test score. All are bool [H, W] or [N], True where a cell was observed."""
    return {
        "never_observed": int((inside & ~seen).sum()),
        "never_in_training": int((inside & scored & ~trained).sum()),
    }


def day_segments(present: np.ndarray, slots_per_day: int) -> dict[int, list[DaySegment]]:
    """Per day that holds time steps: its pieces of gap-free segments, by step. present: bool [T]."""
    days = {}
    for day in range(len(present) // slots_per_day):
        first, last = day * slots_per_day, (day + 1) * slots_per_day
        parts = [(first + a, first + b) for a, b in true_segments(present[first:last])]
        if parts:
            days[day] = [
                (a, b, a == first and a > 0 and bool(present[a - 1]), b == last and bool(present[b : b + 1].any()))
                for a, b in parts
            ]
    return days


def _look_ahead(
    shards: Shards,
    channel: str,
    tile: Tile,
    days: Mapping[int, list[DaySegment]],
    scratch: Path,
    after: Nearest | None,
) -> None:
    """Leaves on disk, for every day, the first values seen after it; backwards over the days. after: those behind the
    last."""
    scratch.mkdir(parents=True)
    nothing = Nearest.none(tuple(side.stop - side.start for side in tile))
    following = after or nothing
    for day in sorted(days, reverse=True):
        *_, goes_on = days[day][-1]
        behind = following if goes_on else nothing
        np.savez(scratch / f"{day}.npz", time=behind.time, value=behind.value)
        start, stop, goes_back, _ = days[day][0]
        if goes_back:
            where = slice(start - shards.slots(day).start, stop - shards.slots(day).start)
            values, observed = (shards.read(name, day, tile)[where] for name in (channel, observed_name(channel)))
            # Only a day-long segment lets the next day's values through to the day before.
            following = (behind if len(days[day]) == 1 else nothing).updated(first_observed(values, observed, start))


def _present(shards: Shards, finished: Mapping[str, PartResult]) -> np.ndarray:
    """bool [T]: time steps that any part's sources have."""
    present = np.zeros(len(shards.axis_days) * shards.slots_per_day, bool)
    for result in finished.values():
        for day, of_day in present_of(result, shards.slots_per_day).items():
            present[shards.slots(day)] |= of_day
    return present


def seal(partial: Path, shard_files: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Ends a store that has all its arrays: adds the attributes ``results``, the digests of its files (of those not
    among ``shard_files``, with their records, all are read) and the consolidated metadata."""
    require_all_files(partial, shard_files)
    files = dict(shard_files)
    for path in sorted(partial.rglob("*")):
        name = path.relative_to(partial)
        if not path.is_file() or FOLDER in name.parts[:1] or name.as_posix() in (ROOT_METADATA, *files):
            continue
        if path.suffix == ".partial":  # zarr was killed while it wrote this
            path.unlink()
        else:
            files[name.as_posix()] = record_of(path)
    files = dict(sorted(files.items()))
    group = zarr.open_group(partial, mode="r+", use_consolidated=False)
    attributes = {**dict(group.attrs), **results, "files": files}
    group.attrs.update({**attributes, "digest": combined_digest(files, attributes)})
    with warnings.catch_warnings():
        # Consolidated metadata is an extension of Zarr v3 that xarray and zarr both read; the notes are no array.
        warnings.filterwarnings("ignore", message="Consolidated metadata", category=UserWarning)
        warnings.filterwarnings("ignore", message=f"Object at {FOLDER}", category=UserWarning)
        zarr.consolidate_metadata(partial)
