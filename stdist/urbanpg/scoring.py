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
from stdist.errors import InputError
from stdist.evaluation import (
    ChunkGrid,
    Efficiency,
    ForecastHeader,
    ForecastMetadata,
    ForecastWriter,
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
from stdist.nodes.learners import NodeLearners
from stdist.nodes.stage import WindowForecasts
from stdist.nodes.task import Task
from stdist.progress import progress_bar
from stdist.runs.run_folder import read_run_config
from stdist.urbanpg.checkpoints import (
    Model,
    city_of,
    load_fitted,
    load_forecaster,
    nodes_of_model,
    result_of,
    stage_names,
)
from stdist.urbanpg.config import UrbanConfig
from stdist.urbanpg.continual import COLUMNS, TITLE
from stdist.urbanpg.embeddings import project_embeddings
from stdist.urbanpg.model import UrbanPG

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
    task: Task,
    model: Model,
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
        speed = make_forecasts(config, model, task.test, fitted, summaries, path, log)
        write_atomically(speed_path, json.dumps(speed))
    # Whoever was killed between the two files has forecasts and no speed.
    speed = json.loads(speed_path.read_text()) if speed_path.exists() else None
    scores = evaluate(path, task.store).to_json()
    contract = scores.pop("contract")
    baselines = score_baselines(task.store, task.train.span, task.test)
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
    if isinstance(model, UrbanPG):
        write_embeddings(run_dir, project_embeddings(model.prompts, task.statistics.cell_mean, config.seed))
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
    model: Model,
    windows: Windows,
    fitted: tuple[Fitted, ...],
    summaries: dict[str, dict[str, Any]],
    path: Path,
    log: Callable[[str], None],
) -> float | None:
    """Writes the forecasts of all ``windows``, whose history is of the model's nodes and whose targets may be of some
    of them; goes on where a killed one was. Returns the windows it made in a second."""
    stage, batch_size = stage_names(config)[-1], config.training.train_batch_size
    _check_fits(model, windows)
    targets, nodes = windows.region.slices[0], windows.region.shape[0]
    first = windows.history_region.slices[0].start
    own = slice(targets.start - first, targets.stop - first)
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
    plan = ChunkGrid(len(windows), nodes, batch_size, nodes)
    forecasts = WindowForecasts(
        model.eval(), windows, NodeLearners(windows.history_region.shape[0]), config.nodes.block_nodes
    )
    with (
        ForecastWriter(path, header, np.arange(nodes), plan, {"training": summaries[stage]}, log) as writer,
        progress_bar("forecast", unit="windows") as progress,
    ):
        left, began = writer.remaining, time.perf_counter()
        sampler = WindowSampler(windows, batch_size, shuffle=False)
        sampler.consumed = left[0].windows.start if left else 0
        with torch.no_grad():
            for piece, batch in zip(left, WindowLoader(sampler) if left else (), strict=True):
                made, _ = forecasts(batch)
                writer.write(piece, made[None, :, :, own].cpu().numpy())
                progress(piece.windows.stop, len(windows))
        seconds = time.perf_counter() - began
        writer.finish()
    return (len(windows) - left[0].windows.start) / seconds if left else None


def _check_fits(model: Model, windows: Windows) -> None:
    """Raises InputError where the model is of another cadence, of other numbers of frames or nodes than ``windows``,
    or a node has no value."""
    store, city = windows.store, city_of(model)
    cadence = int(store.cadence / np.timedelta64(1, "m"))
    if cadence != city.cadence:
        raise InputError(
            f"{store.path} has a value every {cadence} min, {city.who} are of {city.cadence} min; fit prompts to this "
            "data with recipe few-shot"
        )
    history = torch.from_numpy(windows.read([0]).history)
    model.check(history, *city.calendar(store.local_times[windows.origins[:1]]))


def forecast(
    run_dir: Path, store_path: Path, region: str | None, split: str, out: Path, log: Callable[[str], None]
) -> dict[str, Any]:
    """``stdist forecast``: a finished run's forecaster on a store that holds its nodes, or on some of its nodes.

    ``region``: the nodes n0:n1 of this store that are forecast, all of the run's by default; the history is that of all
    of the run's. ``split``: a name (the run's own days on the store it was trained on, else the store's default split)
    or local days ``A:B``. Raises InputError for an unfinished run, nodes, times or a cadence that the forecaster does
    not know.
    """
    config = read_run_config(run_dir)
    assert isinstance(config, UrbanConfig)
    checkpoint = result_of(run_dir, config)
    model = load_forecaster(checkpoint)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    store = open_store(store_path)
    if len(store.shape) != 1:
        raise InputError(f"{store_path} holds a grid; this run forecasts nodes")
    known = _nodes_in(store, run_dir, config, model, log)
    wanted = NodeRange.parse(region) if region else known
    if not (known.n0 <= wanted.n0 and wanted.n1 <= known.n1):
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


def _nodes_in(
    store: GridStore, run_dir: Path, config: UrbanConfig, model: Model, log: Callable[[str], None]
) -> NodeRange:
    """Where ``store`` has the run's own nodes, by their ids: a row, a weight or a graph is of one node and no other.

    A run without test forecasts does not say which they are: those of the store it was trained on, else all. Raises
    InputError where the nodes are not there, or not one after the other.
    """
    path = run_dir / TEST_FORECASTS
    if not path.exists():
        log(f"note: {path} is not there to say which nodes the run knows; those of {store.path} are taken for them")
        if not _trained_on(store.path, config):
            return NodeRange(0, store.shape[0])
        first = NodeRange.parse(config.data.region).n0 if config.data.region else 0
        return NodeRange(first, first + (nodes_of_model(model) or store.shape[0] - first)).within(store.shape)
    trained = open_forecasts(path).header
    ids, found = trained.cell_ids.tolist(), store.cell_ids.tolist()
    first = found.index(ids[0]) if ids[0] in found else 0
    if found[first : first + len(ids)] != ids:
        remedy = "fit prompts to it with recipe few-shot" if isinstance(model, UrbanPG) else "train others on it"
        raise InputError(
            f"{store.path} has {len(found)} nodes, ids {found[0]} to {found[-1]}, and not one after the other the "
            f"{len(ids)} that {run_dir} was trained on, ids {ids[0]} to {ids[-1]}; {remedy}"
        )
    if store.city != (city := trained.metadata.contract.city):
        log(f"note: {store.path} is of {store.city!r}, the run of {city!r}; nodes of one id are taken to be the same")
    return NodeRange(first, first + len(ids))


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
