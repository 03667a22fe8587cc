"""The plan of a run: memory, operations and communication of every stage, before anything starts.

Knows no system: a recipe says of each stage what it trains, holds, computes and sends, and what to try where it does
not fit.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from rich.console import Group as Lines
from rich.table import Table

from stdist.runs import memory_plan
from stdist.runs.devices import Device
from stdist.runs.memory_plan import Ranks, StateBytes, Weights
from stdist.training.engine import ParameterGroup

UNITS = {"GiB": 2**30, "MiB": 2**20}
Changes = dict[str, Any]
WITH_GRADIENTS = "training", "update"
"""Phases of a step in which plain torch holds gradients."""
WITHOUT = "gradients, not held then"


@dataclass(frozen=True)
class StagePlan:
    """A step of one stage on one learner.

    Attributes:
        trainable: what of the model trains, in a word.
        weights: all it has, each kind once.
        phases: bytes that are held in turn, never together, beside weights and their states: by phase and by what.
        bytes_sent: by collective.
        counts: what else there is to say of a step, by name, such as ``tokens_per_learner``.
        device: what computes it; None where a step is not bound by operations.
    """

    stage: str
    trainable: str
    ranks: Ranks
    weights: Sequence[Weights]
    phases: Mapping[str, Mapping[str, float]]
    flops: float
    bytes_sent: Mapping[str, float]
    counts: Mapping[str, Any]
    device: Device | None = None

    @property
    def states(self) -> dict[str, StateBytes]:
        return {w.kind: memory_plan.state_bytes(w, self.ranks) for w in self.weights}

    @property
    def buffers(self) -> dict[str, float]:
        """Bytes beside weights and their states in the phase that takes most, less the gradients that it has not."""
        phases = {name: {**held, WITHOUT: -self._gradients_dropped(name)} for name, held in self.phases.items()}
        phase, held = max(phases.items(), key=lambda item: sum(item[1].values()))
        bucket = {"gradient bucket": memory_plan.bucket_bytes(self.weights, self.ranks)}
        return bucket | {f"{phase}: {what}": size for what, size in held.items() if size}

    def _gradients_dropped(self, phase: str) -> float:
        """Plain torch has gradients between a step's first backward pass and its update."""
        if self.ranks.zero_stage or phase in WITH_GRADIENTS:
            return 0
        return sum(state.gradients for state in self.states.values())

    @property
    def device_bytes(self) -> float:
        return sum(state.device for state in self.states.values()) + sum(self.buffers.values())

    @property
    def host_bytes(self) -> float:
        return sum(state.host for state in self.states.values())

    @property
    def seconds(self) -> dict[str, float]:
        """On paper; empty where a step is not bound by operations."""
        if self.device is None:
            return {}
        return {
            "compute_seconds": self.flops / self.device.sustained,
            "communication_seconds": memory_plan.communication_seconds(self.bytes_sent, self.ranks.world_size),
        }

    def as_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "trainable": self.trainable,
            "parameters": sum(w.count for w in self.weights),
            "trainable_parameters": sum(w.count for w in self.weights if w.trainable),
            "bytes": {kind: vars(state) for kind, state in self.states.items()} | self.buffers,
            "phases": {phase: dict(held) for phase, held in self.phases.items()},
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            **self.counts,
            "flops_per_learner": self.flops,
            "bytes_sent": dict(self.bytes_sent),
            **self.seconds,
        }


@dataclass(frozen=True)
class Hours:
    """Hours of a stage, or of another part of a run, on paper."""

    steps: int
    seconds_per_step: float
    evaluations: int
    seconds_per_evaluation: float

    @property
    def training(self) -> float:
        return self.steps * self.seconds_per_step / 3600

    @property
    def validation(self) -> float:
        return self.evaluations * self.seconds_per_evaluation / 3600

    @property
    def all(self) -> float:
        return self.training + self.validation


@dataclass(frozen=True)
class RunPlan:
    """Every stage of a run; ``verdicts`` say whether each fits, where a device's memory was given. ``hours``: of its
    parts, by name; none where steps are not bound by operations."""

    stages: Sequence[StagePlan]
    verdicts: Sequence[str]
    notes: Sequence[str]
    hours: Mapping[str, Hours] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        verdicts = self.verdicts or [""] * len(self.stages)
        stages = [stage.as_dict() | {"verdict": v} for stage, v in zip(self.stages, verdicts, strict=True)]
        parts = {
            name: vars(part) | {"training_hours": part.training, "validation_hours": part.validation, "hours": part.all}
            for name, part in self.hours.items()
        }
        return {
            "learners": vars(self.stages[0].ranks),
            "stages": stages,
            "parts": parts,
            "hours": sum(part.all for part in self.hours.values()),
            "notes": self.notes,
        }

    def as_tables(self) -> Lines:
        tables = [*map(_memory_table, self.stages), _step_table(self.stages)]
        return Lines(*tables, *([_hours_table(self.hours)] if self.hours else []))


def update_bytes(groups: Iterable[ParameterGroup], ranks: Ranks) -> float:
    """Temporaries of the optimizer's step on a device. It updates in place; ZeRO's ranks update their part of each
    group as one flat tensor, from float32 copies of its gradients."""
    if ranks.offload_optimizer or not ranks.zero_stage:
        return 0
    counts = [sum(p.numel() for p in group.parameters.values()) for group in groups]
    return max((torch.float32.itemsize * ceil(count / ranks.world_size) for count in counts), default=0)


def verdict(
    plan: StagePlan,
    device_memory: int,
    changes: Iterable[Changes],
    replan: Callable[[Changes], StagePlan | None],
    otherwise: str,
) -> str:
    """A line that says whether the stage fits into ``device_memory`` bytes, and if not, with what it would.

    Args:
        changes: settings by their key in the configuration, in the order of what they cost.
        replan: the stage with other settings; None where such a run could not be trained.
        otherwise: advice where no change is enough.
    """
    unit = "GiB" if device_memory >= UNITS["GiB"] else "MiB"

    def size(count: float) -> str:
        return f"{count / UNITS[unit]:,.1f} {unit}"

    def fits(candidate: StagePlan | None) -> bool:
        return candidate is not None and candidate.device_bytes <= device_memory

    stage = f"{plan.stage}: {size(plan.device_bytes)} of {size(device_memory)}"
    if fits(plan):
        return f"{stage}, fits"
    taken: list[Changes] = []
    best = plan
    for change in changes:
        smaller = replan(_merged([*taken, change]))
        if smaller and smaller.device_bytes < best.device_bytes:
            taken, best = [*taken, change], smaller
        if fits(best):
            break
    for change in taken[:-1]:  # a later one may have made it needless
        fewer = [other for other in taken if other is not change]
        if (smaller := replan(_merged(fewer))) and fits(best) and fits(smaller):
            taken, best = fewer, smaller
    advice = " ".join(f"{key}={str(value).lower()}" for key, value in _merged(taken).items())
    if fits(best):
        return f"{stage}, does not fit: try {advice}, {size(best.device_bytes)}"
    tried = f" {size(best.device_bytes)} with {advice};" if advice else ""
    return f"{stage}, does not fit:{tried} {otherwise}"


def _merged(changes: Iterable[Changes]) -> Changes:
    return {key: value for change in changes for key, value in change.items()}


def _memory_table(plan: StagePlan) -> Table:
    unit = "GiB" if plan.device_bytes >= UNITS["GiB"] else "MiB"
    ranks = plan.ranks
    how = f"ZeRO-{ranks.zero_stage}" if ranks.zero_stage else "plain torch"
    title = f"{plan.stage}: trains {plan.trainable}, {ranks.world_size} x {how}; {unit} of one learner"
    table = Table("", title=title, title_justify="left")
    for column in ("million", "weights", "gradients", "optimizer", "CPU", "all"):
        table.add_column(column, justify="right")

    def size(count: float) -> str:
        return f"{count / UNITS[unit]:.2f}" if count else ""

    for weights in plan.weights:
        state = plan.states[weights.kind]
        sizes = (state.weights, state.gradients, state.optimizer, state.host, state.device)
        table.add_row(weights.kind, f"{weights.count / 1e6:,.1f}", *map(size, sizes))
    for what, count in plan.buffers.items():
        if count:
            table.add_row(what, *[""] * 5, size(count))
    table.add_row("all", *[""] * 4, size(plan.host_bytes), size(plan.device_bytes), style="bold")
    return table


def _step_table(stages: Sequence[StagePlan]) -> Table:
    table = Table("", *(plan.stage for plan in stages), title="One learner's share of a step", title_justify="left")
    rows: dict[str, list[str]] = {}
    for plan in stages:
        figures = {**plan.counts, "TFLOP": plan.flops / 1e12, "GB sent": sum(plan.bytes_sent.values()) / 1e9}
        for name, figure in (figures | plan.seconds).items():
            text = " / ".join(map(str, figure)) if isinstance(figure, list) else f"{figure:,.4g}"
            rows.setdefault(name.replace("_", " "), []).append(f"{figure:,}" if isinstance(figure, int) else text)
    for name, texts in rows.items():
        table.add_row(name, *texts)
    return table


def _hours_table(hours: Mapping[str, Hours]) -> Table:
    table = Table("", title="Hours of the run: training, validation, together", title_justify="left")
    for column in ("steps", "s a step", "h", "evaluations", "s each", "h", "all h"):
        table.add_column(column, justify="right")
    for name, part in hours.items():
        figures = (part.seconds_per_step, part.training, part.seconds_per_evaluation, part.validation, part.all)
        step, training, evaluation, validation, together = (f"{figure:,.3g}" for figure in figures)
        of_steps = (f"{part.steps:,}", step, training) if part.steps else ("", "", "")
        table.add_row(name, *of_steps, f"{part.evaluations:,}", evaluation, validation, together)
    table.add_row("all", *[""] * 6, f"{sum(part.all for part in hours.values()):,.3g}", style="bold")
    return table
