"""The loop every stage runs in: step, log, evaluate, checkpoint, resume, stop.

Knows no model: a :class:`Stage` computes losses, an :class:`~stdist.training.engine.Engine` optimises.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from stdist.errors import DivergenceError, Interrupted
from stdist.training.checkpoint import StageCheckpoints, naming_damage
from stdist.training.engine import Engine
from stdist.training.run_log import RunLog


class Stage(Protocol):
    """What the loop needs of a stage. ``step`` must depend on nothing but the weights and the step's number, so that
    a resumed run repeats the steps an uninterrupted one would have made."""

    @property
    def name(self) -> str: ...

    @property
    def watched(self) -> str | None:
        """Metric whose fall counts as progress: its best checkpoint is the result. None: the last one is."""
        ...

    def step(self, step: int, backward: Callable[[Tensor], None]) -> dict[str, float]:
        """Losses of step number ``step`` (from 0), each passed to ``backward``. Returns scalars, ``loss`` among
        them."""
        ...

    def evaluate(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class LoopSettings:
    """``patience``: evaluations of the watched metric without a new best before the stage stops; None: never."""

    max_steps: int
    logging_steps: int
    save_steps: int
    eval_steps: int
    patience: int | None = None


@dataclass
class _Progress:
    """The loop's own state, saved with every checkpoint."""

    first: dict[str, float] = field(default_factory=dict)
    best: float = math.inf
    best_step: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    last_metrics: dict[str, float] = field(default_factory=dict)
    stale: int = 0
    seconds: float = 0.0


def run_stage(
    stage: Stage,
    engine: Engine,
    settings: LoopSettings,
    checkpoints: StageCheckpoints,
    log: RunLog,
    write_model: Callable[[Path], None],
    read_model: Callable[[Path], None],
    facts: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Runs a stage to its end, from its newest checkpoint if there is one; a finished stage is only loaded.

    ``facts`` go into the log: what this process trains with. Returns the closing summary: metrics ``before``, of the
    result (``after``) and at the ``last`` step, ``steps``, ``seconds``, ``checkpoint``. The model holds the stage's
    result when it returns. Raises DivergenceError naming stage and step; Interrupted on Ctrl-C; InputError naming a
    damaged checkpoint.
    """

    def read(checkpoint: Path) -> None:
        with naming_damage(checkpoint):
            read_model(checkpoint)

    if (finished := checkpoints.finished) is not None:
        read(checkpoints.folder / finished["checkpoint"])
        return finished
    step, progress = 0, _Progress()
    if (latest := checkpoints.latest) is not None:
        read(latest)
        state = checkpoints.load(latest, engine)
        step, progress = state["step"], _Progress(**state["loop"])
    log.rewind(stage.name, -1 if latest is None else step)
    if facts:
        log.start(stage.name, step, facts)
    with _bar(stage.name, settings.max_steps, step) as advance, _ctrl_c() as interrupted:
        started = time.monotonic() - progress.seconds

        def save() -> None:
            progress.seconds = time.monotonic() - started
            checkpoints.save(step, write_model, engine, vars(progress))
            checkpoints.prune({step, progress.best_step} if stage.watched else {step})

        if latest is None:
            _evaluate(stage, step, progress, log)
            save()
        while step < settings.max_steps and not (settings.patience and progress.stale >= settings.patience):
            scalars = stage.step(step, engine.backward)
            _require_finite("loss", scalars["loss"], stage, step)
            scalars["learning_rate"] = engine.learning_rate
            scalars["grad_norm"] = engine.step()
            _require_finite("gradient norm", scalars["grad_norm"], stage, step)
            step += 1
            advance(scalars["loss"])
            if step % settings.logging_steps == 0 or step == settings.max_steps:
                log.write(stage.name, step, scalars)
            evaluated = step % settings.eval_steps == 0 or step == settings.max_steps
            if evaluated:
                _evaluate(stage, step, progress, log)
            if evaluated or interrupted() or step % settings.save_steps == 0:
                save()
            if interrupted():
                raise Interrupted(f"{stage.name}: stopped at step {step} and saved; run the same command to resume")
    result = progress.best_step if stage.watched else step
    if result != step:
        read(checkpoints.at(result))
    summary = {
        "stage": stage.name,
        "before": progress.first,
        "after": progress.best_metrics,
        "last": progress.last_metrics,
        "steps": step,
        "seconds": round(progress.seconds, 1),
        "checkpoint": checkpoints.at(result).name,
    }
    checkpoints.finish(summary)
    return summary


def _require_finite(what: str, value: float, stage: Stage, step: int) -> None:
    if not math.isfinite(value):
        raise DivergenceError(
            f"{stage.name}: {what} is {value} at step {step + 1}; its weights were not saved, "
            f"lower {stage.name}.learning_rate and train under another name="
        )


def _evaluate(stage: Stage, step: int, progress: _Progress, log: RunLog) -> None:
    """Scores the model; ``best`` moves only where the watched metric fell (or always, when none is watched)."""
    metrics = stage.evaluate()
    log.evaluation(stage.name, step, metrics)
    progress.last_metrics = metrics
    if step == 0:
        progress.first = metrics
    if stage.watched is None or metrics[stage.watched] < progress.best:
        progress.best = metrics[stage.watched] if stage.watched else progress.best
        progress.best_step, progress.best_metrics, progress.stale = step, metrics, 0
    else:
        progress.stale += 1


@contextmanager
def _bar(name: str, total: int, done: int) -> Iterator[Callable[[float], None]]:
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    # Standard output is for results.
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total, completed=done, loss=math.nan)
        yield lambda loss: progress.update(task, advance=1, loss=loss)


@contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a flag, so that no step or checkpoint is cut in half; the second one kills."""
    seen = False

    def remember(signum: int, frame: object) -> None:
        nonlocal seen
        seen = True
        signal.signal(signal.SIGINT, previous)

    try:
        previous = signal.signal(signal.SIGINT, remember)
    except ValueError:  # not the main thread: the caller owns the signals
        yield lambda: False
        return
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, previous)
