"""Forecasts of a finished run: its own test windows, and ``stdist forecast`` on any store."""

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from stdist.config import RunConfig
from stdist.data import DaySpan, GridStore, Windows, open_store
from stdist.data.audit import Fitted, data_digest, leak_line, leaks
from stdist.data.next_window import NextWindow, next_window
from stdist.data.spans import AnyRegion
from stdist.dates import parse_local_time
from stdist.errors import InputError
from stdist.evaluation import Chunk, ChunkGrid, ForecastHeader, ForecastMetadata, ForecastWriter, forecast_contract
from stdist.files import require_outside, require_writable
from stdist.progress import progress_bar
from stdist.runs.dataset import split_of
from stdist.runs.run_folder import noted_digest
from stdist.training.checkpoint import StageCheckpoints, damage_as_one_line, require_undamaged_model

TEST_FORECASTS = Path("forecasts") / "test.zarr"
"""Path of the test forecasts in a run's folder."""
NEXT = "next"
"""The split of a request for the K steps behind one moment, of which no truth need be there."""


@dataclass(frozen=True)
class ForecastRequest:
    """The arguments of ``stdist forecast``: a finished run, a store, cells or nodes (the run's own where None), a
    split's name, local days ``A:B`` or ``NEXT``, and the file to write. ``origin``: of the next steps, the local time
    of the last frame that is looked at, the store's last one where None."""

    run_dir: Path
    store: Path
    region: str | None
    split: str
    out: Path
    origin: str | None = None


Prediction = tuple[Chunk, Float[np.ndarray, "quantities windows K cells"], dict[str, int]]


class Predictor(ABC):
    """A trained model that forecasts windows chunk by chunk.

    Attributes:
        fitted: what of it was fitted on which days of which data.
        has_quantiles: whether each forecast has quantiles behind its point forecast.
        settings: what else decides the forecasts, JSON.
        unit: what a chunk counts, for the progress bar.
    """

    fitted: tuple[Fitted, ...]
    has_quantiles: bool = False
    settings: Mapping[str, Any] = {}
    unit: ClassVar[str] = "cells"

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
) -> Written:
    """Forecasts every window into ``out``; goes on where a killed one was.

    ``summary``: of the stage whose result forecasts. It names the checkpoint, and as a whole it tells two trainings
    apart that left checkpoints of the same name. ``predict``: the predictor's own, in this process, if absent.
    """
    grid, cells = predictor.grid(windows)
    header = ForecastHeader(
        metadata=ForecastMetadata(
            run=config.name,
            checkpoint=f"{summary['stage']}/{summary['checkpoint']}",
            contract=forecast_contract(windows),
            fitted=predictor.fitted,
        ),
        origins=windows.origin_times,
        cell_ids=windows.store.cell_ids[windows.region.slices],
        has_quantiles=predictor.has_quantiles,
    )
    work = {**predictor.settings, "training": summary}
    with (
        ForecastWriter(out, header, cells, grid, work, log) as writer,
        progress_bar("forecast", unit=predictor.unit) as progress,
    ):
        chunks, began = writer.remaining, time.perf_counter()
        size = sum(chunk.size for chunk in chunks)
        done = grid.size - size
        progress(done, grid.size)
        for chunk, values, counts in (predict or predictor.predict)(windows, chunks):
            writer.write(chunk, values, counts)
            done += chunk.size
            progress(done, grid.size)
        seconds = time.perf_counter() - began
        notes = predictor.notes(writer.counts)
        writer.finish()
    return Written(notes, size / grid.cells / seconds if chunks else None)


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
    """A finished run's model, opened for the windows that a request asks for; ``notes`` for people."""

    predictor: Predictor
    windows: Windows
    checkpoint: Path
    summary: dict[str, Any]
    notes: list[str]


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
    store = open_store(request.store)
    region, history_region = predictor.regions(store, request, log)
    windows = _windows(config, store, request, region, history_region)
    notes = predictor.check(windows)
    if isinstance(windows, NextWindow) and (missing := windows.missing()):
        notes.append(f"{missing} values of the history are missing; they are imputed, as in training")
    return Sweep(predictor, windows, checkpoint, summary, notes)


def _windows(
    config: RunConfig, store: GridStore, request: ForecastRequest, region: AnyRegion, history_region: AnyRegion
) -> Windows:
    data, regions = config.data, {"region": region, "history_region": history_region}
    if request.split == NEXT:
        origin = None if request.origin is None else parse_local_time(request.origin, "--origin")
        return next_window(store, data.history, data.horizon, channel=data.channel, origin=origin, **regions)
    named = ":" not in request.split
    return store.windows(
        _days(config, store, request.split, request.run_dir) if named else DaySpan.parse(request.split),
        data.history,
        data.horizon,
        channel=data.channel,
        history_inside=request.split == "train",
        name=request.split if named else "span",
        **regions,
    )


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
    require_writable(request.out.parent)
    sweep = open_sweep(config, last_stage, load, request, log)
    predictor, windows = sweep.predictor, sweep.windows
    log(windows.contract)
    if found := leaks(predictor.fitted, windows.span, data_digest(windows.store, windows.channel)):
        log(f"note: {leak_line(found, windows.span)}; `stdist evaluate` will not score these forecasts")
    written = write_forecasts(config, predictor, windows, sweep.summary, request.out, log, predict)
    for note in sweep.notes + written.notes:
        log(note)
    return {"out": str(request.out), "windows": len(windows), "checkpoint": f"{last_stage}/{sweep.checkpoint.name}"}


def _days(config: RunConfig, store: GridStore, part: str, run_dir: Path) -> DaySpan:
    if part not in ("train", "validation", "test"):
        raise InputError(
            f"{store.path} has no {part} days; choose train, validation or test, give local days A:B, or ask for --next"
        )
    split = config.last_split if store.is_or_was(noted_digest(run_dir)) else None
    return split_of(split, store).named(part)
