"""Recipes by the name a configuration gives: the commands ask a recipe and name no system.

Reading a configuration imports no torch: what trains and forecasts is imported by what calls it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from stdist.config import RunConfig, read_tree, validated
from stdist.errors import InputError
from stdist.registry import Registry
from stdist.runs.run_folder import CONFIG, held, read_own_config

if TYPE_CHECKING:
    from stdist.config.base import WorkersConfig
    from stdist.runs.devices import Device
    from stdist.runs.forecast_request import ForecastRequest
    from stdist.runs.forecasting import Predict, Predictor, Sweep
    from stdist.runs.plan import RunPlan
    from stdist.runs.run import Run
    from stdist.runs.watch import WatchRequest
    from stdist.runs.workers import WorkerProgram, WorkPool
    from stdist.training.process_group import ProcessGroup

DEFAULT_RECIPE = "vision-llm"
ConfigT = TypeVar("ConfigT", bound=RunConfig)


class Recipe(ABC, Generic[ConfigT]):
    """One class in one folder, registered in :data:`RECIPES`; it has no state.

    ``Config``: the pydantic tree of its YAML, whose ``recipe`` is the name.
    """

    Config: ClassVar[type[RunConfig]]

    @abstractmethod
    def stages(self, config: ConfigT) -> tuple[str, ...]:
        """Names of the run's stages in order, as of the folders below ``checkpoints/``."""

    @abstractmethod
    def check(self, config: ConfigT, group: "ProcessGroup") -> object:
        """Raises InputError for what would stop ``group``, one that may be yet to be started, in training."""

    @abstractmethod
    def open(self, config: ConfigT, group: "ProcessGroup") -> "Run":
        """The run's data and its model as it starts. Raises InputError as ``check`` does, or for what it read."""

    @abstractmethod
    def load(self, config: ConfigT, checkpoint: Path) -> "Predictor":
        """The forecaster in a finished run's checkpoint."""

    @abstractmethod
    def plan(self, config: ConfigT, device: "Device") -> "RunPlan":
        """Memory, operations and communication of every stage on one learner's ``device``, before anything starts."""

    def workers(self, config: ConfigT) -> "WorkersConfig | None":
        """The workers that the run's learners ask for samples; None where there are none."""
        return None

    def worker_program(self, config: ConfigT) -> "WorkerProgram":
        """What such a worker runs, made in its process when the first stage that needs it begins."""
        raise NotImplementedError(f"{config.recipe} has no workers")

    def train(
        self,
        config: ConfigT,
        log: Callable[[str], None],
        on_metrics: Callable[[dict[str, float]], None],
        pool: "WorkPool | None" = None,
        force: bool = False,
    ) -> dict[str, Any]:
        """See :func:`stdist.runs.training.train`."""
        from stdist.runs import training

        def open_run(group: "ProcessGroup") -> "Run":
            run = self.open(config, group)
            run.pool = pool
            return run

        return training.train(config, self.stages(config), open_run, log, on_metrics, partial(self.plan, config), force)

    def forecast(
        self,
        config: ConfigT,
        request: "ForecastRequest",
        log: Callable[[str], None],
        predict: "Predict | None" = None,
    ) -> dict[str, Any]:
        """See :func:`stdist.runs.forecasting.forecast_store`."""
        from stdist.runs.forecasting import forecast_store

        return forecast_store(config, self.stages(config)[-1], partial(self.load, config), request, log, predict)

    def calibrate(self, config: ConfigT, request: "ForecastRequest", log: Callable[[str], None]) -> dict[str, Any]:
        """See :func:`stdist.runs.calibration.calibrate_run`."""
        from stdist.runs.calibration import calibrate_run

        return calibrate_run(config, self.stages(config)[-1], partial(self.load, config), request, log)

    def watch(
        self,
        config: ConfigT,
        request: "WatchRequest",
        tell: Callable[[dict[str, Any]], None],
        log: Callable[[str], None],
    ) -> bool:
        """See :func:`stdist.runs.watch.watch_run`."""
        from stdist.runs.watch import watch_run

        return watch_run(config, self.stages(config)[-1], partial(self.load, config), request, tell, log)

    def open_sweep(
        self, config: ConfigT, request: "ForecastRequest", log: Callable[[str], None] = lambda line: None
    ) -> "Sweep":
        """The same model and windows to forecast elsewhere than in a file of this process; see
        :func:`stdist.runs.forecasting.open_sweep`."""
        from stdist.runs.forecasting import open_sweep

        return open_sweep(config, self.stages(config)[-1], partial(self.load, config), request, log)


RECIPES: Registry[type[Recipe]] = Registry("recipe", "stdist.recipes")


def recipe_of(config: RunConfig) -> Recipe:
    return RECIPES[config.recipe]()


def train(
    config: RunConfig,
    log: Callable[[str], None],
    on_metrics: Callable[[dict[str, float]], None] = lambda scalars: None,
    force: bool = False,
) -> dict[str, Any]:
    """``stdist train`` in this process alone, which holds the run folder; see :func:`stdist.runs.training.train`."""
    with held(config.run_dir):
        return learn(config, log, on_metrics, force=force)


def learn(
    config: RunConfig,
    log: Callable[[str], None],
    on_metrics: Callable[[dict[str, float]], None],
    pool: "WorkPool | None" = None,
    force: bool = False,
) -> dict[str, Any]:
    """The same on this learner, with the workers of ``pool`` if it has any; whoever started the learners holds the run
    folder."""
    return recipe_of(config).train(config, log, on_metrics, pool, force)


def forecast(
    request: "ForecastRequest", log: Callable[[str], None], predict: "Predict | None" = None
) -> dict[str, Any]:
    """``stdist forecast``; see :func:`stdist.runs.forecasting.forecast_store`."""
    config = read_run_config(request.run_dir)
    return recipe_of(config).forecast(config, request, log, predict)


def calibrate(request: "ForecastRequest", log: Callable[[str], None]) -> dict[str, Any]:
    """``stdist calibrate``; see :func:`stdist.runs.calibration.calibrate_run`."""
    config = read_run_config(request.run_dir)
    return recipe_of(config).calibrate(config, request, log)


def watch(request: "WatchRequest", tell: Callable[[dict[str, Any]], None], log: Callable[[str], None]) -> bool:
    """``stdist watch``; see :func:`stdist.runs.watch.watch_run`."""
    config = read_run_config(request.run_dir)
    return recipe_of(config).watch(config, request, tell, log)


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads a run's YAML file and applies ``key.sub=value`` overrides.

    Raises InputError: file missing or not YAML, an unknown key (with the nearest right one), a wrong value.
    """
    try:
        return parse_config(read_tree(path, overrides), where=str(path))
    except RecursionError:
        raise InputError(f"{path}: a value is nested too deep to be read; write it flat") from None


def parse_config(tree: dict[str, Any], where: str) -> RunConfig:
    """Validates a tree by its ``recipe``; ``where`` names its source in errors."""
    name = tree.get("recipe", DEFAULT_RECIPE)
    if not isinstance(name, str) or name not in RECIPES:
        raise InputError(f"{where}: recipe {name!r} is none; choose one of {', '.join(RECIPES)}")
    return validated(tree, RECIPES[name].Config, where)


def read_run_config(run_dir: Path) -> RunConfig:
    """Raises InputError where ``run_dir`` is no run folder."""
    if not (run_dir / CONFIG).is_file():
        raise InputError(f"{run_dir} is no run folder, it has no {CONFIG}; name the folder of a `stdist train`")
    return parse_config(read_own_config(run_dir), where=str(run_dir / CONFIG))
