"""A run that is open on one learner, as the neutral code of training and scoring sees it."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from stdist.config import RunConfig
from stdist.data import GridStore, Windows
from stdist.runs.forecasting import Predictor, Written
from stdist.runs.workers import WorkPool
from stdist.scalars import figure
from stdist.training.loop import Trainer


class Run(ABC):
    """A run that is open on one learner: its data, and a model that each stage trains further.

    Attributes:
        store: the data.
        train, test: windows of the last stage's training and test days.
        metric: what the closing line says of the test, as ``nrmse``.
        notes: lines for people, in the log and the report.
        pool: workers that sample for the learners; None where they do it themselves.
    """

    metric: ClassVar[str]
    config: RunConfig
    store: GridStore
    train: Windows
    test: Windows
    notes: list[str]
    pool: WorkPool | None = None

    @property
    @abstractmethod
    def summary(self) -> str:
        """The run's size in a few words, as ``25 cells``."""

    @abstractmethod
    def fit(self, stage: str, trainer: Trainer) -> dict[str, Any]:
        """Trains the stage, or only loads what it left; returns its closing summary."""

    @abstractmethod
    def predictor(self) -> Predictor:
        """The last stage's result, to forecast the test windows."""

    def report_extras(self, written: Written) -> dict[str, Any]:
        """More entries for ``report/metrics.json``, as ``tables``."""
        return {}


def stage_sentence(summary: dict[str, Any]) -> str:
    """The stage's gain in a line: its headline metrics before and after."""
    before, after = summary["before"], summary["after"]
    names = summary.get("headline", list(after))
    changes = [f"{name} {figure(before[name])} → {figure(after[name])}" for name in names]
    result = int(summary["checkpoint"].removeprefix("step-"))
    if result != summary["steps"]:
        last = ", ".join(f"{name} {figure(summary['last'][name])}" for name in names)
        changes.append(f"kept step {result}; at the last step {last}")
    how = f"taken from {summary['taken_from']}" if "taken_from" in summary else f"{summary['seconds']:.0f} s"
    return f"{summary['stage']}: {', '.join(changes)} ({summary['steps']} steps, {how})"
