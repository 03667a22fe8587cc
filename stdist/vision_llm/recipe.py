"""ST-Vision-LLM from a configuration to a scored forecast: open, train the stages, forecast, evaluate, report.

Every step is skipped when its result is already in the run folder, so the same command run again resumes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.progress import Progress

from stdist.config import Config, StageConfig, dump_config, load_config
from stdist.data import DaySpan, GridStore, Region, Split, Statistics, Windows, open_store
from stdist.errors import InputError
from stdist.evaluation import (
    ForecastMetadata,
    Forecasts,
    build_report,
    evaluate,
    forecast_contract,
    score_baselines,
    write_forecasts,
    write_metrics,
)
from stdist.training.checkpoint import StageCheckpoints, naming_damage, write_atomically
from stdist.training.engine import ParameterGroup, TorchEngine, cosine_schedule
from stdist.training.loop import LoopSettings, Stage, run_stage
from stdist.training.run_log import RunLog
from stdist.vision_llm.alignment import AlignmentStage
from stdist.vision_llm.checkpoints import build_policy, load_policy, load_weights, save_policy
from stdist.vision_llm.city_windows import CityWindows
from stdist.vision_llm.forecaster import forecast_windows
from stdist.vision_llm.frames import pixels_per_cell
from stdist.vision_llm.grpo import GRPOStage
from stdist.vision_llm.numeral_range import find_unwritable
from stdist.vision_llm.policy import Policy
from stdist.vision_llm.presets import SHAPES
from stdist.vision_llm.sampler import Decoding
from stdist.vision_llm.sft import SFTStage
from stdist.vision_llm.spec import FrameSpec, PolicySpec, Setting


@dataclass
class Task:
    """The data side of a run: windows of the three splits and what the training span says of the channel."""

    store: GridStore
    train: Windows
    validation: Windows
    test: Windows
    statistics: Statistics


def open_task(config: Config) -> Task:
    """Opens the store and its windows. Raises InputError for a region, channel, split or window that cannot be."""
    data = config.data
    store = open_store(data.store)
    split = Split.parse(**data.split.model_dump(mode="json")) if data.split else store.default_split
    region = Region.parse(data.region) if data.region else Region(0, store.shape[0], 0, store.shape[1])
    fitted_on = span_of(split, "train", store).fraction(data.fraction)

    def windows(name: str) -> Windows:
        span = fitted_on if name == "train" else span_of(split, name, store)
        return store.windows(
            span,
            data.history,
            data.horizon,
            channel=data.channel,
            region=region,
            history_inside=name == "train",
            name=name,
        )

    return Task(
        store,
        train=windows("train"),
        validation=windows("validation"),
        test=windows("test"),
        statistics=store.statistics(data.channel, fitted_on),
    )


def span_of(split: Split, name: str, store: GridStore) -> DaySpan:
    span = getattr(split, name, None)
    if span is None:
        raise InputError(f"{store.path} has no {name} days; set data.split, or give local days A:B")
    return span


def policy_spec(config: Config, task: Task) -> PolicySpec:
    height, width = task.store.shape
    scale = config.frames.pixels_per_cell
    frames = FrameSpec(
        height=height,
        width=width,
        pixels_per_cell=pixels_per_cell(height, width) if scale == "auto" else scale,
        power=config.frames.power,
        t_max=task.statistics.maximum,
    )
    return PolicySpec(
        base=config.policy.base,
        dtype=config.policy.dtype,
        mantissa_digits=config.numerals.mantissa_digits,
        setting=Setting(
            city=task.store.city,
            channel=config.data.channel,
            cadence=cadence_minutes(task.store),
            history=config.data.history,
            horizon=config.data.horizon,
        ),
        frames=frames if config.frames.enabled else None,
        # A preset's base is nowhere to be downloaded from: its checkpoints carry it, trained or not.
        base_is_trained=config.policy.base in SHAPES
        or any(stage_config(config, name).trainable == "full" for name in config.stages),
        lora_r=config.policy.lora_r,
        lora_alpha=config.policy.lora_alpha,
    )


def cadence_minutes(store: GridStore) -> int:
    return int(store.cadence / np.timedelta64(1, "m"))


def stage_config(config: Config, name: str) -> StageConfig:
    return getattr(config, name)


def train(config: Config, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs or resumes everything ``config`` names. Returns the test metrics, the stages' summaries and paths.

    ``say`` is given a line for people at each milestone.
    """
    task = open_task(config)
    run_dir = config.run_dir
    refuse_foreign_folder(run_dir, config)
    policy = build_policy(policy_spec(config, task), config.seed)
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    clamped = find_unwritable(
        (task.train, task.validation, task.test), policy.vocabulary, config.numerals.out_of_range == "clamp"
    )
    # Nothing is written before all of the input is known to be good.
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "config.yaml", dump_config(config))
    say(f"run {run_dir}: {task.store.city}, {len(task.train)} training windows")
    if clamped:
        say(clamped)
    summaries = train_stages(config, task, policy, say)
    result = forecast_and_score(config, task, policy, summaries, say)
    return {"run": str(run_dir), "stages": summaries, **result}


def refuse_foreign_folder(run_dir: Path, config: Config) -> None:
    """Raises InputError where the folder belongs to another configuration, naming a difference."""
    path = run_dir / "config.yaml"
    if path.exists():
        difference = _first_difference(yaml.safe_load(path.read_text()), yaml.safe_load(dump_config(config)))
        if difference:
            raise InputError(f"{run_dir} belongs to another config ({difference}); choose another name= or delete it")


def _first_difference(old: Any, new: Any, key: str = "") -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(n for n in new if n not in old)]:
            found = _first_difference(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
            if found:
                return found
        return None
    return None if old == new else f"{key} is {old!r} there, {new!r} here"


# --- stages ----------------------------------------------------------------------------------------------------


def train_stages(config: Config, task: Task, policy: Policy, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """All stages in order on one policy; finished ones are only loaded. Returns each stage's closing summary."""
    log = RunLog(config.run_dir)
    clamp = config.numerals.out_of_range == "clamp"
    cities = [CityWindows(policy, windows, clamp) for windows in (task.train, task.validation)]
    summaries: dict[str, dict[str, Any]] = {}
    for name in config.stages:
        settings = stage_config(config, name)
        stage = _build_stage(config, name, task, policy, *cities)
        engine = TorchEngine(
            parameter_groups(policy, settings),
            cosine_schedule(settings.warmup_steps, settings.max_steps),
            settings.max_grad_norm,
        )
        summaries[name] = run_stage(
            stage,
            engine,
            LoopSettings(
                settings.max_steps,
                settings.logging_steps,
                settings.save_steps,
                settings.eval_steps,
                patience=getattr(settings, "patience", None),
            ),
            StageCheckpoints(config.run_dir / "checkpoints" / name),
            log,
            write_model=lambda path: save_policy(policy, path),
            read_model=lambda path: load_weights(policy, path),
        )
        say(stage_sentence(summaries[name]))
    log.close()
    return summaries


def _build_stage(
    config: Config, name: str, task: Task, policy: Policy, train: CityWindows, validation: CityWindows
) -> Stage:
    decoding = _validation_decoding(config)
    if name == "grpo":
        policy.begin_grpo(config.seed)
        region = task.train.region
        cell_mean = task.statistics.cell_mean[region.slices].ravel()
        return GRPOStage(policy, train, validation, cell_mean, config.grpo, config.seed, decoding)
    settings = stage_config(config, name)
    if settings.trainable == "lora" and not policy.adapters:
        policy.add_lora(seed=config.seed)
    policy.train_only(settings.trainable)
    if name == "sft":
        return SFTStage(policy, train, validation, config.sft, config.seed, decoding)
    return AlignmentStage(name, policy, getattr(config, name), config.seed)


def _validation_decoding(config: Config) -> Decoding:
    """What validation decodes with: the run's own decoding, the median where that one samples."""
    return "median" if config.forecast.decoding == "sample" else config.forecast.decoding


def parameter_groups(policy: Policy, settings: StageConfig) -> list[ParameterGroup]:
    """Backbone or adapter matrices, their vectors (never decayed), and the numeral rows at their own rate."""
    backbone = [p for p in policy.backbone.parameters() if p.requires_grad]
    rows_rate = settings.numeral_learning_rate or settings.learning_rate
    return [
        ParameterGroup([p for p in backbone if p.ndim > 1], settings.learning_rate, settings.weight_decay),
        ParameterGroup([p for p in backbone if p.ndim <= 1], settings.learning_rate, 0.0),
        ParameterGroup([p for p in policy.rows.parameters() if p.requires_grad], rows_rate, 0.0),
    ]


def stage_sentence(summary: dict[str, Any]) -> str:
    """What a stage bought, in a line."""
    names = {
        "alignment": ["exact_match"],
        "arithmetic": ["loss", "exact_match", "median_relative_error"],
        "sft": ["nrmse"],
        "grpo": ["nrmse", "reward"],
    }[summary["stage"]]
    changes = ", ".join(f"{n} {summary['before'][n]:.4f} → {summary['after'][n]:.4f}" for n in names)
    return f"{summary['stage']}: {changes} ({summary['steps']} steps, {summary['seconds']:.0f} s)"


# --- forecast, evaluate, report --------------------------------------------------------------------------------


def forecast_and_score(
    config: Config, task: Task, policy: Policy, summaries: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """Forecasts the test windows, scores them beside the baselines, writes ``report/``."""
    run_dir, path = config.run_dir, config.run_dir / "forecasts" / "test.zarr"
    checkpoint = f"{config.stages[-1]}/{summaries[config.stages[-1]]['checkpoint']}"
    notes_path = path.parent / "notes.txt"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with progress_bar("forecast", len(task.test)) as advance:
            forecasts, notes = make_forecasts(config, policy, task.test, checkpoint, advance)
        write_atomically(notes_path, "".join(f"{note}\n" for note in notes))
        write_forecasts(forecasts, path)
    notes = notes_path.read_text().splitlines()
    for note in notes:
        say(note)
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
        "notes": notes,
    }
    write_metrics(run_dir, metrics)
    page = build_report(run_dir)
    nrmse = {name: scores["pooled"]["nrmse"] for name, scores in baselines.items()}
    say(
        f"test NRMSE {scores['pooled']['nrmse']:.4f}; "
        + ", ".join(f"{name} {value:.4f}" for name, value in nrmse.items())
    )
    return {"test": scores["pooled"], "baselines": nrmse, "report": str(page)}


def make_forecasts(
    config: Config,
    policy: Policy,
    windows: Windows,
    checkpoint: str,
    advance: Callable[[int], None],
) -> tuple[Forecasts, list[str]]:
    """Forecasts of every window, ready to be written, with run, checkpoint and contract; and what a reader of them
    should know: values that the numerals or the frames could not show."""
    city = CityWindows(policy, windows, config.numerals.out_of_range == "clamp")
    values, quantiles = forecast_windows(policy, city, config.forecast, config.seed, advance)
    forecasts = Forecasts(
        values=values,
        origins=windows.origin_times,
        cell_ids=windows.store.cell_ids[windows.region.slices],
        metadata=ForecastMetadata(run=config.name, checkpoint=checkpoint, contract=forecast_contract(windows)),
        quantiles=quantiles,
    )
    notes = []
    if city.clipped:
        notes.append(f"{city.clipped} values in the windows' frames exceed t_max and were drawn as t_max")
    if city.clamped:
        notes.append(f"{city.clamped} values had no numeral and were clamped to the largest one")
    return forecasts, notes


def forecast(
    run_dir: Path, store_path: Path, region: str | None, split: str, out: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """``stdist forecast``: the run's final policy on any store, also another city's grid (its own t_max stays).

    ``split``: a name (the run's own days on the store it was trained on, else the store's default split) or local days
    ``A:B``. Raises InputError for an unfinished run, a region outside the grid, days without windows.
    """
    if not (run_dir / "config.yaml").is_file():
        raise InputError(f"{run_dir} is no run folder, it has no config.yaml; name the folder of a `stdist train`")
    config = load_config(run_dir / "config.yaml")
    stage = config.stages[-1]
    finished = StageCheckpoints(run_dir / "checkpoints" / stage).finished
    if finished is None:
        raise InputError(f"{run_dir} has not finished its stage {stage}; run `stdist train` on its config again")
    checkpoint = f"{stage}/{finished['checkpoint']}"
    with naming_damage(run_dir / "checkpoints" / checkpoint):
        policy = load_policy(run_dir / "checkpoints" / checkpoint)
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    store = open_store(store_path)
    retarget(policy, store, config)
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
    find_unwritable([windows], policy.vocabulary, config.numerals.out_of_range == "clamp")
    say(f"{windows.contract}")
    with progress_bar("forecast", len(windows)) as advance:
        forecasts, notes = make_forecasts(config, policy, windows, checkpoint, advance)
    write_forecasts(forecasts, out)
    for note in notes:
        say(note)
    return {"out": str(out), "windows": len(windows), "checkpoint": checkpoint}


def retarget(policy: Policy, store: GridStore, config: Config) -> None:
    """Points a policy at a store's city, cadence and grid; t_max, in the data's units, stays the training city's."""
    spec, (height, width) = policy.spec, store.shape
    frames = spec.frames
    if frames and (frames.height, frames.width) != (height, width):
        scale = config.frames.pixels_per_cell
        scale = pixels_per_cell(height, width) if scale == "auto" else scale
        frames = frames.model_copy(update={"height": height, "width": width, "pixels_per_cell": scale})
    setting = spec.setting.model_copy(update={"city": store.city, "cadence": cadence_minutes(store)})
    policy.set_task(spec.model_copy(update={"setting": setting, "frames": frames}))


@contextmanager
def progress_bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    # Standard output is for results.
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total)
        yield lambda done: progress.advance(task, done)
