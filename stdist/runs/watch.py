"""``stdist watch``: the newest whole days of a store, forecast and compared with the days that a run was calibrated on:
places that left their intervals, places that stopped, and whether the whole has drifted."""

import hashlib
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stdist.config import RunConfig
from stdist.data import DaySpan, GridStore, open_store
from stdist.data.audit import data_digest, refuse_leaks
from stdist.data.spans import AnyRegion, NodeRange, Region, parse_region
from stdist.errors import InputError
from stdist.evaluation.unusual import Reference, pooled
from stdist.memory import require_room
from stdist.runs.calibration import BYTES_OF_SCORES, points_of
from stdist.runs.calibration_file import CALIBRATION, Calibration, read_calibration
from stdist.runs.dataset import split_of
from stdist.runs.forecast_request import ForecastRequest
from stdist.runs.forecasting import TEST_FORECASTS, Predictor, Sweep, open_sweep, write_forecasts
from stdist.runs.run_folder import CONFIG, held
from stdist.runs.watch_comparison import Comparison, compare
from stdist.runs.watch_file import WATCH, Places, Said, read_said, unsaid_drift, write_said
from stdist.runs.watch_table import require_table_place, write_table
from stdist.runs.whole_days import newest_whole_days
from stdist.scalars import figure

FORECASTS = TEST_FORECASTS.with_name("watch.zarr")
NEWEST = 7
"""Days that a new calibration is proposed on; of a new training for validation, and for test, at most."""
MOST = 20
"""Places that are listed."""


@dataclass(frozen=True)
class WatchRequest:
    """The arguments of ``stdist watch``. ``days``: how many of the newest whole ones. ``again``: what was said before
    is said again. ``out``: the file of all places' scores, none where None."""

    run_dir: Path
    store: Path
    days: int = 1
    again: bool = False
    out: Path | None = None


def watch_run(
    config: RunConfig,
    last_stage: str,
    load: Callable[[Path], Predictor],
    request: WatchRequest,
    tell: Callable[[dict[str, Any]], None],
    log: Callable[[str], None],
) -> bool:
    """Gives ``tell`` what was found, and returns whether there is anything that was not said before. Killed it goes on
    where it was; what was told is noted behind it, so that a kill in between has it told twice, and never not at all.

    Raises what ``open_sweep`` raises, InputError for a run without a calibration that days can be compared with, for a
    store without a whole day, where the model was fitted on the days, and where ``request.out`` is not to be written.
    """
    if request.days < 1:
        raise InputError(f"--days {request.days}: give 1 or more")
    run_dir, path = request.run_dir, request.run_dir / FORECASTS
    calibration, store = read_calibration(run_dir / CALIBRATION), open_store(request.store)
    reference = _reference(calibration, run_dir, store)
    if request.out is not None:
        require_table_place(request.out, store)
    edges, channel = calibration.contract.region, store.require_channel(calibration.contract.channel)
    region = store.region(NodeRange(*edges) if len(edges) == 2 else Region(*edges))
    days = newest_whole_days(store, channel, region, request.days)
    span = _uncalibrated(store, calibration, days)
    if span is None:
        fitted = calibration.fitted.span
        return _nothing(tell, f"nothing new: the run is calibrated on {fitted}, the newest whole day is {days[0]}")
    now = Said(
        calibration=calibration.digest,
        first_day=str(span.first_day),
        last_day=str(span.last_day),
        data=_digest_of_observed(store, channel, region, span),
    )
    said = None if request.again else read_said(run_dir / WATCH)
    told = said.unusual if said is not None and said.days == now.days else ()
    if said is not None and said.days == now.days and (said.data, said.calibration) == (now.data, now.calibration):
        remedy = "" if request.out is None else f"; --again writes {request.out}"
        return _nothing(tell, f"nothing new: {span} was watched before, and has no other values since{remedy}")
    with held(run_dir):
        asked = ForecastRequest(run_dir, request.store, str(region), str(span), path, quantiles=True)
        sweep = open_sweep(config, last_stage, load, asked, log)
        refuse_leaks(sweep.predictor.fitted, span, data_digest(store, sweep.windows.channel))
        require_room(
            points_of(sweep.windows) * BYTES_OF_SCORES,
            f"watching {span}",
            "calibrate the run by --region, on fewer places",
        )
        log(sweep.windows.contract)
        shutil.rmtree(path, ignore_errors=True)
        write_forecasts(config, sweep.predictor, sweep.windows, sweep.summary, path, log, calibration=sweep.calibration)
        found = compare(path, sweep.windows, calibration, reference)
        shutil.rmtree(path)
        result = _news(found, said, told, now)
        result |= {"usual": pooled(reference.days), "usual_coverage": reference.ranges()}
        if result["drift"]:
            result["commands"] = _commands(config, request, sweep, bool(result["better"]))
        unusual = tuple(entry.place for entry in found.unusual if entry.place not in told)
        noted = {"drift": tuple(found.drifting), "silent": tuple(found.silent), "unusual": (*told, *unusual)}
        if request.out is not None:
            write_table(request.out, found.table)
        tell(result)
        write_said(run_dir / WATCH, now.model_copy(update=noted))
    return bool(result["news"])


def lines_of(result: dict[str, Any]) -> list[str]:
    """Returns what a watch found, for people: a line that sums up, and one for each thing to know."""
    if "nothing" in result:
        return [result["nothing"]]
    scores, usual = result["scores"], result["usual"]
    summary = f"{result['span']}: no value was observed"
    if scores is not None:
        covered = (
            f"{share:.1%} in {name} ({usual['coverage'][name]:.1%})" for name, share in scores["coverage"].items()
        )
        errors = (f"{name.upper()} {figure(scores[name])} ({figure(usual[name])})" for name in ("mae", "rmse", "crps"))
        summary = f"{result['span']}, in brackets the days calibrated on: {', '.join([*errors, *covered])}"
    count, stopped = result["unusual_places"], result["silent_places"]
    summary += f"; {count} unusual places, {stopped} that stopped" if count or stopped else "; no place is unusual"
    lines = [summary]
    for place in result["unusual"]:
        outside = place["above"] + place["below"]
        direction = "above" if not place["below"] else "below" if not place["above"] else f"{place['above']} above"
        lines.append(
            f"{place['place']}: {outside} of {place['points']} values outside the 95 % interval, "
            f"{place['expected']:.1f} expected, {direction}, {place['first']} to {place['last']}; observed "
            f"{figure(place['observed'])} there, forecast {figure(place['forecast'])}"
            + ("; the last ones all" if place["run"] else "")
        )
    if stopped:
        names = ", ".join(str(place) for place in result["silent"])
        lines.append(f"stopped reporting: {names}{', …' if stopped > len(result['silent']) else ''}")
    if result["drift"]:
        ranges = ", ".join(
            f"{low:.1%} to {min(1.0, high):.1%} in {name}" for name, (low, high) in result["usual_coverage"].items()
        )
        lines.append(
            f"drift on {', '.join(result['drift'])}: days like those calibrated on have {ranges}; calibrate again:"
        )
        lines.append(f"  {result['commands']['calibrate']}")
        if result["better"]:
            lines.append(f"{', '.join(result['better'])}: a smaller error; train again:")
            lines.append(f"  {result['commands'].get('train', 'on newer days')}")
    elif result["drifting"]:
        lines.append(f"the drift that was said goes on: {', '.join(result['drifting'])}")
    return lines


def _nothing(tell: Callable[[dict[str, Any]], None], why: str) -> bool:
    tell({"news": False, "nothing": why})
    return False


def _reference(calibration: Calibration, run_dir: Path, store: GridStore) -> Reference:
    if (K := calibration.contract.K) > store.slots_per_day:
        raise InputError(
            f"{run_dir} forecasts {K} steps, and a day of {store.path} has {store.slots_per_day}: none can be watched"
        )
    if calibration.reference is None:
        raise InputError(
            f"{run_dir / CALIBRATION} does not say how its days were scored, as an earlier version's does not; "
            "run `stdist calibrate` again"
        )
    return calibration.reference


def _uncalibrated(store: GridStore, calibration: Calibration, days: list[np.datetime64]) -> DaySpan | None:
    """The span of ``days``, the newest first, without those that the run was calibrated on; None where none is left."""
    first, last = days[-1], days[0]
    if calibration.fitted.data == data_digest(store, store.require_channel(calibration.contract.channel)):
        first = max(first, calibration.fitted.span.last_day + 1)
    return DaySpan(first, last) if first <= last else None


def _digest_of_observed(store: GridStore, channel: str, region: AnyRegion, span: DaySpan) -> str:
    steps = store.step_range(span)
    observed = store.observed(channel, *steps, region)
    values = np.where(observed, store.values(channel, *steps, region), np.float32(0))
    return hashlib.sha256(observed.tobytes() + values.tobytes()).hexdigest()


def _news(found: Comparison, said: Said | None, told: Places, now: Said) -> dict[str, Any]:
    """Returns what was found, without what was said before: of a place on the same days (``told``), that a place
    stopped, of a drift by the same calibration."""
    unusual = [entry for entry in found.unusual if entry.place not in told]
    silent = [place for place in found.silent if said is None or place not in said.silent]
    same = said if said is not None and said.calibration == now.calibration else None
    drift = unsaid_drift(same, [row.day for row in found.days], found.drifting)
    scores = pooled(found.days)
    return {
        "news": bool(unusual or silent or drift),
        "span": " to ".join(dict.fromkeys(now.days)),
        "days": [row.model_dump() for row in found.days],
        "scores": scores,
        "unusual_places": len(unusual),
        "unusual": [asdict(entry) for entry in unusual[:MOST]],
        "silent_places": len(silent),
        "silent": silent[:MOST],
        "drift": drift,
        "drifting": found.drifting,
        "baselines": found.baselines,
        "better": [name for name, error in found.baselines.items() if scores is not None and error < scores["mae"]],
    }


def _commands(config: RunConfig, request: WatchRequest, sweep: Sweep, train: bool) -> dict[str, str]:
    """``calibrate`` on the newest days that nothing was fitted on; ``train`` on all days up to them, under a new name,
    where it is asked for and the recipe has one training span."""
    windows, last = sweep.windows, sweep.windows.span.last_day
    store = windows.store
    assert isinstance(store, GridStore)
    data = data_digest(store, windows.channel)
    unfit = [item.span.last_day for item in sweep.predictor.fitted if item.data == data and item.span.last_day < last]
    days = newest_whole_days(store, windows.channel, windows.region, NEWEST)
    newest = sum(all(day > other for other in unfit) for day in days)
    calibrate = ["stdist", "calibrate", str(request.run_dir), str(request.store), "--newest", str(newest)]
    own = store.region() if config.data.region is None else parse_region(config.data.region).within(store.shape)
    if windows.region != own:
        calibrate += ["--region", str(windows.region)]
    commands = {"calibrate": shlex.join(calibrate)}
    if train and config.last_split == config.data.split:
        began = split_of(config.data.split, store).named("train").first_day
        held_out = min(NEWEST, int((last - began).astype(int) + 1) // 6)
        if held_out:
            ends = {
                "train": (began, last - 2 * held_out),
                "validation": (last - 2 * held_out + 1, last - held_out),
                "test": (last - held_out + 1, last),
            }
            split = ", ".join(f"{name}: [{a}, {b}]" for name, (a, b) in ends.items())
            changes = [
                f"name={config.name}-{last}",
                f"data.store={request.store.absolute()}",
                f"data.split={{{split}}}",
            ]
            commands["train"] = shlex.join(["stdist", "train", str(request.run_dir / CONFIG), *changes])
    return commands
