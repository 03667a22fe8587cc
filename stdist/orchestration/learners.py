"""Learners on a Ray cluster: a Ray Train group of processes, each running the recipe that one process runs alone.

A learner or node that is lost takes the group with it; Ray starts it again, and it goes on from the newest checkpoint
in the run folder, which lies on a file system that all nodes share. An error that no repetition can mend, bad input, a
loss that is lost or a machine that is full, ends it for all learners at once.
"""

import logging
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from stdist.config import RunConfig
from stdist.config.base import WorkersConfig
from stdist.errors import DivergenceError, InputError, Interrupted, ResourceError, SilentLearner
from stdist.orchestration.cluster import connected, default_resources
from stdist.orchestration.policy_workers.coordinator import Coordinator, RemotePool
from stdist.orchestration.policy_workers.ledger import LEDGER
from stdist.runs import recipes
from stdist.runs.recipes import parse_config, recipe_of
from stdist.runs.run_folder import held, require_writable_run
from stdist.runs.workers import WorkerProgram
from stdist.training.process_group import ProcessGroup, collective_backend

try:
    import ray
    import ray.train
    from ray.exceptions import OutOfMemoryError
    from ray.train.torch import TorchConfig, TorchTrainer, get_device
    from ray.train.v2._internal.execution import context as train_context
    from ray.train.v2.api.config import LoggingConfig
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:  # also where Ray is there without what its training needs
    raise InputError("Ray Train is not installed; pip install 'stdist[cluster]', or set num_workers: 1") from error

FINAL = (InputError, DivergenceError, ResourceError)
"""Errors that another try would meet again."""


def train(config: RunConfig, log: Callable[[str], None], force: bool = False) -> dict[str, Any]:
    """``recipes.train`` on ``learners.num_workers`` processes of the cluster that this process belongs to, else of the
    one that RAY_ADDRESS names or that runs on this machine, else of one that is started for it.

    Raises what ``recipes.train`` raises; InputError where the cluster cannot hold the learners, at once; ResourceError
    where more than ``max_failures`` were lost; Interrupted on Ctrl-C, the newest checkpoint stays.
    """
    learners = config.learners
    # As each learner will, but here, before anything is started.
    recipe_of(config).check(config, ProcessGroup(0, learners.num_workers))
    require_writable_run(config.run_dir)
    config = config.model_copy(update={"output_dir": config.output_dir.absolute()})
    # Learners wait until the controller has seen what they reported; Ray lets it look every two seconds.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    workers = recipe_of(config).workers(config)
    with held(config.run_dir), connected(os.environ.get("RAY_ADDRESS"), log_to_driver=True):
        resources, of_worker = require_room(config, workers)
        log(f"{learners.num_workers} learners with {resources} each")
        if workers:
            log(f"{workers.num_workers} workers with {of_worker} each sample for them")
        coordinator = _coordinator(config, workers, of_worker) if workers else None
        trainer = TorchTrainer(
            _learn,  # type: ignore[arg-type]
            train_loop_config={
                "config": config.model_dump(mode="json"),
                "coordinator": coordinator,
                "force": force,
            },
            torch_config=TorchConfig(
                backend=collective_backend(bool(resources.get("GPU"))), timeout_s=int(learners.timeout)
            ),
            scaling_config=ray.train.ScalingConfig(
                num_workers=learners.num_workers,
                use_gpu=bool(resources.get("GPU")),
                resources_per_worker=resources,
                placement_strategy=learners.placement_strategy,
            ),
            run_config=ray.train.RunConfig(  # type: ignore[call-arg]
                name="ray",
                storage_path=str(config.run_dir),
                failure_config=ray.train.FailureConfig(max_failures=learners.max_failures),
                # What fails is told in one line.
                logging_config=LoggingConfig(log_level="CRITICAL"),
                callbacks=[_Failures()],  # type: ignore[list-item]
            ),
        )
        try:
            return trainer.fit().return_value  # type: ignore[attr-defined]
        except (KeyboardInterrupt, SystemExit):  # the latter is Ray's own answer to Ctrl-C
            raise Interrupted("stopped; run the same command to go on from the newest checkpoint") from None
        except ray.train.ControllerError as error:
            if isinstance(error.controller_failure, FINAL):
                raise error.controller_failure from None
            raise
        except ray.train.WorkerGroupError as error:
            raise ResourceError(
                f"learners failed more often than learners.max_failures {learners.max_failures}, last "
                f"{_first_lost(error.worker_failures)}; run the same command to go on from the newest checkpoint"
            ) from error
        finally:
            if coordinator is not None:
                ray.kill(coordinator)  # and with it its workers: what a driver leaves behind, its next run would miss


def _coordinator(config: RunConfig, workers: WorkersConfig, resources: dict[str, float]) -> Any:
    """The pool's own actor, beside this driver: its workers begin when a learner first asks for them."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    program = partial(_worker_program, config.model_dump(mode="json"))
    actor = Coordinator.options(scheduling_strategy=here)  # type: ignore[attr-defined]
    return actor.remote(program, workers, resources, config.run_dir / LEDGER)


def _worker_program(tree: dict[str, Any]) -> WorkerProgram:
    config = parse_config(tree, where="the submitted config")
    return recipe_of(config).worker_program(config)


def _learn(arguments: dict[str, Any]) -> dict[str, Any]:
    """One learner: see ``runs.recipes.learn``. ``arguments``: the config's tree, the coordinator of its workers,
    and whether to train where the plan says that memory is not enough."""
    if torch.cuda.is_available():
        torch.cuda.set_device(get_device())
    # A line for every report; Ray names this logger after its file.
    logging.getLogger(train_context.__file__).setLevel(logging.WARNING)
    config = parse_config(arguments["config"], where="the submitted config")
    pool = None
    if (workers := recipe_of(config).workers(config)) is not None:
        pool = RemotePool(arguments["coordinator"], workers.timeout)
    # Ray Train would show what is printed twice.
    return recipes.learn(config, _log, ray.train.report, pool, arguments["force"])


def _log(line: str) -> None:
    sys.stderr.write(f"{line}\n")


class _Failures(ray.train.UserCallback):
    """On the controller: FINAL errors end the run, at once and for all learners; Ray starts the group again after any
    other."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, FINAL) and not isinstance(error, SilentLearner):
                raise ray.train.ControllerError(error)
        _log(f"lost {_first_lost(worker_exceptions)}")


def require_room(config: RunConfig, workers: WorkersConfig | None) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the resources that a learner takes, and a worker. Raises InputError, naming what is missing, where the
    cluster does not have them for all: Ray itself would wait for ever."""
    learners, cluster = config.learners, ray.cluster_resources()
    of_learner = learners.resources_per_worker or default_resources()
    of_worker = (workers and workers.resources_per_worker) or default_resources()
    count = workers.num_workers if workers else 0
    for kind in of_learner.keys() | of_worker.keys():
        needed = of_learner.get(kind, 0) * learners.num_workers + of_worker.get(kind, 0) * count
        if cluster.get(kind, 0) < needed:
            nodes = sum(1 for node in ray.nodes() if node["Alive"])
            who, keys = f"learners.num_workers {learners.num_workers}", "num_workers or learners.resources_per_worker"
            if count:
                who, keys = f"{who} and rollouts.num_workers {count}", "num_workers or resources_per_worker of either"
            raise InputError(
                f"{who} need {needed:g} {kind} and the cluster ({nodes} nodes) has {cluster.get(kind, 0):g}; "
                f"start more nodes, or lower {keys}"
            )
    return of_learner, of_worker


def _first_lost(failures: Mapping[int, Exception]) -> str:
    """Returns, in one line of what may be pages, the learner that was lost first, and how."""
    # Ray wraps the error where its health check met it.
    errors = {rank: getattr(error, "health_check_failure", error) for rank, error in failures.items()}
    # One that only lost its partner says nothing of the cause.
    causes = {rank: e for rank, e in errors.items() if not isinstance(e, SilentLearner)} or errors
    rank, cause = next(iter(causes.items()))
    message = " ".join(str(cause).split())
    text = (message.partition("The actor is dead because ")[2] or message)[:300]  # not who it was
    if isinstance(cause, OutOfMemoryError):
        text = f"out of memory on its host: {text}"
    return f"learner {rank} ({text})"
