"""The loop every stage runs in: step, log, evaluate, checkpoint, resume, stop; on one learner or on many alike.

Knows no model: a :class:`Stage` computes losses, an :class:`~stdist.training.engine.Engine` optimises.
"""

import gc
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from stdist.errors import DivergenceError, Interrupted, MemoryFullError
from stdist.scalars import defined
from stdist.training.checkpoint import StageCheckpoints, damage_as_one_line
from stdist.training.engine import Engine
from stdist.training.guards import EXPLOSION, FIRST_STEPS, check_gradient, check_losses, resource_errors
from stdist.training.process_group import ProcessGroup
from stdist.training.run_log import RunLog
from stdist.training.terminal import first_ctrl_c, loss_bar

SUMMED = ("tokens", "tokens_saved")
"""Scalars of a step that add up over learners; of all others the mean is taken."""


class Stage(Protocol):
    """One stage of a run. ``step`` must depend on nothing but the weights and the step's number, so that a resumed run
    repeats the steps of an uninterrupted one; and learners must share a step's work equally, so that it does not depend
    on their number either."""

    name: str
    monitor: str | None
    """Metric whose fall counts as progress: its best checkpoint is the result. None: the last one is."""

    resumable_every: int = 1
    """``step`` can be resumed at multiples of this; between them it also depends on what the stage holds."""

    headline: tuple[str, ...]
    """Metrics that say in a line what the stage gained."""

    def step(self, step: int, backward: Callable[[Tensor], None]) -> dict[str, float]:
        """Passes the losses of this learner's share of step number ``step``, from 0, to ``backward``. Returns scalars,
        ``loss`` among them."""
        ...

    def describe_batch(self, step: int) -> str:
        """Names this learner's share of a step's batch, for people."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Returns metrics, the same ones on every learner."""
        ...

    def halve_memory(self) -> bool:
        """Lets the next steps, or this one again, hold half as many activations at once; False where it cannot. What is
        drawn and averaged stays."""
        return False

    def on_weights_changed(self, step: int) -> None:
        """Called on every learner when the weights are those after ``step`` updates, with all of them at hand: before
        the first step of this process, resumed or not, and after every update."""
        return

    def close(self) -> None:
        """Called on every learner behind the last step."""
        return


class Model(Protocol):
    """The model that a stage trains, as checkpoints see it."""

    def snapshot(self) -> Callable[[Path], None]:
        """Copies the weights; what it returns writes the copy into an existing folder."""
        ...

    def read(self, path: Path) -> None:
        """Loads what a snapshot wrote."""
        ...


@dataclass(frozen=True)
class LoopSettings:
    """``patience``: evaluations of the monitored metric without a new best before the stage stops; None: never."""

    max_steps: int
    logging_steps: int
    save_steps: int
    eval_steps: int
    patience: int | None = None


@dataclass
class _Progress:
    """The loop's own state, saved with every checkpoint."""

    first: dict[str, float | None] = field(default_factory=dict)
    best: float | None = None
    best_step: int = 0
    best_metrics: dict[str, float | None] = field(default_factory=dict)
    last_metrics: dict[str, float | None] = field(default_factory=dict)
    stale: int = 0
    seconds: float = 0.0
    first_losses: list[float] = field(default_factory=list)

    @property
    def ceiling(self) -> float:
        """A loss above it has exploded: EXPLOSION times the first steps' mean, which counts as at least 1."""
        if len(self.first_losses) < FIRST_STEPS:
            return math.inf
        return EXPLOSION * max(1.0, sum(map(abs, self.first_losses)) / FIRST_STEPS)


class Trainer:
    """Runs stages, one after the other, in one run folder; every learner has one.

    Args:
        log: is given a line for people, on the main learner. on_metrics: is given every logged step's scalars, on every
            learner. advice: says of a stage for which memory was not enough what to change; asked only then.
    """

    def __init__(
        self,
        run_dir: Path,
        group: ProcessGroup = ProcessGroup(),
        log: Callable[[str], None] = lambda line: None,
        on_metrics: Callable[[dict[str, float]], None] = lambda scalars: None,
        advice: Callable[[str], str] = lambda stage: "",
    ):
        self.run_dir, self.group, self.on_metrics, self.advice = run_dir, group, on_metrics, advice
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
        make_steps: "Callable[[StageRun], None] | None" = None,
    ) -> dict[str, Any]:
        """Runs a stage to its end, from its newest checkpoint if there is one; a finished stage is only loaded.

        Args:
            make_engine: called once ``model`` has the weights to go on from.
            run_info: goes into the log, as the device and engine of this process.
            make_steps: makes the steps in a loop of its own, see :meth:`StageRun.made`; by default the stage does.

        Returns the closing summary: metrics ``before``, of the result (``after``) and at the ``last`` step, ``steps``,
        ``seconds``, ``checkpoint``. The model holds the stage's result when it returns. Raises DivergenceError naming
        stage, step, learner and batch; ResourceError; Interrupted on Ctrl-C; InputError naming a damaged checkpoint.
        """
        run = StageRun(self, stage, model, settings)
        if (summary := run.load_finished()) is not None:
            return summary
        run.start(make_engine, run_info or {})
        try:
            run.train(make_steps or StageRun.make_steps)
        except (DivergenceError, Interrupted):
            # Of all learners at once. After any other error this one would wait for others that do something else.
            run.checkpoints.wait()
            run.engine.close()
            raise
        return run.finish()

    def close(self) -> None:
        if self.run_log:
            self.run_log.close()


class StageRun:
    """One stage on its way: load_finished, else start, train, finish."""

    engine: Engine
    _advance: Callable[[float], None]
    _interrupted: Callable[[], bool]

    def __init__(self, trainer: Trainer, stage: Stage, model: Model, settings: LoopSettings):
        self.trainer, self.stage, self.model, self.settings = trainer, stage, model, settings
        self.run_log, self.group = trainer.run_log, trainer.group
        self.checkpoints = trainer.checkpoints(stage.name)
        self.step, self.progress = 0, _Progress()
        self.resumed = self.halved = self._stopped = False
        self.best_saved = 0
        """The best step of the last checkpoint's time: where the newest one is damaged, that one serves."""

    def load_finished(self) -> dict[str, Any] | None:
        """Loads the result of a stage that is finished and returns its summary; None where it is not."""
        # One answer for all: a file system may show a new file to some machines first.
        summary = self.group.broadcast_object(self.checkpoints.finished)
        if summary is not None:
            self._load_weights(self.checkpoints.folder / summary["checkpoint"], check=True)
        return summary

    def start(self, make_engine: Callable[[], Engine], run_info: dict[str, str]) -> None:
        """Loads the newest checkpoint, if there is one, and makes the engine."""
        with self._resource_errors("start"):
            if (newest := self.checkpoints.newest()) is not None:
                path, state, damage = newest
                for line in damage:
                    self.trainer.log(f"{line}; going on from {path.name}")
                self._load_weights(path)
                self.step, self.progress, self.resumed = state["step"], _Progress(**state["loop"]), True
                self.best_saved = self.progress.best_step
            self.engine = make_engine()
            if newest is not None:
                self.checkpoints.load(path, self.engine, state)
            if self.run_log:
                self.run_log.rewind(self.stage.name, self.step if self.resumed else -1)
                if run_info:
                    self.run_log.start(self.stage.name, self.step, run_info)
            self._weights_changed()

    def train(self, make_steps: "Callable[[StageRun], None]") -> None:
        """Makes the steps that are left, logs, evaluates and saves."""
        self._began = time.monotonic() - self.progress.seconds
        bar = loss_bar(self.stage.name, self.settings.max_steps, self.step, self.run_log is None)
        with bar as self._advance, first_ctrl_c() as self._interrupted:
            if not self.resumed:
                self._evaluate()
                self._save()
            if self.goes_on:
                make_steps(self)
            self._wait()
        if self._stopped:
            raise Interrupted(
                f"{self.stage.name}: stopped at step {self.step} and saved; run the same command to resume"
            )

    def make_steps(self) -> None:
        """The stage's own steps."""
        while self.goes_on:
            self._count(self._one_step())

    @property
    def goes_on(self) -> bool:
        """Whether there is another step to be made."""
        patience = self.settings.patience
        ended = self.step >= self.settings.max_steps or (patience and self.progress.stale >= patience)
        return not (ended or self._stopped)

    def made(self, scalars: dict[str, float]) -> None:
        """Called by a loop of one learner's own after each of its steps, as long as it ``goes_on``; ``scalars``:
        ``loss`` and ``grad_norm`` among them. Raises DivergenceError where one of the two is lost."""
        check_losses([scalars["loss"]], self.progress.ceiling, *self._where)
        check_gradient(scalars["grad_norm"], *self._where)
        self._count(scalars)

    def _count(self, scalars: dict[str, float]) -> None:
        """A step was made: logs, evaluates and saves where it is time."""
        settings = self.settings
        if len(self.progress.first_losses) < FIRST_STEPS:
            self.progress.first_losses.append(scalars["loss"])
        self.step += 1
        with self._resource_errors("weights changed"):
            self._weights_changed()
        self._advance(scalars["loss"])
        ended = self.step == settings.max_steps
        if self.step % settings.logging_steps == 0 or ended:
            self._log(scalars)
        evaluated = self.step % settings.eval_steps == 0 or ended
        if evaluated:
            self._evaluate()
        # Asked behind the evaluation: whoever pressed Ctrl-C while it ran does not wait for another step.
        asked = any(self.group.all_gather_object(self._interrupted()))
        self._stopped = asked and self.step % self.stage.resumable_every == 0
        if evaluated or self._stopped or self.step % settings.save_steps == 0:
            self._save()
        else:
            self._wait(block=False)

    def finish(self) -> dict[str, Any]:
        """Leaves the stage's result in the plain model. Returns the closing summary."""
        progress = self.progress
        with self._resource_errors("end"):
            self.stage.close()
            self.engine.close()
            step = progress.best_step if self.stage.monitor else self.step
            result = self.checkpoints.step_dir(step)
            if step != self.step:
                self._load_weights(result, check=True)
            summary = {
                "stage": self.stage.name,
                "headline": list(self.stage.headline),
                "before": progress.first,
                "after": progress.best_metrics,
                "last": progress.last_metrics,
                "steps": self.step,
                "seconds": round(progress.seconds, 1),
                "checkpoint": result.name,
            }
            self.checkpoints.finish(summary)
        return summary

    def _one_step(self) -> dict[str, float]:
        """Makes a step. Returns its scalars over all learners."""
        stage, group, number = self.stage, self.group, self.step + 1
        local_scalars = self._gradients(number)
        with resource_errors(stage.name, "forward and backward", number, group):
            scalars_of = group.all_gather_object(local_scalars)
        check_losses([scalars["loss"] for scalars in scalars_of], self.progress.ceiling, *self._where)
        scalars = {key: _reduced(key, [s[key] for s in scalars_of]) for key in local_scalars}
        scalars["learning_rate"] = self.engine.learning_rate
        with resource_errors(stage.name, "update", number, group):
            scalars["grad_norm"] = self.engine.step()
        check_gradient(scalars["grad_norm"], *self._where)
        return scalars

    @property
    def _where(self) -> tuple[str, int, ProcessGroup, Callable[[], str]]:
        """The step that is being made, as checks name it."""
        return self.stage.name, self.step + 1, self.group, lambda: self.stage.describe_batch(self.step)

    def _gradients(self, number: int) -> dict[str, float]:
        """Forward and backward passes of a step. Where memory is not enough they are made again, once in a stage, with
        half the activations at once: by a learner alone, since others would wait in another collective. Returns the
        step's scalars. Raises MemoryFullError with the plan's advice."""
        stage = self.stage
        try:
            with resource_errors(stage.name, "forward and backward", number, self.group):
                return stage.step(self.step, self.engine.backward)
        except MemoryFullError as error:
            may_repeat = self.group.size == 1 and not self.halved
            if not (may_repeat and self.engine.discard_gradients() and stage.halve_memory()):
                advice = self.trainer.advice(stage.name)
                raise MemoryFullError(f"{error}{f'; {advice}' if advice else ''}") from error
            self.trainer.log(f"{error}; making step {number} again with half the activations at once")
        # Behind the handler, whose error holds on to all that the step had made.
        self.halved = True
        gc.collect()
        torch.cuda.empty_cache()
        return self._gradients(number)

    def _weights_changed(self) -> None:
        with self.engine.gather_full_params():
            self.stage.on_weights_changed(self.step)

    def _log(self, scalars: dict[str, float]) -> None:
        with self._resource_errors("log"):
            if self.run_log:
                self.run_log.write(self.stage.name, self.step, scalars)
            self.trainer.on_metrics({"step": self.step, **scalars})

    def _evaluate(self) -> None:
        """Scores the model; ``best`` moves only where the monitored metric fell (or always, when none is)."""
        stage, progress = self.stage, self.progress
        with self._resource_errors("evaluation"):
            with self.engine.eval_mode():
                metrics = defined(stage.evaluate())
            if self.run_log:
                self.run_log.evaluation(stage.name, self.step, metrics)
        progress.last_metrics = metrics
        if self.step == 0:
            progress.first = metrics
        monitored = metrics[stage.monitor] if stage.monitor else None
        if stage.monitor and monitored is None:
            raise DivergenceError(
                f"{stage.name}: {stage.monitor} of the validation is not defined at step {self.step}, and no step the "
                "best; give data.split other validation days"
            )
        if monitored is None or progress.best is None or monitored < progress.best:
            progress.best = monitored
            progress.best_step, progress.best_metrics, progress.stale = self.step, metrics, 0
        else:
            progress.stale += 1

    def _save(self) -> None:
        self.progress.seconds = time.monotonic() - self._began
        keep = [self.progress.best_step, self.best_saved] if self.stage.monitor else []
        self.best_saved = self.progress.best_step
        with self._resource_errors("checkpoint"):
            self.checkpoints.save(self.step, self.model.snapshot, self.engine, asdict(self.progress), keep)

    def _wait(self, block: bool = True) -> None:
        with self._resource_errors("checkpoint"):
            self.checkpoints.wait(block)

    def _load_weights(self, checkpoint: Path, check: bool = False) -> None:
        if check:
            self.checkpoints.check(checkpoint)
        with damage_as_one_line(checkpoint):
            self.model.read(checkpoint)

    def _resource_errors(self, phase: str) -> AbstractContextManager[None]:
        return resource_errors(self.stage.name, phase, self.step, self.group)


def _reduced(key: str, values: list[float]) -> float:
    """A step's scalar over all learners, of each learner's."""
    return sum(values) if key in SUMMED else sum(values) / len(values)
