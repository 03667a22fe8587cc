"""From a trained policy to scored forecasts: the closing step of a run, and ``stdist forecast`` on any store."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stdist.data import DaySpan, GridStore, Region, Split, open_store
from stdist.data.audit import data_digest, leak_line, leaks
from stdist.errors import InputError
from stdist.evaluation import (
    ForecastHeader,
    ForecastMetadata,
    ForecastWriter,
    build_report,
    evaluate,
    forecast_contract,
    score_baselines,
    write_metrics,
)
from stdist.files import write_atomically
from stdist.progress import progress_bar
from stdist.runs.run_folder import read_run_config
from stdist.training.checkpoint import StageCheckpoints, damage_as_input_error
from stdist.vision_llm.config import VisionLLMConfig
from stdist.vision_llm.numeral_range import find_unwritable
from stdist.vision_llm.policy.checkpoints import load_policy
from stdist.vision_llm.policy.city_windows import CityWindows
from stdist.vision_llm.policy.frames import pixels_per_cell
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.forecaster import candidates_per_cell, forecast_windows, plan_pieces
from stdist.vision_llm.task import Task, cadence_minutes, first_cell, span_of


def stage_sentence(summary: dict[str, Any]) -> str:
    """What a stage bought, in a line."""
    names = {
        "alignment": ["exact_match"],
        "arithmetic": ["loss", "exact_match", "median_relative_error"],
        "sft": ["nrmse"],
        "grpo": ["nrmse", "reward"],
    }[summary["stage"]]
    changes = [f"{n} {summary['before'][n]:.4f} → {summary['after'][n]:.4f}" for n in names]
    result = int(summary["checkpoint"].removeprefix("step-"))
    if result != summary["steps"]:
        last = ", ".join(f"{n} {summary['last'][n]:.4f}" for n in names)
        changes.append(f"kept step {result}; at the last step {last}")
    return f"{summary['stage']}: {', '.join(changes)} ({summary['steps']} steps, {summary['seconds']:.0f} s)"


def forecast_and_score(
    config: VisionLLMConfig,
    task: Task,
    policy: PolicyModel,
    summaries: dict[str, Any],
    notes: list[str],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Forecasts the test windows, scores them beside the baselines, writes ``report/`` with the run's ``notes``."""
    run_dir, path = config.run_dir, config.run_dir / "forecasts" / "test.zarr"
    notes_path = path.parent / "notes.txt"
    if not path.exists():
        city = CityWindows(policy, task.test, config.numerals.out_of_range == "clamp")
        with open_writer(config, city, summaries[config.stages[-1]], path, log) as writer:
            found = make_forecasts(config, policy, city, writer)
            write_atomically(notes_path, "".join(f"{note}\n" for note in found))
            writer.finish()
    found = notes_path.read_text().splitlines()
    for note in found:
        log(note)
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
        "notes": [*notes, *found],
    }
    write_metrics(run_dir, metrics)
    page = build_report(run_dir)
    nrmse = {name: scores["pooled"]["nrmse"] for name, scores in baselines.items()}
    log(
        f"test NRMSE {scores['pooled']['nrmse']:.4f}; "
        + ", ".join(f"{name} {value:.4f}" for name, value in nrmse.items())
    )
    return {"test": scores["pooled"], "baselines": nrmse, "report": str(page)}


def open_writer(
    config: VisionLLMConfig, city: CityWindows, summary: dict[str, Any], out: Path, log: Callable[[str], None]
) -> ForecastWriter:
    """A writer of the city's forecasts with run, checkpoint and contract, and what it has from before.

    ``summary``: the closing summary of the stage whose result forecasts. It names the checkpoint, and as a whole it
    tells two trainings apart that left checkpoints of the same name.
    """
    windows, generations = city.windows, candidates_per_cell(config.forecast)
    header = ForecastHeader(
        metadata=ForecastMetadata(
            run=config.name,
            checkpoint=checkpoint_name(config, summary),
            contract=forecast_contract(windows),
            fitted=city.policy.spec.fitted,
        ),
        origins=windows.origin_times,
        cell_ids=windows.store.cell_ids[windows.region.slices],
        has_quantiles=generations > 1,
    )
    work = {
        "decoding": config.forecast.decoding,
        "num_generations": generations,
        "seed": config.seed,
        "out_of_range": config.numerals.out_of_range,
        "training": summary,
    }
    plan = plan_pieces(len(city), len(city.cells), config.forecast.windows_per_batch)
    return ForecastWriter(out, header, city.cells, plan, work, log)


def checkpoint_name(config: VisionLLMConfig, summary: dict[str, Any]) -> str:
    """STAGE/step-N of the last stage's result, by the stage's closing summary."""
    return f"{config.stages[-1]}/{summary['checkpoint']}"


def make_forecasts(
    config: VisionLLMConfig, policy: PolicyModel, city: CityWindows, writer: ForecastWriter
) -> list[str]:
    """Forecasts every window that the writer lacks. Returns what a reader of them should know: values that the frames
    could not show."""
    with progress_bar("forecast", unit="cells") as progress:
        forecast_windows(policy, city, config.forecast, config.seed, writer, progress)
    if not writer.counts["clipped"]:
        return []
    return [f"{writer.counts['clipped']} values in the windows' frames exceed t_max and were drawn as t_max"]


def forecast(
    run_dir: Path, store_path: Path, region: str | None, split: str, out: Path, log: Callable[[str], None]
) -> dict[str, Any]:
    """``stdist forecast``: the run's final policy on any store, also another city's grid (its own t_max stays).

    ``split``: a name (the run's own days on the store it was trained on, else the store's default split) or local days
    ``A:B``. The same command run again goes on where a killed one was. Raises InputError for an unfinished run, a
    region outside the grid, days without windows, another suffix of ``out`` than .zarr or .parquet.
    """
    config = read_run_config(run_dir)
    assert isinstance(config, VisionLLMConfig)
    stage = config.stages[-1]
    finished = StageCheckpoints(run_dir / "checkpoints" / stage).finished
    if finished is None:
        raise InputError(f"{run_dir} has not finished its stage {stage}; run `stdist train` on its config again")
    checkpoint = checkpoint_name(config, finished)
    with damage_as_input_error(run_dir / "checkpoints" / checkpoint):
        policy = load_policy(run_dir / "checkpoints" / checkpoint)
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    store = open_store(store_path)
    retarget(policy, store)
    setting, wanted = policy.spec.setting, region or config.data.region
    days = store.default_split
    if config.data.split and config.data.store.resolve() == store_path.resolve():
        days = Split.parse(**config.data.split.model_dump(mode="json"))
    windows = store.windows(
        DaySpan.parse(split) if ":" in split else span_of(days, split, store),
        setting.history,
        setting.horizon,
        channel=setting.channel,
        region=Region.parse(wanted) if wanted else None,
        history_inside=split == "train",
        name=split if ":" not in split else "span",
    )
    clamped = find_unwritable([windows], policy.vocabulary, config.numerals.out_of_range == "clamp")
    log(windows.contract)
    if found := leaks(policy.spec.fitted, windows.span, data_digest(store, windows.channel)):
        log(f"note: {leak_line(found, windows.span)}; `stdist evaluate` will not score these forecasts")
    city = CityWindows(policy, windows, config.numerals.out_of_range == "clamp")
    with open_writer(config, city, finished, out, log) as writer:
        notes = make_forecasts(config, policy, city, writer)
        writer.finish()
    for note in [clamped, *notes] if clamped else notes:
        log(note)
    return {"out": str(out), "windows": len(windows), "checkpoint": checkpoint}


def retarget(policy: PolicyModel, store: GridStore) -> None:
    """Points a policy at a store's city, cadence and grid; t_max, in the data's units, stays the training city's."""
    spec, (height, width) = policy.spec, store.shape
    frames = spec.frames
    if frames and (frames.height, frames.width) != (height, width):
        # An enlargement chosen for another grid could make frames of thousands of tokens.
        scale = pixels_per_cell(height, width)
        frames = frames.model_copy(update={"height": height, "width": width, "pixels_per_cell": scale})
    here = {"city": store.city, "cadence": cadence_minutes(store), "first_cell": first_cell(store)}
    setting = spec.setting.model_copy(update=here)
    policy.set_task(spec.model_copy(update={"setting": setting, "frames": frames}))
