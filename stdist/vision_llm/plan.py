"""The plan of a run: memory, operations and communication of every stage, and what to change where it does not fit."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from rich.console import Group as Lines
from rich.table import Table

from stdist.errors import InputError
from stdist.runs import memory_plan
from stdist.runs.memory_plan import Ranks, StateBytes, Weights
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import ForecastStageConfig, VisionLLMConfig
from stdist.vision_llm.dataset import stage_config
from stdist.vision_llm.model_counts import read_base, read_shape, stage_weights
from stdist.vision_llm.policy.presets import SHAPES
from stdist.vision_llm.recipe import check_learners
from stdist.vision_llm.step_counts import Work, ranks_of, stage_work

GIB = 2**30


@dataclass(frozen=True)
class StagePlan:
    """A step of one stage on one learner: bytes by kind, operations, and what it sends."""

    stage: str
    trainable: str
    ranks: Ranks
    weights: list[Weights]
    states: dict[str, StateBytes]
    bucket: float
    work: Work
    traffic: dict[str, float]
    compute_seconds: float

    @property
    def peak(self) -> tuple[str, dict[str, float]]:
        """The larger phase: its name, and what it holds besides weights and their states."""
        return max(self.work.phases.items(), key=lambda phase: sum(phase[1].values()))

    @property
    def device_bytes(self) -> float:
        return sum(state.device for state in self.states.values()) + self.bucket + sum(self.peak[1].values())

    @property
    def host_bytes(self) -> float:
        return sum(state.host for state in self.states.values())

    @property
    def communication_seconds(self) -> float:
        return memory_plan.communication_seconds(self.traffic, self.ranks.world_size)

    def as_dict(self) -> dict[str, Any]:
        phase, held = self.peak
        return {
            "stage": self.stage,
            "trainable": self.trainable,
            "parameters": sum(w.count for w in self.weights),
            "trainable_parameters": sum(w.count for w in self.weights if w.trainable),
            "bytes": {kind: vars(state) for kind, state in self.states.items()}
            | {"gradient bucket": self.bucket}
            | {f"{phase}: {what}": size for what, size in held.items()},
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "micro_batches": self.work.micro_batches,
            "tokens_per_learner": self.work.tokens,
            "flops_per_learner": self.work.flops,
            "bytes_sent": self.traffic,
            "compute_seconds": self.compute_seconds,
            "communication_seconds": self.communication_seconds,
        }


def plan_stage(config: VisionLLMConfig, stage: str, device_flops: float = memory_plan.PEAK_FLOPS) -> StagePlan:
    """One stage of a run, from its configuration alone.

    Raises InputError where the base's configuration cannot be read or the store holds no such grid or region.
    """
    base, ranks = read_base(config.policy.base), ranks_of(config)
    weights = stage_weights(config, stage, base)
    work = stage_work(config, stage, base, weights, read_shape(config))
    return StagePlan(
        stage,
        stage_config(config, stage).trainable,
        ranks,
        weights,
        {w.kind: memory_plan.state_bytes(w, ranks) for w in weights},
        memory_plan.bucket_bytes(weights, ranks),
        work,
        memory_plan.traffic(weights, ranks, work.walks, work.backwards),
        memory_plan.compute_seconds(work.flops, device_flops),
    )


@dataclass(frozen=True)
class RunPlan:
    """Every stage of a run; ``verdicts`` say whether each fits, where a device's memory was given."""

    stages: list[StagePlan]
    verdicts: list[str]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        verdicts = self.verdicts or [""] * len(self.stages)
        stages = [stage.as_dict() | {"verdict": v} for stage, v in zip(self.stages, verdicts, strict=True)]
        return {"learners": vars(self.stages[0].ranks), "stages": stages, "notes": self.notes}

    def as_tables(self) -> Lines:
        return Lines(*map(_memory_table, self.stages), _step_table(self.stages))


def plan_run(
    config: VisionLLMConfig, device_memory: int | None, device_flops: float = memory_plan.PEAK_FLOPS
) -> RunPlan:
    """``device_memory`` (bytes) and ``device_flops`` (peak a second) are of one learner's. See :func:`plan_stage`.

    Raises InputError also where the learners cannot share a stage's batch, or their engine cannot train this policy.
    """
    check_learners(config, ProcessGroup(0, config.learners.num_workers))
    stages = [plan_stage(config, stage, device_flops) for stage in config.stages]
    verdicts = [] if device_memory is None else [_verdict(config, stage, device_memory) for stage in stages]
    notes = [
        *read_shape(config).notes,
        f"seconds are on paper: {device_flops / 1e12:.0f} TFLOP/s at an assumed MFU of {memory_plan.MFU:.0%}, "
        f"{memory_plan.bandwidth(config.learners.num_workers) / 1e9:.0f} GB/s between learners, nothing overlapped",
    ]
    if "grpo" in config.stages:
        notes.append(
            "sampling is counted by its operations; its steps of one token are bound by memory and take longer"
        )
    return RunPlan(stages, verdicts, notes)


def _verdict(config: VisionLLMConfig, plan: StagePlan, device_memory: int) -> str:
    of = f"{plan.stage}: {plan.device_bytes / GIB:.1f} GiB of {device_memory / GIB:.1f}"
    if plan.device_bytes <= device_memory:
        return f"{of}, fits"
    changes, smaller = _smaller(config, plan, device_memory)
    advice = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
    if smaller.device_bytes <= device_memory:
        return f"{of}, does not fit: try {advice}, {smaller.device_bytes / GIB:.1f} GiB"
    tried = f" {smaller.device_bytes / GIB:.1f} GiB with {advice};" if advice else ""
    return f"{of}, does not fit:{tried} take a larger device or a smaller base"


def _smaller(config: VisionLLMConfig, plan: StagePlan, device_memory: int) -> tuple[dict[str, Any], StagePlan]:
    """The first changes, in the order of what they cost, under which the stage fits; none of them needless."""
    kept: list[dict[str, Any]] = []
    best = plan
    for change in _changes(config, plan.stage):
        changed = _changed(config, [*kept, change])
        if changed is None:
            continue
        candidate = plan_stage(changed, plan.stage)
        if candidate.device_bytes < best.device_bytes:
            kept, best = [*kept, change], candidate
        if best.device_bytes <= device_memory:
            break
    for change in list(kept[:-1]):
        fewer = [other for other in kept if other is not change]
        changed = _changed(config, fewer)
        if changed and (candidate := plan_stage(changed, plan.stage)).device_bytes <= device_memory:
            kept, best = fewer, candidate
    return {key: value for change in kept for key, value in change.items()}, best


def _changes(config: VisionLLMConfig, stage: str) -> Iterator[dict[str, Any]]:
    settings, learners = stage_config(config, stage), config.learners
    if isinstance(settings, ForecastStageConfig):
        yield {f"{stage}.activation_memory": min(1.0, settings.activation_memory)}
    else:
        yield {f"{stage}.gradient_accumulation_steps": getattr(config, stage).train_batch_size // learners.num_workers}
    yield {"policy.gradient_checkpointing": True}
    if learners.num_workers > 1:
        yield {"learners.zero_stage": 2}
        yield {"learners.zero_stage": 3}
    if config.policy.base not in SHAPES and all(stage_config(config, s).trainable != "full" for s in config.stages):
        yield {"policy.load_in_4bit": True}
    yield {"learners.engine": "deepspeed", "learners.offload_optimizer": True}
    yield {"numerals.mantissa_digits": 3}


def _changed(config: VisionLLMConfig, changes: list[dict[str, Any]]) -> VisionLLMConfig | None:
    """None where such a configuration could not be trained."""
    tree = config.model_dump(mode="json")
    for change in changes:
        for path, value in change.items():
            section, key = path.split(".")
            tree[section][key] = value
    try:
        changed = VisionLLMConfig.model_validate(tree)
        check_learners(changed, ProcessGroup(0, changed.learners.num_workers))
    except (ValidationError, InputError):
        return None
    return changed


def _memory_table(plan: StagePlan) -> Table:
    ranks, (phase, held) = plan.ranks, plan.peak
    how = f"ZeRO-{ranks.zero_stage}" if ranks.zero_stage else "plain torch"
    title = f"{plan.stage}: trains {plan.trainable}, {ranks.world_size} x {how}; GiB of one learner"
    table = Table("", title=title, title_justify="left")
    for column in ("million", "weights", "gradients", "optimizer", "CPU", "all"):
        table.add_column(column, justify="right")
    for weights in plan.weights:
        state = plan.states[weights.kind]
        sizes = (state.weights, state.gradients, state.optimizer, state.host, state.device)
        table.add_row(weights.kind, f"{weights.count / 1e6:,.1f}", *map(_gib, sizes))
    others = {"gradient bucket": plan.bucket} | {f"{phase}: {what}": size for what, size in held.items()}
    for what, size in others.items():
        if size:
            table.add_row(what, *[""] * 5, _gib(size))
    table.add_row("all", *[""] * 4, _gib(plan.host_bytes), _gib(plan.device_bytes), style="bold")
    return table


def _step_table(stages: list[StagePlan]) -> Table:
    table = Table("", title="One learner's share of a step", title_justify="left")
    for column in ("tokens", "at once", "TFLOP", "seconds", "GB sent", "seconds"):
        table.add_column(column, justify="right")
    for plan in stages:
        work, sent = plan.work, sum(plan.traffic.values())
        table.add_row(
            plan.stage,
            f"{work.tokens:,}",
            " / ".join(map(str, work.micro_batches)),
            f"{work.flops / 1e12:,.3g}",
            f"{plan.compute_seconds:.3g}",
            f"{sent / 1e9:.3g}",
            f"{plan.communication_seconds:.3g}",
        )
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size else ""
