"""ST-Vision-LLM from a configuration to a scored forecast: open, train the stages, forecast, evaluate, report.

Every step is skipped when its result is already in the run folder, so the same command run again resumes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from stdist.config import Config, StageConfig, dump_config
from stdist.errors import InputError
from stdist.files import write_atomically
from stdist.training.checkpoint import StageCheckpoints
from stdist.training.engine import ParameterGroup, TorchEngine, cosine_schedule
from stdist.training.loop import LoopSettings, Stage, run_stage
from stdist.training.run_log import RunLog
from stdist.vision_llm.alignment import AlignmentStage
from stdist.vision_llm.checkpoints import build_policy, load_weights, save_policy
from stdist.vision_llm.city_windows import CityWindows
from stdist.vision_llm.grpo import GRPOStage
from stdist.vision_llm.numeral_range import find_unwritable
from stdist.vision_llm.policy import Policy
from stdist.vision_llm.sampler import Decoding
from stdist.vision_llm.scoring import forecast_and_score, stage_sentence
from stdist.vision_llm.sft import SFTStage
from stdist.vision_llm.task import Task, open_task, policy_spec, stage_config

STORE_DIGEST = (
    "store_digest"  # in the run folder: the data it was trained on, which the same path may not hold for ever
)


def train(config: Config, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs or resumes everything ``config`` names. Returns the test metrics, the stages' summaries and paths.

    ``say`` is given a line for people at each milestone.
    """
    task = open_task(config)
    run_dir = config.run_dir
    refuse_foreign_folder(run_dir, config, task.store.digest)
    policy = build_policy(policy_spec(config, task), config.seed)
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    clamped = find_unwritable(
        (task.train, task.validation, task.test), policy.vocabulary, config.numerals.out_of_range == "clamp"
    )
    # Nothing is written before all of the input is known to be good.
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / STORE_DIGEST, task.store.digest)
    write_atomically(run_dir / "config.yaml", dump_config(config))
    say(f"run {run_dir}: {task.store.city}, {len(task.train)} training windows")
    say(f"attention: {policy.attention_choice.reason}")
    if clamped:
        say(clamped)
    summaries = train_stages(config, task, policy, say)
    result = forecast_and_score(config, task, policy, summaries, [clamped] if clamped else [], say)
    return {"run": str(run_dir), "stages": summaries, **result}


def refuse_foreign_folder(run_dir: Path, config: Config, store_digest: str) -> None:
    """Raises InputError where the folder belongs to another configuration, naming a difference, or to other data."""
    path = run_dir / "config.yaml"
    if path.exists():
        difference = _first_difference(yaml.safe_load(path.read_text()), yaml.safe_load(dump_config(config)))
        if difference:
            raise InputError(f"{run_dir} belongs to another config ({difference}); choose another name= or delete it")
    known = run_dir / STORE_DIGEST
    if known.exists() and known.read_text() != store_digest:
        there, here = known.read_text()[:12], store_digest[:12]
        raise InputError(
            f"{run_dir} was trained on other data: {config.data.store} had digest {there}… then, {here}… now; "
            "choose another name= or delete it"
        )


def _first_difference(old: Any, new: Any, key: str = "") -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(n for n in new if n not in old)]:
            found = _first_difference(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
            if found:
                return found
        return None
    return None if old == new else f"{key} is {old!r} there, {new!r} here"


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
            facts={"device": str(policy.device), "attention": policy.attention_choice.reason},
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
