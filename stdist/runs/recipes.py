"""Recipes: what a run of each kind does, by the name its configuration gives."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from stdist.config import RunConfig, read_tree, validated
from stdist.errors import InputError
from stdist.registry import Registry
from stdist.training.process_group import ProcessGroup

DEFAULT_RECIPE = "vision-llm"
ConfigT = TypeVar("ConfigT", bound=RunConfig)
Log = Callable[[str], None]
OnMetrics = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class ForecastRequest:
    """What ``stdist forecast`` is asked for: a finished run, a store, cells or nodes (the run's own where None), a
    split's name or local days ``A:B``, and the file to write."""

    run_dir: Path
    store: Path
    region: str | None
    split: str
    out: Path


class Recipe(ABC, Generic[ConfigT]):
    """What the commands ask of a recipe. One class in one folder; registered in :data:`RECIPES`.

    ``Config``: the pydantic tree of its YAML, whose ``recipe`` is the name.
    """

    Config: ClassVar[type[RunConfig]]

    @abstractmethod
    def stages(self, config: ConfigT) -> tuple[str, ...]:
        """Names of the run's stages in order, as of the folders below ``checkpoints/``."""

    @abstractmethod
    def check(self, config: ConfigT, group: ProcessGroup) -> Any:
        """Raises InputError for what would stop ``group``, one that may be yet to be started, in training."""

    @abstractmethod
    def train(self, config: ConfigT, log: Log, on_metrics: OnMetrics) -> dict[str, Any]:
        """Runs or resumes every stage, then forecasts and scores. Returns metrics, summaries and paths.

        As one of several learners (torch.distributed is up) this process trains its share, and the main one alone
        writes and returns the scores. ``log`` is given a line for people at each milestone, by the main learner;
        ``on_metrics`` every logged step's scalars, on every learner.
        """

    @abstractmethod
    def forecast(self, config: ConfigT, request: ForecastRequest, log: Log) -> dict[str, Any]:
        """Forecasts with a finished run. Raises InputError for an unfinished run, or what it cannot forecast."""

    @abstractmethod
    def plan(self, config: ConfigT, device_memory: int | None, device_flops: float) -> Any:
        """Memory, operations and communication of every stage, before anything starts."""


RECIPES: Registry[type[Recipe]] = Registry("recipe", "stdist.recipes")


def recipe_of(config: RunConfig) -> Recipe:
    return RECIPES[config.recipe]()


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads a run's YAML file and applies ``key.sub=value`` overrides.

    Raises InputError: file missing or not YAML, an unknown key (with the nearest right one), a wrong value.
    """
    return parse_config(read_tree(path, overrides), where=str(path))


def parse_config(tree: dict[str, Any], where: str) -> RunConfig:
    """Validates a tree by its ``recipe``; ``where`` names its source in errors."""
    name = tree.get("recipe", DEFAULT_RECIPE)
    if not isinstance(name, str) or name not in RECIPES:
        raise InputError(f"{where}: recipe {name!r} is none; choose one of {', '.join(RECIPES)}")
    return validated(tree, RECIPES[name].Config, where)


def train(config: RunConfig, log: Log, on_metrics: OnMetrics = lambda scalars: None) -> dict[str, Any]:
    """See :meth:`Recipe.train`."""
    return recipe_of(config).train(config, log, on_metrics)
