"""From a trained forecaster of nodes to scored forecasts: the closing step of a run, and ``stdist forecast``."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stdist.data import DaySpan, GridStore, NodeRange, Split, Windows, open_store
from stdist.data.audit import Fitted, data_digest, leak_line, leaks
from stdist.data.loader import WindowLoader
from stdist.data.sampler import WindowSampler
from stdist.data.spans import AnyRegion, parse_region
from stdist.errors import InputError
from stdist.evaluation import (
    Efficiency,
    ForecastHeader,
    ForecastMetadata,
    ForecastWriter,
    PiecePlan,
    Table,
    build_report,
    evaluate,
    forecast_contract,
    open_forecasts,
    score_baselines,
    write_embeddings,
    write_metrics,
)
from stdist.files import write_atomically
from stdist.nodes.checkpoints import load_fitted
from stdist.nodes.dataset import NodeDataset
from stdist.nodes.interface import Forecaster
from stdist.nodes.learners import NodeLearners
from stdist.nodes.node_set import NodeSet
from stdist.nodes.stage import WindowForecasts
from stdist.progress import progress_bar
from stdist.runs.run_folder import read_run_config
from stdist.urbanpg.checkpoints import result_of, stage_names
from stdist.urbanpg.config import UrbanConfig
from stdist.urbanpg.continual import COLUMNS, TITLE

EFFICIENCY = "efficiency.json"
"""Beside a stage's checkpoints: what the training cost."""
TEST_FORECASTS = Path("forecasts") / "test.zarr"
"""In a run's folder; they also say which nodes the run knows."""


def drop_forecasts(run_dir: Path) -> None:
    """Those that a stage left which is redone: they are of other weights."""
    shutil.rmtree(run_dir / "forecasts", ignore_errors=True)


def stage_sentence(summary: dict[str, Any]) -> str:
    """What a stage bought, in a line."""
    before, after = summary["before"], summary["after"]
    changes = ", ".join(f"{name} {before[name]:.4f} → {after[name]:.4f}" for name in ("mae", "rmse", "mape"))
    result = summary["checkpoint"].removeprefix("step-")
    return (
        f"{summary['stage']}: validation {changes} (kept step {result} of {summary['steps']}, "
        f"{summary['seconds']:.0f} s)"
    )


def forecast_and_score(
    config: UrbanConfig,
    dataset: NodeDataset,
    model: Forecaster,
    fitted: tuple[Fitted, ...],
    summaries: dict[str, dict[str, Any]],
    periods: list[list[str | float | None]],
    notes: list[str],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Forecasts the last stage's test windows, scores them beside the baselines, writes ``report/``."""
    run_dir, path = config.run_dir, config.run_dir / TEST_FORECASTS
    speed_path = path.parent / "windows_per_second"
    if not path.exists():
        speed = make_forecasts(config, model, dataset.test, fitted, summaries, path, log)
        write_atomically(speed_path, json.dumps(speed))
    # Whoever was killed between the two files has forecasts and no speed.
    speed = json.loads(speed_path.read_text()) if speed_path.exists() else None
    scores = evaluate(path, dataset.store).to_json()
    contract = scores.pop("contract")
    baselines = score_baselines(dataset.store, dataset.train.span, dataset.test)
    metrics = {
        "contract": contract,
        "model": scores,
        "baselines": baselines,
        "stages": {
            name: {"before": s["before"], "after": s["after"], "summary": stage_sentence(s)}
            for name, s in summaries.items()
        },
        "efficiency": _efficiency(config, speed),
        "tables": [Table(title=TITLE, columns=COLUMNS, rows=periods)] if periods else [],
        "notes": notes,
    }
    write_metrics(run_dir, metrics)
    if embeddings := model.embeddings(dataset.node_means, config.seed):
        write_embeddings(run_dir, embeddings)
    page = build_report(run_dir)
    own = scores["pooled"]
    log(f"test MAE {own['mae']:.4f}, RMSE {own['rmse']:.4f}, MAPE {own['mape']:.4f}")
    log("MAE " + ", ".join(f"{name} {each['pooled']['mae']:.4f}" for name, each in baselines.items()))
    pooled = {name: each["pooled"] for name, each in baselines.items()}
    mean = scores["mean_of_horizons"]
    return {"test": own, "mean_of_horizons": mean, "baselines": pooled, "report": str(page)}


def _efficiency(config: UrbanConfig, windows_per_second: float | None) -> list[Efficiency]:
    found = []
    for name in stage_names(config):
        path = config.run_dir / "checkpoints" / name / EFFICIENCY
        if path.exists():
            found.append(Efficiency.model_validate_json(path.read_text()))
    if found:
        found[-1] = found[-1].model_copy(update={"inference_samples_per_second": windows_per_second})
    return found


def make_forecasts(
    config: UrbanConfig,
    model: Forecaster,
    windows: Windows,
    fitted: tuple[Fitted, ...],
    summaries: dict[str, dict[str, Any]],
    path: Path,
    log: Callable[[str], None],
) -> float | None:
    """Writes the forecasts of all ``windows``, whose history is of the model's nodes and whose targets may be of some
    of them; goes on where a killed one was. Returns the windows it made in a second."""
    stage, batch_size = stage_names(config)[-1], config.training.train_batch_size
    nodes, known = (NodeSet.of(windows.store, region) for region in (windows.region, windows.history_region))
    _check_fits(model, windows, known)
    own = np.searchsorted(known.numbers, nodes.numbers)
    header = ForecastHeader(
        metadata=ForecastMetadata(
            run=config.name,
            checkpoint=f"{stage}/{summaries[stage]['checkpoint']}",
            contract=forecast_contract(windows),
            fitted=fitted,
        ),
        origins=windows.origin_times,
        cell_ids=windows.store.cell_ids[windows.region.slices],
        has_quantiles=False,
    )
    plan = PiecePlan(len(windows), len(nodes), batch_size, len(nodes))
    forecasts = WindowForecasts(model.eval(), windows, NodeLearners(len(known)))
    with (
        ForecastWriter(path, header, nodes.positions, plan, {"training": summaries[stage]}, log) as writer,
        progress_bar("forecast", unit="windows") as progress,
    ):
        left, began = writer.left, time.perf_counter()
        sampler = WindowSampler(forecasts.windows, batch_size, shuffle=False)
        sampler.consumed = left[0].windows.start if left else 0
        with torch.no_grad():
            for piece, batch in zip(left, WindowLoader(sampler) if left else (), strict=True):
                made, _ = forecasts(batch)
                writer.write(piece, made[None, :, :, own].cpu().numpy())
                progress(piece.windows.stop, len(windows))
        seconds = time.perf_counter() - began
        writer.finish()
    return (len(windows) - left[0].windows.start) / seconds if left else None


def _check_fits(model: Forecaster, windows: Windows, nodes: NodeSet) -> None:
    """Raises InputError where the model is of another cadence, of other numbers of frames or nodes than ``windows``,
    or a node has no value."""
    store, city = windows.store, model.scaling
    cadence = int(store.cadence / np.timedelta64(1, "m"))
    if cadence != city.cadence:
        raise InputError(
            f"{store.path} has a value every {cadence} min, {city.who} are of {city.cadence} min; {model.elsewhere}"
        )
    history = nodes.select(torch.from_numpy(windows.read([0]).history))
    model.check(history, *city.calendar(store.local_times[windows.origins[:1]]))


def forecast(
    run_dir: Path, store_path: Path, region: str | None, split: str, out: Path, log: Callable[[str], None]
) -> dict[str, Any]:
    """``stdist forecast``: a finished run's forecaster on a store that holds its nodes, or on some of its nodes.

    ``region``: the part of this store that is forecast, all of the run's nodes by default; the history is that of all
    of the run's. ``split``: a name (the run's own days on the store it was trained on, else the store's default split)
    or local days ``A:B``. Raises InputError for an unfinished run, nodes, times or a cadence that the forecaster does
    not know.
    """
    config = read_run_config(run_dir)
    assert isinstance(config, UrbanConfig)
    checkpoint = result_of(run_dir, config)
    model = config.model.load(checkpoint)
    model.block_nodes = config.nodes.block_nodes
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    store = open_store(store_path)
    known = _region_in(store, run_dir, config, model, log)
    wanted = parse_region(region).within(store.shape) if region else known
    if any(w.start < k.start or k.stop < w.stop for w, k in zip(wanted.slices, known.slices, strict=True)):
        raise InputError(f"region {wanted} is not within the nodes {known} of {store_path} that {run_dir} knows")
    windows = store.windows(
        DaySpan.parse(split) if ":" in split else _days(store, store_path, config).named(split),
        config.data.history,
        config.data.horizon,
        channel=config.data.channel,
        region=wanted,
        history_region=known,
        history_inside=split == "train",
        name=split if ":" not in split else "span",
    )
    fitted = load_fitted(checkpoint) or ()
    log(windows.contract)
    if found := leaks(fitted, windows.span, data_digest(store, windows.channel)):
        log(f"note: {leak_line(found, windows.span)}; `stdist evaluate` will not score these forecasts")
    summary = json.loads((checkpoint.parent / "finished.json").read_text())
    make_forecasts(config, model, windows, fitted, {checkpoint.parent.name: summary}, out, log)
    return {
        "out": str(out),
        "windows": len(windows),
        "checkpoint": f"{checkpoint.parent.name}/{checkpoint.name}",
    }


def _region_in(
    store: GridStore, run_dir: Path, config: UrbanConfig, model: Forecaster, log: Callable[[str], None]
) -> AnyRegion:
    """The region of ``store`` with the run's own nodes, by their ids: an embedding, a weight or a graph is of one node
    and no other.

    A run without test forecasts does not say which they are: those of the store it was trained on, else all. Raises
    InputError where the nodes are not there, or not one after the other.
    """
    path = run_dir / TEST_FORECASTS
    if not path.exists():
        log(f"note: {path} is not there to say which nodes the run knows; those of {store.path} are taken for them")
        if not _trained_on(store.path, config):
            return store.region()
        return NodeRange(0, model.nodes) if config.continual and model.nodes else store.region(config.data.region)
    trained = open_forecasts(path).header
    ids, stored = trained.cell_ids, store.cell_ids
    if ids.ndim != stored.ndim:
        kind, other = ("a grid", "nodes") if stored.ndim == 2 else ("nodes", "cells of a grid")
        raise InputError(f"{store.path} holds {kind}, {run_dir} forecasts {other}; {model.elsewhere}")
    first = next(iter(np.argwhere(stored == ids.flat[0])), np.zeros(ids.ndim, np.int64))
    edges = list(zip(first.tolist(), (first + ids.shape).tolist(), strict=True))
    if stored[tuple(slice(*edge) for edge in edges)].tolist() != ids.tolist():
        raise InputError(
            f"{store.path} has {stored.size} nodes, ids {stored.flat[0]} to {stored.flat[-1]}, and not one after the "
            f"other the {ids.size} that {run_dir} was trained on, ids {ids.flat[0]} to {ids.flat[-1]}; "
            f"{model.elsewhere}"
        )
    if store.city != (city := trained.metadata.contract.city):
        log(f"note: {store.path} is of {store.city!r}, the run of {city!r}; nodes of one id are taken to be the same")
    return parse_region(",".join(f"{start}:{stop}" for start, stop in edges))


def _trained_on(path: Path, config: UrbanConfig) -> bool:
    return path.resolve() == config.data.store.resolve()


def _days(store: GridStore, path: Path, config: UrbanConfig) -> Split:
    if _trained_on(path, config):
        if config.continual:
            last = config.continual.periods[-1]
            return Split.parse(*([str(day) for day in span] for span in (last.train, last.validation, last.test)))
        if config.data.split:
            return Split.parse(**config.data.split.model_dump(mode="json"))
    return store.default_split
