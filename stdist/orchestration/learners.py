"""Learners on a Ray cluster: a Ray Train group of processes, each running the recipe that one process runs alone.

A worker or node that is lost takes the group with it; Ray starts it again, and it goes on from the newest checkpoint in
the run folder, which lies on a file system that all nodes share. What no repetition can mend, bad input or a loss that
is lost, comes back as the first learner's answer and is not tried again.
"""

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

from stdist.config import Config, parse_config
from stdist.errors import DivergenceError, InputError, Interrupted, ResourceError, SilentLearner
from stdist.training.group import Group
from stdist.vision_llm import recipe

try:
    import ray
    import ray.train
    from ray.exceptions import OutOfMemoryError, RayTaskError
    from ray.train.torch import TorchConfig, TorchTrainer, get_device
    from ray.train.v2._internal.execution import context as train_context
    from ray.train.v2.api.config import LoggingConfig
except ModuleNotFoundError as error:
    raise InputError("Ray is not installed; pip install 'stdist[cluster]', or set learners.num_workers: 1") from error

FINAL = (InputError, DivergenceError, ResourceError)
"""What another try would meet again."""


def train(config: Config, say: Callable[[str], None]) -> dict[str, Any]:
    """``recipe.train`` on ``learners.num_workers`` processes of the cluster that this process belongs to, else of the
    one that RAY_ADDRESS names or that runs on this machine, else of one that is started for it.

    Raises what ``recipe.train`` raises; InputError where the cluster cannot hold the learners, at once; ResourceError
    where more than ``max_failures`` were lost; Interrupted on Ctrl-C, the newest checkpoint stays.
    """
    learners = config.learners
    # As each learner will, but here, before anything is started.
    recipe.check_learners(config, Group(0, learners.num_workers))
    recipe.refuse_foreign_folder(config.run_dir, config, recipe.open_task(config).store.digest)
    config = config.model_copy(update={"output_dir": config.output_dir.absolute()})
    with _cluster():
        resources = _resources_per_worker(config)
        say(f"{learners.num_workers} learners with {resources} each")
        trainer = TorchTrainer(
            _learn,  # type: ignore[arg-type]
            train_loop_config=config.model_dump(mode="json"),
            torch_config=TorchConfig(
                backend="cpu:gloo,cuda:nccl" if resources.get("GPU") else "gloo", timeout_s=int(learners.timeout)
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
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        try:
            answer = trainer.fit().return_value  # type: ignore[attr-defined]
        except KeyboardInterrupt:
            raise Interrupted("stopped; run the same command to go on from the newest checkpoint") from None
        except ray.train.TrainingFailedError as error:
            raise ResourceError(_why(error, learners.max_failures)) from error
    if (kind := answer.get("error")) is not None:
        raise next(each for each in FINAL if each.__name__ == kind)(answer["message"])
    return answer


def _learn(tree: dict[str, Any]) -> dict[str, Any]:
    """One learner: the recipe's result, or its error where another try would meet it again."""
    if torch.cuda.is_available():
        torch.cuda.set_device(get_device())
    # A line for every report; Ray names this logger after its file.
    logging.getLogger(train_context.__file__).setLevel(logging.WARNING)
    config = parse_config(tree, where="the submitted config")
    try:
        # Ray Train would show what is printed twice.
        return recipe.train(config, _say, ray.train.report)
    except SilentLearner:
        raise  # the one that died is the cause: Ray starts the group again
    except FINAL as error:
        kind = next(each for each in FINAL if isinstance(error, each))
        return {"error": kind.__name__, "message": str(error)}


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


class _cluster:
    """Ray, connected; a connection that was there before stays."""

    def __enter__(self) -> None:
        self._mine = not ray.is_initialized()
        if self._mine:
            try:
                ray.init(logging_level=logging.ERROR, include_dashboard=None)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise InputError(
                    f"cannot join or start a Ray cluster ({' '.join(str(error).split())[:200]}); see that RAY_ADDRESS, "
                    "RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH are those of its head"
                ) from error

    def __exit__(self, *_: object) -> None:
        if self._mine:
            ray.shutdown()


def _resources_per_worker(config: Config) -> dict[str, float]:
    """What each learner takes. Raises InputError, naming what is missing, where the cluster does not have it for all:
    Ray itself would wait for it for ever."""
    learners, there = config.learners, ray.cluster_resources()
    each = learners.resources_per_worker or ({"CPU": 1, "GPU": 1} if there.get("GPU") else {"CPU": 1})
    for kind, amount in each.items():
        needed = amount * learners.num_workers
        if there.get(kind, 0) < needed:
            nodes = sum(1 for node in ray.nodes() if node["Alive"])
            raise InputError(
                f"learners.num_workers {learners.num_workers} need {needed:g} {kind} and the cluster ({nodes} nodes) "
                f"has {there.get(kind, 0):g}; start more nodes, or lower num_workers or learners.resources_per_worker"
            )
    return each


def _why(error: "ray.train.TrainingFailedError", max_failures: int) -> str:
    """One line from what may be pages: the learner that was lost first, and how."""
    failures = getattr(error, "worker_failures", {})
    named = {rank: e.cause if isinstance(e, RayTaskError) else e for rank, e in failures.items()}
    # One that only lost its partner says nothing of the cause.
    causes = {rank: e for rank, e in named.items() if not isinstance(e, SilentLearner)} or named
    rank, cause = next(iter(causes.items()), (None, error))
    text = " ".join(str(cause).split())[:300]
    if isinstance(cause, OutOfMemoryError):
        text = f"out of memory on its host: {text}"
    who = "training" if rank is None else f"learner {rank}"
    return (
        f"{who} failed more often than learners.max_failures {max_failures} ({text}); "
        "run the same command to go on from the newest checkpoint"
    )
