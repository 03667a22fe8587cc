"""``stdist check``: everything that a store says of itself, looked at again.

First the files, byte by byte, against their recorded digests. Where one is damaged nothing else is read, since any
figure made of it would be wrong. Then the metadata, time and places, and last, a day of a tile at a time, every value.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray

from stdist.data.audit import Fitted, leaks
from stdist.data.check_report import LISTED, CheckReport, listed
from stdist.data.check_values import check_channels
from stdist.data.integrity import ROOT_METADATA, changed, combined_digest, sha256_of
from stdist.data.metadata import read_attributes
from stdist.data.schema import observed_name, train_mean_name, true_segments
from stdist.data.spans import DaySpan
from stdist.data.store import GridStore
from stdist.progress import Progress


def check_store(path: Path | str, progress: Progress | None = None) -> CheckReport:
    """Look at everything in a store, with a day of a tile of it in memory.

    progress: called with (steps, in all), a step being a file or a day of a channel and tile. Raises InputError where
    ``path`` is no store at all.
    """
    attributes = read_attributes(Path(path))
    report = CheckReport(Path(path))
    store = GridStore(report.store, attributes)
    tell = progress or (lambda _done, _total: None)
    _files(store, report, tell)
    if report.ok:
        _schema(store, report)
    if report.ok:
        _time(store, report)
        _space(store, report)
        _spans(store, report)
        check_channels(store, report, tell)
    else:
        if read_attributes(report.store)["digest"] != store.digest:
            raise changed(report.store)
        report.add("info", "values are read of a whole store only", "all channels")
    return report


def _files(store: GridStore, report: CheckReport, tell: Progress) -> None:
    recorded = store.attributes["files"]
    for done, (name, entry) in enumerate(recorded.items()):
        tell(done, len(recorded))
        path = report.store / name
        if not path.is_file():
            report.add("error", "file is missing", name)
        elif path.stat().st_size != entry["bytes"]:
            report.add("error", f"file has {path.stat().st_size} of {entry['bytes']} bytes", name)
        elif sha256_of(path) != entry["sha256"]:
            report.add("error", "bytes of the file are not the recorded ones", name)
    if combined_digest(recorded, store.attributes) != store.digest:
        report.add("error", "attributes are not the recorded ones", ROOT_METADATA)
    on_disk = {p.relative_to(report.store).as_posix() for p in report.store.rglob("*") if p.is_file()}
    if strangers := sorted(on_disk - set(recorded) - {ROOT_METADATA}):
        report.add("warning", f"files that are not of this store ({len(strangers)})", listed(strangers))


def _schema(store: GridStore, report: CheckReport) -> None:
    """Arrays, shapes, types and names of dimensions; consolidated metadata; what plain xarray makes of it."""
    root = report.store
    consolidated = (json.loads((root / ROOT_METADATA).read_text()).get("consolidated_metadata") or {}).get("metadata")
    arrays = {path.parent.name: json.loads(path.read_text()) for path in root.glob(f"*/{ROOT_METADATA}")}
    if consolidated != arrays:
        differ = sorted(n for n in {*arrays, *(consolidated or {})} if arrays.get(n) != (consolidated or {}).get(n))
        report.add("error", "consolidated metadata is not that of the arrays", listed(differ))
    for name, kinds, dims in _expected(store):
        array = arrays.get(name)
        if array is None:
            report.add("error", "array is missing", name)
        elif array.get("dimension_names") != dims:
            report.add("error", f"dimensions are {array.get('dimension_names')}, not {dims}", name)
        elif _kind(array["data_type"]) not in kinds:
            report.add("error", f"type is {array['data_type']}", name)
    if not report.ok:
        return
    with xarray.open_zarr(root, chunks=None) as dataset:
        sizes = {"time": len(store.times), **dict(zip(store.dims, store.shape, strict=True))}
        if {name: dataset.sizes.get(name) for name in sizes} != sizes:
            report.add("error", f"xarray finds {dict(dataset.sizes)}, the store says {sizes}", "dimensions")
        elif not np.array_equal(dataset["time"].values.astype("datetime64[ns]"), store.times):
            report.add("error", "xarray reads other stamps than this program", "time")


def _expected(store: GridStore) -> Iterator[tuple[str, str, list[str]]]:
    """Name, kinds of type and dimensions of every array that a store must have."""
    space = list(store.dims)
    yield "time", "i", ["time"]
    yield "present", "b", ["time"]
    yield "inside", "b", space
    if space == ["node"]:
        yield "node", "iU", ["node"]
    else:
        yield "cell_id", "i", space
        yield from ((name, "i", [name]) for name in space)
    for channel in store.channels:
        yield channel, "f", ["time", *space]
        yield observed_name(channel), "b", ["time", *space]
        if channel in store.attributes["train_statistics"]:
            yield train_mean_name(channel), "f", space


def _kind(data_type: Any) -> str:
    """numpy's letter for one of Zarr's types."""
    try:
        return "U" if data_type == "string" else np.dtype(data_type).kind
    except TypeError:
        return "?"


def _time(store: GridStore, report: CheckReport) -> None:
    """Stamps on the cadence, complete local days, the stretches without time steps."""
    days, intervals = store.axis_days, np.diff(store.times)
    if (intervals <= np.timedelta64(0)).any():
        place = int(np.argmax(intervals <= np.timedelta64(0)))
        report.add("error", "stamps are repeated or run backwards", f"time {store.times[place + 1]}, frame {place + 1}")
    elif (intervals != store.cadence).any():
        place = int(np.argmax(intervals != store.cadence))
        report.add("error", f"stamps are off the cadence of {store.cadence}", f"time {store.times[place + 1]}")
    steps = len(days) * store.slots_per_day
    midnight = days.first_day - np.timedelta64(store.attributes["utc_offset_minutes"], "m")
    if len(store.times) != steps or store.times[0] != midnight:
        report.add("error", f"time has {len(store.times)} frames, the days {days} have {steps}", "time")
    for start, stop in true_segments(~store.present):
        stamps = [str(store.local_times[i].astype("datetime64[m]")) for i in (start, stop - 1)]
        report.gaps.append({"first": stamps[0], "last": stamps[1], "frames": stop - start})
    for gap in report.gaps[:LISTED]:
        report.add("info", f"gap of {gap['frames']} frames", f"{gap['first']} … {gap['last']} local time")
    if len(report.gaps) > LISTED:
        report.add("info", f"more gaps ({len(report.gaps) - LISTED})", "see --json")


def _space(store: GridStore, report: CheckReport) -> None:
    """Ids, orientation, and the graph of a node store."""
    ids, counts = np.unique(store.cell_ids[store.inside], return_counts=True)
    if (counts > 1).any():
        report.add("error", "ids are repeated", listed([str(i) for i in ids[counts > 1]]))
    dataset = store.dataset
    if store.dims == ("row", "col"):
        for name, axis, ways in (("latitude", 0, ("south", "north")), ("longitude", 1, ("west", "east"))):
            if name in dataset.variables:
                _orientation(dataset[name].values, name, axis, ways, report)
            else:
                report.add("info", f"orientation cannot be told: no {name}", store.dims[axis])
    if (weights := store.adjacency) is not None:
        if weights.shape != (*store.shape, *store.shape):
            report.add("error", f"graph has shape {weights.shape}, the store {store.shape[0]} nodes", "adjacency")
        elif not np.isfinite(weights).all():
            report.add("error", f"weights are not finite ({int((~np.isfinite(weights)).sum())})", "adjacency")
        elif (weights < 0).any():
            report.add("warning", f"weights are negative ({int((weights < 0).sum())})", "adjacency")
    if store.since is not None and (late := store.since > store.days.last_day).any():
        report.add("error", "nodes begin after the last day", listed([str(i) for i in store.cell_ids[late]]))


def _orientation(degrees: np.ndarray, name: str, axis: int, ways: tuple[str, str], report: CheckReport) -> None:
    """degrees: float64 [H, W], NaN where not known."""
    steps = np.diff(degrees, axis=axis)
    wrong = int((steps <= 0).sum())
    if not wrong:
        return
    what = "rows" if axis == 0 else "columns"
    if wrong == int(np.isfinite(steps).sum()):
        report.add("error", f"{what} run from the {ways[1]}, not from the {ways[0]}", name)
    else:
        report.add("error", f"{name} goes the wrong way along the {what} ({wrong})", name)


def _spans(store: GridStore, report: CheckReport) -> None:
    """Statistics are of the training span, and of nothing that is to be scored."""
    split = store.default_split
    for channel, stored in store.attributes["train_statistics"].items():
        span = DaySpan.parse(stored["span"])
        if span != split.train:
            report.add("error", f"statistics are of {span}, training is {split.train}", channel)
        fitted = Fitted.on("statistics", span, store.digest)
        for name, part in (("validation", split.validation), ("test", split.test)):
            if part and leaks([fitted], part, store.digest):
                report.add("error", f"statistics fitted on {span} share days with {name} {part}", channel)
