"""``stdist calibrate``: forecasts of days that the model was not fitted on, compared with what came, become the
quantiles of all later forecasts of the run."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from stdist.config import RunConfig
from stdist.data import GridStore, Windows
from stdist.data.audit import Fitted, data_digest, leak_line, leaks, refuse_leaks
from stdist.errors import InputError
from stdist.evaluation import build_report, open_forecasts
from stdist.evaluation.conformal import ConformalQuantiles
from stdist.evaluation.forecasts import ForecastFile
from stdist.evaluation.levels import LEVELS
from stdist.evaluation.protocol import local_hours, match_windows, read_targets
from stdist.evaluation.quantile_baselines import score_baseline_quantiles
from stdist.evaluation.quantile_scores import QuantileErrors
from stdist.evaluation.run_files import METRICS, add_quantiles
from stdist.evaluation.unusual import fit_reference
from stdist.memory import fits, require_room
from stdist.runs.calibration_file import CALIBRATION, Calibration, model_digest, write_calibration
from stdist.runs.dataset import split_of, training_span
from stdist.runs.forecast_request import ForecastRequest
from stdist.runs.forecasting import TEST_FORECASTS, Predictor, Sweep, local_targets, open_sweep, write_forecasts
from stdist.runs.run_folder import held
from stdist.runs.whole_days import newest_whole_days

FORECASTS = TEST_FORECASTS.with_name("calibration.zarr")
BYTES, BYTES_WITH_OWN, BYTES_OF_SCORES = 75, 180, 250
"""Memory at the peak, measured, of each window, step and place: of a calibration, of one that corrects quantiles of the
model's own, and of scoring quantiles."""


def calibrate_run(
    config: RunConfig,
    last_stage: str,
    load: Callable[[Path], Predictor],
    request: ForecastRequest,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Writes ``calibration.json`` of a run from its forecasts of ``request``'s windows, and where the run has test
    forecasts puts the scores of their quantiles into its report.

    Killed it goes on where it was. Raises what ``open_sweep`` raises, and InputError for days that the model was fitted
    on, whose residuals are too small, for too few observed points, and for more than memory holds.
    """
    run_dir = request.run_dir
    with held(run_dir):
        request = replace(request, quantiles=False)  # not by the calibration before
        sweep = open_sweep(config, last_stage, load, request, log)
        predictor, windows = sweep.predictor, sweep.windows
        predictor.ask_distribution()
        log(windows.contract)
        data = data_digest(windows.store, windows.channel)
        if isinstance(request.split, int):
            _require_newer(predictor.fitted, windows, request.split)
        refuse_leaks(predictor.fitted, windows.span, data)
        require_room(
            points_of(windows) * (BYTES_WITH_OWN if predictor.own_levels else BYTES),
            f"calibrating on {len(windows)} windows of {windows.K} steps and {math.prod(windows.region.shape)} places",
            "calibrate fewer places by --region, or on fewer days by --newest or --split",
        )
        path = run_dir / FORECASTS
        shutil.rmtree(path, ignore_errors=True)
        write_forecasts(config, predictor, windows, sweep.summary, path, log)
        calibration = _fit(open_forecasts(path), sweep, data)
        write_calibration(run_dir / CALIBRATION, calibration)
        shutil.rmtree(path)

        def forecast_test() -> Path:
            asked = replace(request, region=None, split="test")
            test = open_sweep(config, last_stage, load, asked, log)
            test.predictor.ask_distribution()
            write_forecasts(config, test.predictor, test.windows, test.summary, path, log)
            return path

        days = np.unique(windows.store.local_times[windows.origins + 1].astype("datetime64[D]"))
        result: dict[str, Any] = {
            "calibration": str(run_dir / CALIBRATION),
            "days": len(days),
            "windows": len(windows),
            "places": len(calibration.places),
            "classes": len(calibration.offsets),
        }
        scores = _score_test(config, calibration, windows, run_dir, forecast_test, log)
        shutil.rmtree(path, ignore_errors=True)
        return result | ({"test": scores} if scores else {})


def points_of(windows: Windows) -> int:
    """The number of windows, steps and places together."""
    return len(windows) * windows.K * math.prod(windows.region.shape)


def _require_newer(fitted: tuple[Fitted, ...], windows: Windows, newest: int) -> None:
    """Raises InputError where one of the newest days was fitted on, and says how many were not."""
    store = windows.store
    assert isinstance(store, GridStore)
    if not (leaked := leaks(fitted, windows.span, data_digest(store, windows.channel))):
        return
    days = newest_whole_days(store, windows.channel, windows.region, newest)
    newer = sum(all(day > item.span.last_day for item in leaked) for day in days)
    remedy = f"ask for --newest {newer} or fewer" if newer else "append newer days first"
    raise InputError(f"--newest {newest}: {leak_line(leaked, windows.span)}; {newer} whole days are newer, {remedy}")


def _fit(forecasts: ForecastFile, sweep: Sweep, data: str) -> Calibration:
    header, windows = forecasts.header, sweep.windows
    values, own, truth, observed = read_all(forecasts, windows)
    known = np.isfinite(values).all((0, 1))
    of_known = None if own is None else own[..., known]
    arrays = values[:, :, known], truth[:, :, known], observed[:, :, known]
    conformal = ConformalQuantiles.fit(arrays[0], arrays[1], arrays[2], of_known)
    return Calibration(
        run=header.metadata.run,
        checkpoint=header.metadata.checkpoint,
        model=model_digest(sweep.summary, sweep.predictor.settings),
        contract=header.metadata.contract,
        fitted=Fitted.on("calibration", windows.span, data),
        windows=len(windows),
        corrects_own=own is not None,
        places=tuple(header.cell_ids.ravel()[known].tolist()),
        edges=conformal.edges.tolist(),
        scales=conformal.scales.tolist(),
        offsets=conformal.offsets.tolist(),
        lowest=conformal.lowest,
        reference=fit_reference(conformal, local_targets(windows), windows.origins, *arrays, of_known),
    )


def read_all(forecasts: ForecastFile, windows: Windows) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
    """Point forecasts [N, K, P], the model's own ``LEVELS`` [levels, N, K, P] if it has them, truth and whether it was
    observed, [N, K, P], of all of a file's places row by row."""
    header = forecasts.header
    shape = header.shape
    has_own = header.levels == LEVELS
    values = np.empty((1 + len(LEVELS) * has_own, *shape), np.float32)
    truth, observed = np.empty(shape, np.float32), np.empty(shape, bool)
    for block, tile in header.blocks():
        place = header.place(block, tile)
        values[:, *place] = forecasts.read(block, tile, quantiles=has_own)
        truth[place], observed[place] = read_targets(windows, tile, windows.origins[block])
    values, truth, observed = (
        array.reshape(*array.shape[: -len(shape[2:])], -1) for array in (values, truth, observed)
    )
    return values[0], values[1:] if has_own else None, truth, observed


def _score_test(
    config: RunConfig,
    calibration: Calibration,
    calibrated: Windows,
    run_dir: Path,
    forecast_test: Callable[[], Path],
    log: Callable[[str], None],
) -> dict[str, Any] | None:
    """Scores of the quantiles of the run's own test forecasts, beside the baselines', which go into its report; None
    where it has none of these data or days. ``forecast_test`` makes them again where the model has quantiles of its
    own, which are not in them."""
    path, store = run_dir / TEST_FORECASTS, calibrated.store
    assert isinstance(store, GridStore)
    if not (path.exists() and (run_dir / METRICS).exists()):
        return None
    forecasts = open_forecasts(path)
    header = forecasts.header
    ids = header.cell_ids.ravel()
    known = np.isin(ids, np.array(calibration.places))
    if header.metadata.contract.store_digest != store.digest:
        log(f"note: the run's test forecasts are of another store than {store.path}; their intervals are not scored")
        return None
    tested, origins = match_windows(header, store)
    if leaks([calibration.fitted], tested.span, data_digest(store, calibrated.channel)):
        log(f"note: test days are among the days calibrated on, {calibrated.span}; their intervals are not scored")
        return None
    if not fits(points_of(tested) * BYTES_OF_SCORES):
        log("note: the test forecasts are more than memory holds; their intervals are not scored")
        return None
    if calibration.corrects_own:
        forecasts = open_forecasts(forecast_test())
    values, own, truth, observed = read_all(forecasts, tested)
    if (observed.any((0, 1)) & ~known).any():
        log("note: the calibration does not have all places of the test forecasts; their intervals are not scored")
        return None
    quantiles = np.full((len(calibration.levels), *values.shape), np.nan, np.float32)
    numbers = calibration.numbers_of(ids[known])
    part = None if own is None else own[..., known]
    quantiles[..., known] = calibration.conformal.quantiles(values[:, :, known], numbers, part)
    nothing = QuantileErrors.empty(calibration.levels, tested.K, len(ids))
    hours = local_hours(store, origins, tested.K)
    model = nothing.add(quantiles, truth, observed, hours, np.arange(len(ids))).summary()
    train = training_span(config.data, store, split_of(config.last_split, store))
    same = calibrated.of_region(tested.region, tested.history_region)
    scores = {"model": model, **score_baseline_quantiles(store, train, same, tested)}
    add_quantiles(run_dir, scores)
    build_report(run_dir)
    return {name: each["pooled"] for name, each in scores.items()}
