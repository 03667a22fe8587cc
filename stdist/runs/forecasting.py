"""Forecasts of a finished run: its own test windows, and ``stdist forecast`` on any store."""

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int, Shaped

from stdist.config import RunConfig
from stdist.data import DaySpan, GridStore, Windows, open_store
from stdist.data.audit import Fitted, data_digest, leak_line, leaks
from stdist.data.next_window import NextWindow, next_window
from stdist.data.spans import AnyRegion
from stdist.dates import parse_local_time
from stdist.errors import InputError
from stdist.evaluation import Chunk, ChunkGrid, ForecastHeader, ForecastMetadata, ForecastWriter, forecast_contract
from stdist.evaluation.forecasts import require_suffix
from stdist.evaluation.levels import cost_level
from stdist.files import require_outside, require_writable
from stdist.progress import progress_bar
from stdist.runs.calibration_file import CALIBRATION, Calibration, model_digest, read_calibration
from stdist.runs.dataset import split_of
from stdist.runs.forecast_request import NEXT, ForecastRequest
from stdist.runs.places import find_places
from stdist.runs.run_folder import noted_digest
from stdist.runs.whole_days import span_of_newest
from stdist.training.checkpoint import StageCheckpoints, damage_as_one_line, require_undamaged_model

TEST_FORECASTS = Path("forecasts") / "test.zarr"
"""Path of the test forecasts in a run's folder."""
PARTS = ("train", "validation", "test")

Prediction = tuple[Chunk, Float[np.ndarray, "quantities windows K cells"], dict[str, int]]


class Predictor(ABC):
    """A trained model that forecasts windows chunk by chunk.

    Attributes:
        fitted: what of it was fitted on which days of which data.
        levels: of the quantiles that each forecast has of its own behind its point forecast.
        settings: what else decides the forecasts, JSON.
        own_levels: of the quantiles of its own distribution that they can have if asked, ``LEVELS`` or none.
        unit: what a chunk counts, for the progress bar.
        places: positions in the region of the windows to be forecast, row by row; all where None.
    """

    fitted: tuple[Fitted, ...]
    levels: tuple[float, ...] = ()
    own_levels: tuple[float, ...] = ()
    settings: Mapping[str, Any] = {}
    unit: ClassVar[str] = "cells"
    places: Int[np.ndarray, " n"] | None = None

    def wanted(self, positions: Int[np.ndarray, " cells"]) -> Int[np.ndarray, " n"]:
        """Returns the ``positions`` that are to be forecast."""
        return positions if self.places is None else np.intersect1d(positions, self.places)

    @abstractmethod
    def regions(
        self, store: GridStore, request: ForecastRequest, log: Callable[[str], None]
    ) -> tuple[AnyRegion, AnyRegion]:
        """The regions of the targets and of the history. Raises InputError for what the model does not know."""

    @abstractmethod
    def check(self, windows: Windows) -> list[str]:
        """Notes on ``windows`` for people. Raises InputError where the model cannot forecast them."""

    @abstractmethod
    def grid(self, windows: Windows) -> tuple[ChunkGrid, Int[np.ndarray, " cells"]]:
        """Returns the chunks of the forecasts, and the positions of the region that are forecast, row by row."""

    @abstractmethod
    def predict(self, windows: Windows, chunks: Iterable[Chunk]) -> Iterator[Prediction]:
        """Each chunk's point forecasts, then quantiles, and counts to add up over chunks."""

    def ask_distribution(self) -> None:
        """Has forecasts have the ``own_levels`` from now on, if there are any."""
        self.levels = self.own_levels or self.levels

    def notes(self, counts: Mapping[str, int]) -> list[str]:
        """Lines for people about the counts of all chunks."""
        return []


@dataclass(frozen=True)
class Written:
    """A file of forecasts: notes for people, and windows forecast a second (None where nothing was left to do)."""

    notes: list[str]
    windows_per_second: float | None


Predict = Callable[[Windows, Iterable[Chunk]], Iterator[Prediction]]
"""As :meth:`Predictor.predict`: a chunk's forecasts depend on the chunk alone, whoever makes them and beside which."""


def write_forecasts(
    config: RunConfig,
    predictor: Predictor,
    windows: Windows,
    summary: dict[str, Any],
    out: Path,
    log: Callable[[str], None],
    predict: Predict | None = None,
    *,
    horizon: int | None = None,
    calibration: Calibration | None = None,
    cost_ratio: float | None = None,
) -> Written:
    """Forecasts every window into ``out``; goes on where a killed one was.

    ``summary``: of the stage whose result forecasts. It names the checkpoint, and as a whole it tells two trainings
    apart that left checkpoints of the same name. ``predict``: the predictor's own, in this process, if absent.
    ``horizon``: steps that are kept of those that the model forecasts, all where None. ``calibration``: makes the
    quantiles, in place of the model's own. ``cost_ratio``: of ``forecast_for_cost``.
    """
    grid, cells = predictor.grid(windows)
    header = _header(config, predictor, windows, summary, cells, horizon, calibration, cost_ratio)
    work = {**predictor.settings, "training": summary}
    finished = _calibrated(header, cells, calibration)
    with (
        ForecastWriter(out, header, cells, grid, work, log) as writer,
        progress_bar("forecast", unit=predictor.unit) as progress,
    ):
        chunks, began = writer.remaining, time.perf_counter()
        size = sum(chunk.size for chunk in chunks)
        done = grid.size - size
        progress(done, grid.size)
        for chunk, values, counts in (predict or predictor.predict)(windows, chunks):
            writer.write(chunk, finished(chunk, values), counts)
            done += chunk.size
            progress(done, grid.size)
        seconds = time.perf_counter() - began
        notes = predictor.notes(writer.counts)
        writer.finish()
    return Written(notes, size / grid.cells / seconds if chunks else None)


def _header(
    config: RunConfig,
    predictor: Predictor,
    windows: Windows,
    summary: dict[str, Any],
    cells: Int[np.ndarray, " cells"],
    horizon: int | None,
    calibration: Calibration | None,
    cost_ratio: float | None,
) -> ForecastHeader:
    ids = windows.store.cell_ids[windows.region.slices]
    steps = horizon or windows.K
    some = {"places": tuple(ids.flat[cells].tolist())} if predictor.places is not None else {}
    return ForecastHeader(
        metadata=ForecastMetadata(
            run=config.name,
            checkpoint=f"{summary['stage']}/{summary['checkpoint']}",
            contract=forecast_contract(windows).model_copy(update={"K": steps, **some}),
            fitted=predictor.fitted if calibration is None else (*predictor.fitted, calibration.fitted),
            calibration=None if calibration is None else calibration.digest,
            cost_ratio=cost_ratio,
        ),
        origins=windows.origin_times,
        cell_ids=ids,
        levels=predictor.levels if calibration is None else calibration.levels,
        local_targets=local_targets(windows)[:, :steps],
    )


def _calibrated(
    header: ForecastHeader, cells: Int[np.ndarray, " cells"], calibration: Calibration | None
) -> Callable[[Chunk, np.ndarray], np.ndarray]:
    """Returns a function of a chunk's predictions [quantities, windows, K, cells] that keeps the steps asked for and
    adds the calibration's quantiles."""
    steps = header.shape[1]
    if calibration is None:
        return lambda chunk, values: values[:, :, :steps]
    conformal, numbers = calibration.conformal, calibration.numbers_of(header.cell_ids.ravel()[cells])

    def finished(chunk: Chunk, values: np.ndarray) -> np.ndarray:
        kept = values[:, :, :steps]
        own = kept[1:] if calibration.corrects_own else None
        return np.concatenate([kept[:1], conformal.quantiles(kept[0], numbers[chunk.cells], own)])

    return finished


def local_targets(windows: Windows) -> Shaped[np.ndarray, "N K"]:
    """Local times of the targets, of clocks that may have been changed since the origin."""
    store = windows.store
    utc = windows.origin_times[:, None] + store.cadence * np.arange(1, windows.K + 1)
    return store.local(utc.ravel()).reshape(utc.shape)


def drop_test_forecasts(run_dir: Path) -> None:
    """Removes what a stage left that is redone: forecasts of other weights."""
    shutil.rmtree(run_dir / TEST_FORECASTS.parent, ignore_errors=True)


def finished_stage(run_dir: Path, stage: str) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of a run's stage, all of whose model was compared with its digests, and its closing summary.

    Raises InputError where the stage is not finished, DamageError where a file is not as it was written."""
    checkpoints = StageCheckpoints(run_dir / "checkpoints" / stage)
    summary = checkpoints.finished
    if summary is None:
        raise InputError(f"{run_dir} has not finished its stage {stage}; run `stdist train` on its config again")
    checkpoint = checkpoints.folder / summary["checkpoint"]
    require_undamaged_model(checkpoint)
    return checkpoint, summary


@dataclass(frozen=True)
class Sweep:
    """A finished run's model, opened for the windows that a request asks for; ``notes`` for people; what makes its
    quantiles, if anything does."""

    predictor: Predictor
    windows: Windows
    checkpoint: Path
    summary: dict[str, Any]
    notes: list[str]
    calibration: Calibration | None


def open_sweep(
    config: RunConfig,
    last_stage: str,
    load: Callable[[Path], Predictor],
    request: ForecastRequest,
    log: Callable[[str], None],
) -> Sweep:
    """Raises InputError for an unfinished run, a region, days or a store that the model cannot forecast."""
    checkpoint, summary = finished_stage(request.run_dir, last_stage)
    with damage_as_one_line(checkpoint):
        predictor = load(checkpoint)
    return sweep_with(config, predictor, checkpoint, summary, request, log)


def sweep_with(
    config: RunConfig,
    predictor: Predictor,
    checkpoint: Path,
    summary: dict[str, Any],
    request: ForecastRequest,
    log: Callable[[str], None],
) -> Sweep:
    """The same with the model of ``checkpoint`` loaded already, on the store as it is now."""
    store = open_store(request.store)
    if request.places is not None:
        box, predictor.places = find_places(store, request.places)
        request = replace(request, region=str(box))
    region, history_region = predictor.regions(store, request, log)
    windows = _windows(config, store, request, region, history_region)
    notes = predictor.check(windows)
    if (horizon := request.horizon) is not None and not 1 <= horizon <= windows.K:
        ahead = windows.K * store.cadence.astype("timedelta64[m]")
        raise InputError(
            f"--horizon {horizon}: {request.run_dir} forecasts {windows.K} steps ({ahead}) and no further; ask for 1 "
            f"to {windows.K}, or train with data.horizon={horizon}"
        )
    calibration = _calibration(request, predictor, windows, summary)
    if calibration is not None and calibration.corrects_own:
        predictor.ask_distribution()
    return Sweep(predictor, windows, checkpoint, summary, notes, calibration)


def _windows(
    config: RunConfig, store: GridStore, request: ForecastRequest, region: AnyRegion, history_region: AnyRegion
) -> Windows:
    data, regions = config.data, {"region": region, "history_region": history_region}
    channel = request.channel or data.channel
    if request.split == NEXT:
        origin = None if request.origin is None else parse_local_time(request.origin, "--origin")
        return next_window(store, data.history, data.horizon, channel=channel, origin=origin, **regions)
    return store.windows(
        _days(config, store, request, region),
        data.history,
        data.horizon,
        channel=channel,
        history_inside=request.split == "train",
        name=str(request.split) if request.split in PARTS else "span",
        **regions,
    )


def forecast_in_memory(
    config: RunConfig, sweep: Sweep
) -> tuple[ForecastHeader, Float[np.ndarray, "quantities windows K *cells"]]:
    """A sweep's forecasts as a file of them would have them, NaN where there is none; for few windows."""
    predictor, windows = sweep.predictor, sweep.windows
    grid, cells = predictor.grid(windows)
    header = _header(config, predictor, windows, sweep.summary, cells, None, sweep.calibration, None)
    finished = _calibrated(header, cells, sweep.calibration)
    values = np.full((header.quantities, *header.shape[:2], header.cell_ids.size), np.nan, np.float32)
    for chunk, predicted, _ in predictor.predict(windows, grid.chunks()):
        values[:, chunk.windows, :, cells[chunk.cells]] = finished(chunk, predicted)
    return header, values.reshape(header.quantities, *header.shape)


def forecast_store(
    config: RunConfig,
    last_stage: str,
    load: Callable[[Path], Predictor],
    request: ForecastRequest,
    log: Callable[[str], None],
    predict: Predict | None = None,
) -> dict[str, Any]:
    """``stdist forecast``: a finished run's model on a store.

    A split's name means the run's own days on the store it was trained on (days may be appended to it since), else the
    store's default split. The same
    command run again goes on where a killed one was, whoever ``predict`` are. Raises what ``open_sweep`` raises,
    InputError where ``request.out`` lies in a store or a run, or something else has its name, and as writing would
    where it cannot be written.
    """
    require_outside(request.out)
    require_suffix(request.out)
    require_writable(request.out.parent)
    sweep = open_sweep(config, last_stage, load, request, log)
    predictor, windows = sweep.predictor, sweep.windows
    log(windows.contract)
    if found := leaks(predictor.fitted, windows.span, data_digest(windows.store, windows.channel)):
        log(f"note: {leak_line(found, windows.span)}; `stdist evaluate` will not score these forecasts")
    calibration = sweep.calibration
    levels = predictor.levels if calibration is None else calibration.levels
    if request.cost_ratio is not None:
        cost_level(request.cost_ratio, levels)
    options: Any = {"horizon": request.horizon, "calibration": calibration, "cost_ratio": request.cost_ratio}
    written = write_forecasts(config, predictor, windows, sweep.summary, request.out, log, predict, **options)
    for note in sweep.notes + written.notes:
        log(note)
    result: dict[str, Any] = {
        "out": str(request.out),
        "windows": len(windows),
        "checkpoint": f"{last_stage}/{sweep.checkpoint.name}",
    }
    result |= {"levels": list(levels)} if levels else {}
    return result | (of_next(windows) if isinstance(windows, NextWindow) else {})


def _calibration(
    request: ForecastRequest, predictor: Predictor, windows: Windows, summary: dict[str, Any]
) -> Calibration | None:
    """The calibration that makes the quantiles asked for. Raises InputError where it is of another model or other
    windows."""
    path = request.run_dir / CALIBRATION
    if request.quantiles is False or (request.quantiles is None and not path.exists()):
        return None
    calibration = read_calibration(path)
    _, cells = predictor.grid(windows)
    ids = windows.store.cell_ids[windows.region.slices].ravel()[cells]
    calibration.require_fit(path, model_digest(summary, predictor.settings), windows, ids)
    return calibration


def of_next(window: NextWindow) -> dict[str, Any]:
    """Returns what the steps behind one frame rest on: its local time, frames of the store behind it that are not
    there, and values of the history that were not observed."""
    store = window.store
    behind = int((~store.present[window.origin + 1 :]).sum())
    return {
        "origin": str(store.local_times[window.origin].astype("datetime64[m]")),
        "frames_absent_behind_it": behind,
        "imputed": window.missing(),
    }


def _days(config: RunConfig, store: GridStore, request: ForecastRequest, region: AnyRegion) -> DaySpan:
    part = request.split
    if isinstance(part, int):
        return span_of_newest(store, store.require_channel(request.channel or config.data.channel), region, part)
    if ":" in part:
        return DaySpan.parse(part)
    if part not in PARTS:
        raise InputError(
            f"{store.path} has no {part} days; choose train, validation or test, give local days A:B, or ask for --next"
        )
    split = config.last_split if store.is_or_was(noted_digest(request.run_dir)) else None
    return split_of(split, store).named(part)
