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
from stdist.training.checkpoint import StageCheckpoints, naming_damage
from stdist.training.engine import Engine
from stdist.training.guards import EXPLOSION, FIRST_STEPS, naming_exhaustion, require_sane
from stdist.training.run_log import RunLog

SUMMED = ("tokens", "tokens_saved")
"""Scalars of a step that add up over learners; of all others the mean is taken."""


class Stage(Protocol):
    """What the loop needs of a stage. ``step`` must depend on nothing but the weights and the step's number, so that
    a resumed run repeats the steps an uninterrupted one would have made; and learners must share a step's work
    equally, so that it does not depend on their number either."""

    @property
    def name(self) -> str: ...

    @property
    def watched(self) -> str | None:
        """Metric whose fall counts as progress: its best checkpoint is the result. None: the last one is."""
        ...

    def step(self, step: int, backward: Callable[[Tensor], None]) -> dict[str, float]:
        """Losses of this learner's share of step number ``step`` (from 0), each passed to ``backward``. Returns
        scalars, ``loss`` among them."""
        ...

    def examples(self, step: int) -> str:
        """What this learner's share of a step learns from, for people."""
        ...

    def evaluate(self) -> dict[str, float]:
        """The same metrics on every learner."""
        ...


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
    first_losses: list[float] = field(default_factory=list)

    @property
    def ceiling(self) -> float:
        """Above it a loss is lost."""
        if len(self.first_losses) < FIRST_STEPS:
            return math.inf
        return EXPLOSION * max(1.0, sum(map(abs, self.first_losses)) / FIRST_STEPS)


def run_stage(
    stage: Stage,
    model: Model,
    make_engine: Callable[[], Engine],
    settings: LoopSettings,
    checkpoints: StageCheckpoints,
    log: RunLog | None,
    say: Callable[[str], None],
    facts: dict[str, str] | None = None,
    report: Callable[[dict[str, float]], None] = lambda scalars: None,
) -> dict[str, Any]:
    """Runs a stage to its end, from its newest checkpoint if there is one; a finished stage is only loaded.

    Args:
        make_engine: called once ``model`` has the weights to go on from.
        log: of the first learner; None on the others. say: is given a line for people.
        facts: go into the log, what this process trains with. report: is given every logged step's scalars, on every
            learner.

    Returns the closing summary: metrics ``before``, of the result (``after``) and at the ``last`` step, ``steps``,
    ``seconds``, ``checkpoint``. The model holds the stage's result when it returns. Raises DivergenceError naming
    stage, step, learner and examples; ResourceError; Interrupted on Ctrl-C; InputError naming a damaged checkpoint.
    """

    def read(checkpoint: Path) -> None:
        with naming_damage(checkpoint):
            model.read(checkpoint)

    # One answer for all: a file system may show a new file to some machines first.
    if (finished := checkpoints.group.lead(checkpoints.finished)) is not None:
        result = checkpoints.folder / finished["checkpoint"]
        checkpoints.check(result)
        read(result)
        return finished
    run = _Run(stage, model, settings, checkpoints, log, report)
    with run.naming("start"):
        if (newest := checkpoints.newest()) is not None:
            path, state, damage = newest
            for line in damage:
                say(f"{line}; going on from {path.name}")
            read(path)
            run.step, run.progress = state["step"], _Progress(**state["loop"])
            run.best_saved = run.progress.best_step
        run.engine = make_engine()
        if newest is not None:
            checkpoints.load(path, run.engine, state)
        if log:
            log.rewind(stage.name, run.step if newest else -1)
            if facts:
                log.start(stage.name, run.step, facts)
    try:
        with _bar(stage.name, settings.max_steps, run.step, hidden=log is None) as advance, _ctrl_c() as interrupted:
            run.all_steps(resumed=newest is not None, advance=advance, interrupted=interrupted)
    except (DivergenceError, Interrupted):
        # Of all learners at once. After any other error this one would wait for others that do something else.
        checkpoints.settle()
        run.engine.close()
        raise
    with run.naming("end"):
        run.engine.close()
        if run.result != run.step:
            checkpoints.check(checkpoints.at(run.result))
            read(checkpoints.at(run.result))
        checkpoints.finish(run.summary)
    return run.summary


class _Run:
    """A stage on its way: where it is, and what every step does."""

    engine: Engine

    def __init__(
        self,
        stage: Stage,
        model: Model,
        settings: LoopSettings,
        checkpoints: StageCheckpoints,
        log: RunLog | None,
        report: Callable[[dict[str, float]], None],
    ):
        self.stage, self.model, self.settings, self.checkpoints = stage, model, settings, checkpoints
        self.log, self.report, self.group = log, report, checkpoints.group
        self.step, self.progress = 0, _Progress()
        self.best_saved = 0

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
            stop = any(self.group.gather(interrupted()))
            if evaluated or stop or self.step % settings.save_steps == 0:
                self._save(started)
            else:
                self._settle(wait=False)
            if stop:
                self._settle()
                raise Interrupted(
                    f"{self.stage.name}: stopped at step {self.step} and saved; run the same command to resume"
                )
        self._settle()

    def naming(self, phase: str) -> AbstractContextManager[None]:
        return naming_exhaustion(self.stage.name, phase, self.step, self.group)

    def _log(self, scalars: dict[str, float]) -> None:
        with self.naming("log"):
            if self.log:
                self.log.write(self.stage.name, self.step, scalars)
            self.report({"step": self.step, **scalars})

    def _settle(self, wait: bool = True) -> None:
        with self.naming("checkpoint"):
            self.checkpoints.settle(wait)

    def _one_step(self) -> dict[str, float]:
        """Makes a step. Returns its scalars over all learners."""
        name, group, number = self.stage.name, self.group, self.step + 1
        with naming_exhaustion(name, "forward and backward", number, group):
            mine = self.stage.step(self.step, self.engine.backward)
            scalars_of = group.gather(mine)
        losses = [scalars["loss"] for scalars in scalars_of]
        require_sane(losses, self.progress.ceiling, name, number, group, lambda: self.stage.examples(self.step))
        scalars = {key: _over_learners(key, [each[key] for each in scalars_of]) for key in mine}
        scalars["learning_rate"] = self.engine.learning_rate
        with naming_exhaustion(name, "update", number, group):
            scalars["grad_norm"] = self.engine.step()
        if not math.isfinite(scalars["grad_norm"]):
            raise DivergenceError(
                f"{name}: gradient norm is {scalars['grad_norm']} at step {number}, learner {group.rank} on "
                f"{self.stage.examples(self.step)}; its weights were not saved, lower {name}.learning_rate and train "
                "under another name="
            )
        if len(self.progress.first_losses) < FIRST_STEPS:
            self.progress.first_losses.append(scalars["loss"])
        self.step += 1
        return scalars

    def _save(self, started: float) -> None:
        self.progress.seconds = time.monotonic() - started
        # The checkpoint before, which serves where this one is damaged, knows the best of its own time.
        keep = [self.progress.best_step, self.best_saved] if self.stage.watched else []
        self.best_saved = self.progress.best_step
        with self.naming("checkpoint"):
            self.checkpoints.save(self.step, self.model.snapshot, self.engine, asdict(self.progress), keep)

    def _evaluate(self) -> None:
        """Scores the model; ``best`` moves only where the watched metric fell (or always, when none is watched)."""
        stage, progress = self.stage, self.progress
        with self.naming("evaluation"):
            with self.engine.evaluating():
                metrics = stage.evaluate()
            if self.log:
                self.log.evaluation(stage.name, self.step, metrics)
        progress.last_metrics = metrics
        if self.step == 0:
            progress.first = metrics
        if stage.watched is None or metrics[stage.watched] < progress.best:
            progress.best = metrics[stage.watched] if stage.watched else progress.best
            progress.best_step, progress.best_metrics, progress.stale = self.step, metrics, 0
        else:
            progress.stale += 1

    @property
    def result(self) -> int:
        """The step whose weights are the stage's result."""
        return self.progress.best_step if self.stage.watched else self.step

    @property
    def summary(self) -> dict[str, Any]:
        return {
            "stage": self.stage.name,
            "before": self.progress.first,
            "after": self.progress.best_metrics,
            "last": self.progress.last_metrics,
            "steps": self.step,
            "seconds": round(self.progress.seconds, 1),
            "checkpoint": self.checkpoints.at(self.result).name,
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
