"""The loop every stage runs in: step, log, evaluate, checkpoint, resume, stop; on one learner or on many alike.

Knows no model: a :class:`Stage` computes losses, an :class:`~stdist.training.engine.Engine` optimises.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from stdist.errors import DivergenceError, Interrupted
from stdist.training.checkpoint import StageCheckpoints, damage_as_input_error
from stdist.training.engine import Engine
from stdist.training.guards import EXPLOSION, FIRST_STEPS, check_losses, resource_errors
from stdist.training.process_group import ProcessGroup
from stdist.training.run_log import RunLog

SUMMED = ("tokens", "tokens_saved")
"""Scalars of a step that add up over learners; of all others the mean is taken."""


class Stage(Protocol):
    """What the loop needs of a stage. ``step`` must depend on nothing but the weights and the step's number, so that
    a resumed run repeats the steps an uninterrupted one would have made; and learners must share a step's work
    equally, so that it does not depend on their number either."""

    name: str
    monitor: str | None
    """Metric whose fall counts as progress: its best checkpoint is the result. None: the last one is."""

    headline: tuple[str, ...]
    """Metrics that say in a line what the stage gained."""

    def step(self, step: int, backward: Callable[[Tensor], None]) -> dict[str, float]:
        """Losses of this learner's share of step number ``step`` (from 0), each passed to ``backward``. Returns
        scalars, ``loss`` among them."""
        ...

    def describe_batch(self, step: int) -> str:
        """What this learner's share of a step learns from, for people."""
        ...

    def evaluate(self) -> dict[str, float]:
        """The same metrics on every learner."""
        ...

    def on_weights_changed(self, step: int) -> None:
        """Called before the first step, with the number of steps made so far, and after every update."""
        return


class Model(Protocol):
    """What a checkpoint needs of the model that a stage trains."""

    def snapshot(self) -> Callable[[Path], None]:
        """Copies the weights; what it returns writes the copy into an existing folder."""
        ...

    def read(self, path: Path) -> None:
        """Loads what a snapshot wrote."""
        ...


@dataclass(frozen=True)
class LoopSettings:
    """``patience``: evaluations of the monitor metric without a new best before the stage stops; None: never."""

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
    first_losses: list[float] = field(default_factory=list)

    @property
    def ceiling(self) -> float:
        """Above it a loss is lost."""
        if len(self.first_losses) < FIRST_STEPS:
            return math.inf
        return EXPLOSION * max(1.0, sum(map(abs, self.first_losses)) / FIRST_STEPS)


class Trainer:
    """Runs stages, one after the other, in one run folder; every learner has one.

    Args:
        log: is given a line for people, on the main learner. on_metrics: is given every logged step's scalars, on every
            learner.
    """

    def __init__(
        self,
        run_dir: Path,
        group: ProcessGroup = ProcessGroup(),
        log: Callable[[str], None] = lambda line: None,
        on_metrics: Callable[[dict[str, float]], None] = lambda scalars: None,
    ):
        self.run_dir, self.group, self.on_metrics = run_dir, group, on_metrics
        self.log = log if group.is_main else lambda line: None
        self.run_log = RunLog(run_dir) if group.is_main else None

    def checkpoints(self, stage: str) -> StageCheckpoints:
        return StageCheckpoints(self.run_dir / "checkpoints" / stage, self.group)

    def fit(
        self,
        stage: Stage,
        model: Model,
        make_engine: Callable[[], Engine],
        settings: LoopSettings,
        run_info: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """Runs a stage to its end, from its newest checkpoint if there is one; a finished stage is only loaded.

        Args:
            make_engine: called once ``model`` has the weights to go on from.
            run_info: goes into the log, what this process trains with.

        Returns the closing summary: metrics ``before``, of the result (``after``) and at the ``last`` step, ``steps``,
        ``seconds``, ``checkpoint``. The model holds the stage's result when it returns. Raises DivergenceError naming
        stage, step, learner and batch; ResourceError; Interrupted on Ctrl-C; InputError naming a damaged checkpoint.
        """
        run = _StageRun(self, stage, model, settings)
        checkpoints = run.checkpoints
        # One answer for all: a file system may show a new file to some machines first.
        if (finished := self.group.broadcast_object(checkpoints.finished)) is not None:
            result = checkpoints.folder / finished["checkpoint"]
            checkpoints.check(result)
            run.read(result)
            return finished
        with run.resource_errors("start"):
            resumed = run.start(make_engine, run_info or {})
        try:
            with (
                _bar(stage.name, settings.max_steps, run.step, hidden=self.run_log is None) as advance,
                _ctrl_c() as interrupted,
            ):
                run.all_steps(resumed, advance, interrupted)
        except (DivergenceError, Interrupted):
            # Of all learners at once. After any other error this one would wait for others that do something else.
            checkpoints.wait()
            run.engine.close()
            raise
        with run.resource_errors("end"):
            run.engine.close()
            if run.result != run.step:
                checkpoints.check(checkpoints.step_dir(run.result))
                run.read(checkpoints.step_dir(run.result))
            checkpoints.finish(run.summary)
        return run.summary

    def close(self) -> None:
        if self.run_log:
            self.run_log.close()


class _StageRun:
    """A stage on its way: where it is, and what every step does."""

    engine: Engine

    def __init__(self, trainer: Trainer, stage: Stage, model: Model, settings: LoopSettings):
        self.trainer, self.stage, self.model, self.settings = trainer, stage, model, settings
        self.run_log, self.group = trainer.run_log, trainer.group
        self.checkpoints = trainer.checkpoints(stage.name)
        self.step, self.progress = 0, _Progress()
        self.best_saved = 0

    def read(self, checkpoint: Path) -> None:
        with damage_as_input_error(checkpoint):
            self.model.read(checkpoint)

    def start(self, make_engine: Callable[[], Engine], run_info: dict[str, str]) -> bool:
        """Loads the newest checkpoint, if there is one, and makes the engine. Returns whether there was one."""
        if (newest := self.checkpoints.newest()) is not None:
            path, state, damage = newest
            for line in damage:
                self.trainer.log(f"{line}; going on from {path.name}")
            self.read(path)
            self.step, self.progress = state["step"], _Progress(**state["loop"])
            self.best_saved = self.progress.best_step
        self.engine = make_engine()
        if newest is not None:
            self.checkpoints.load(path, self.engine, state)
        if self.run_log:
            self.run_log.rewind(self.stage.name, self.step if newest else -1)
            if run_info:
                self.run_log.start(self.stage.name, self.step, run_info)
        self.stage.on_weights_changed(self.step)
        return newest is not None

    def all_steps(self, resumed: bool, advance: Callable[[float], None], interrupted: Callable[[], bool]) -> None:
        settings, progress = self.settings, self.progress
        started = time.monotonic() - progress.seconds
        if not resumed:
            self._evaluate()
            self._save(started)
        while self.step < settings.max_steps and not (settings.patience and progress.stale >= settings.patience):
            scalars = self._one_step()
            advance(scalars["loss"])
            if self.step % settings.logging_steps == 0 or self.step == settings.max_steps:
                self._log(scalars)
            evaluated = self.step % settings.eval_steps == 0 or self.step == settings.max_steps
            if evaluated:
                self._evaluate()
            # Asked behind the evaluation: whoever pressed Ctrl-C while it ran does not wait for another step.
            stop = any(self.group.all_gather_object(interrupted()))
            if evaluated or stop or self.step % settings.save_steps == 0:
                self._save(started)
            else:
                self._wait(block=False)
            if stop:
                self._wait()
                raise Interrupted(
                    f"{self.stage.name}: stopped at step {self.step} and saved; run the same command to resume"
                )
        self._wait()

    def resource_errors(self, phase: str) -> AbstractContextManager[None]:
        return resource_errors(self.stage.name, phase, self.step, self.group)

    def _log(self, scalars: dict[str, float]) -> None:
        with self.resource_errors("log"):
            if self.run_log:
                self.run_log.write(self.stage.name, self.step, scalars)
            self.trainer.on_metrics({"step": self.step, **scalars})

    def _wait(self, block: bool = True) -> None:
        with self.resource_errors("checkpoint"):
            self.checkpoints.wait(block)

    def _one_step(self) -> dict[str, float]:
        """Makes a step. Returns its scalars over all learners."""
        name, group, number = self.stage.name, self.group, self.step + 1
        with resource_errors(name, "forward and backward", number, group):
            mine = self.stage.step(self.step, self.engine.backward)
            scalars_of = group.all_gather_object(mine)
        losses = [scalars["loss"] for scalars in scalars_of]
        check_losses(losses, self.progress.ceiling, name, number, group, lambda: self.stage.describe_batch(self.step))
        scalars = {key: _over_learners(key, [each[key] for each in scalars_of]) for key in mine}
        scalars["learning_rate"] = self.engine.learning_rate
        with resource_errors(name, "update", number, group):
            scalars["grad_norm"] = self.engine.step()
        if not math.isfinite(scalars["grad_norm"]):
            raise DivergenceError(
                f"{name}: gradient norm is {scalars['grad_norm']} at step {number}, learner {group.rank} on "
                f"{self.stage.describe_batch(self.step)}; its weights were not saved, lower {name}.learning_rate and "
                "train under another name="
            )
        if len(self.progress.first_losses) < FIRST_STEPS:
            self.progress.first_losses.append(scalars["loss"])
        self.step += 1
        self.stage.on_weights_changed(self.step)
        return scalars

    def _save(self, started: float) -> None:
        self.progress.seconds = time.monotonic() - started
        # The checkpoint before, which serves where this one is damaged, knows the best of its own time.
        keep = [self.progress.best_step, self.best_saved] if self.stage.monitor else []
        self.best_saved = self.progress.best_step
        with self.resource_errors("checkpoint"):
            self.checkpoints.save(self.step, self.model.snapshot, self.engine, asdict(self.progress), keep)

    def _evaluate(self) -> None:
        """Scores the model; ``best`` moves only where the monitored metric fell (or always, when none is)."""
        stage, progress = self.stage, self.progress
        with self.resource_errors("evaluation"):
            with self.engine.eval_mode():
                metrics = stage.evaluate()
            if self.run_log:
                self.run_log.evaluation(stage.name, self.step, metrics)
        progress.last_metrics = metrics
        if self.step == 0:
            progress.first = metrics
        if stage.monitor is None or metrics[stage.monitor] < progress.best:
            progress.best = metrics[stage.monitor] if stage.monitor else progress.best
            progress.best_step, progress.best_metrics, progress.stale = self.step, metrics, 0
        else:
            progress.stale += 1

    @property
    def result(self) -> int:
        """The step whose weights are the stage's result."""
        return self.progress.best_step if self.stage.monitor else self.step

    @property
    def summary(self) -> dict[str, Any]:
        return {
            "stage": self.stage.name,
            "headline": list(self.stage.headline),
            "before": self.progress.first,
            "after": self.progress.best_metrics,
            "last": self.progress.last_metrics,
            "steps": self.step,
            "seconds": round(self.progress.seconds, 1),
            "checkpoint": self.checkpoints.step_dir(self.result).name,
        }


def _over_learners(key: str, values: list[float]) -> float:
    return sum(values) if key in SUMMED else sum(values) / len(values)


@contextmanager
def _bar(name: str, total: int, done: int, hidden: bool) -> Iterator[Callable[[float], None]]:
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    # Standard output is for results.
    with Progress(*columns, console=Console(stderr=True), disable=hidden) as progress:
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
