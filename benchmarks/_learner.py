"""What ``learners.py`` measures, as processes: a group of learners that train side by side and do what they are told.

Every learner holds a policy, a stage and an engine of each kind, all from the same weights.
"""

import os
import socket
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stdist.config import LearnersConfig
from stdist.runs.recipes import parse_config
from stdist.training.checkpoint import StageCheckpoints
from stdist.training.engine import MOMENTS, Engine
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import VisionLLMConfig
from stdist.vision_llm.dataset import open_dataset, policy_spec
from stdist.vision_llm.learning import make_engine
from stdist.vision_llm.policy.adapters import add_lora, train_only
from stdist.vision_llm.policy.checkpoints import build_policy
from stdist.vision_llm.policy.city_windows import CityWindows
from stdist.vision_llm.run import PolicyFiles
from stdist.vision_llm.stages.sft import SFTStage

ENGINES = {"torch": LearnersConfig()} | {
    f"zero{stage}": LearnersConfig(engine="deepspeed", zero_stage=stage) for stage in (1, 2, 3)
}
PLAIN_LINEAR = nn.functional.linear
"""ZeRO-3 puts its own in this place, for all models of a process: here only while its own trainer is at work."""


@dataclass(frozen=True)
class Step:
    """``loss``, ``tokens``: over all learners."""

    seconds: float
    loss: float
    tokens: float


@dataclass(frozen=True)
class Bytes:
    """What a learner holds between a step's last backward pass and its update.

    ``moments``: AdamW's two. ``masters``: the optimizer's own copy of the weights. ``gradients``: what the update will
    read. ``weights``: of the whole policy, frozen ones too.
    """

    moments: int
    masters: int
    gradients: int
    weights: int


@dataclass(frozen=True)
class Saved:
    """``call``: seconds that ``save`` takes. ``settled``: seconds until the checkpoint counts. ``steps``: made in them
    after the call."""

    call: float
    settled: float
    steps: int


class Trainer:
    """SFT with one kind of engine."""

    def __init__(self, kind: str, config: VisionLLMConfig, group: ProcessGroup, folder: Path):
        self._group = group
        dataset = open_dataset(config)
        self._policy = build_policy(policy_spec(config, dataset), config.seed)
        if config.sft.trainable == "lora":
            add_lora(self._policy, seed=config.seed)
        train_only(self._policy, config.sft.trainable, frames=True)
        city = CityWindows(self._policy, dataset.train, clamp=True)
        self._stage = SFTStage(self._policy, city, city, config.sft, config.seed, "direct", group)
        config = config.model_copy(update={"learners": ENGINES[kind]})
        self._engine: Engine = make_engine(config, config.sft, self._policy, group)
        self.linear, nn.functional.linear = nn.functional.linear, PLAIN_LINEAR
        self._checkpoints = StageCheckpoints(folder / f"{kind}-{group.size}", group)

    def step(self) -> Step:
        """As the loop makes one: what learners tell each other before the update belongs to it."""
        self._group.all_gather_object(None)
        start = time.perf_counter()
        mine = self._stage.step(self._engine.steps, self._engine.backward)
        everyones = self._group.all_gather_object(mine)
        self._engine.step()
        return Step(
            time.perf_counter() - start,
            statistics.mean(each["loss"] for each in everyones),
            sum(each["tokens"] for each in everyones),
        )

    def held(self) -> Bytes:
        """Counted in the middle of a step, which is finished."""
        self._stage.step(self._engine.steps, self._engine.backward)
        zero = getattr(self._engine, "_zero", None)
        optimizer = zero.optimizer if zero else self._engine._optimizer  # type: ignore[attr-defined]
        parameters = [*self._policy.parameters()]
        result = Bytes(
            moments=_bytes(state[key] for state in optimizer.state.values() for key in MOMENTS),
            masters=_bytes(optimizer.state) if zero else 0,
            gradients=_bytes(_gradients(zero, parameters)),
            weights=_bytes(
                [*(p.data for p in parameters), *(p.ds_tensor for p in parameters if hasattr(p, "ds_tensor"))]
            ),
        )
        self._engine.step()
        return result

    def save(self, beside: bool) -> Saved:
        """``beside``: goes on training until the checkpoint counts, as the loop does; else waits for it."""
        self._group.all_gather_object(None)
        start, step, steps = time.perf_counter(), self._engine.steps, 0
        self._checkpoints.save(step, PolicyFiles(self._policy).snapshot, self._engine, {})
        call = time.perf_counter() - start
        if not beside:
            self._checkpoints.wait()
        while not self._checkpoints.step_dir(step).exists():
            self.step()
            steps += 1
            self._checkpoints.wait(wait=False)
        return Saved(call, time.perf_counter() - start, steps)


def _weights(parameters: list[nn.Parameter]) -> Iterator[Tensor]:
    """This learner's part under ZeRO-3, and all that is whole at the moment."""
    for parameter in parameters:
        yield parameter.data
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor


def _gradients(zero: Any, parameters: list[nn.Parameter]) -> Iterator[Tensor]:
    """What the update will read; ``zero``: DeepSpeed's optimizer, None for plain torch."""
    yield from (p.grad for p in parameters if p.grad is not None)
    if hasattr(zero, "grad_partitions_flat_buffer"):  # ZeRO-3
        yield zero.grad_partitions_flat_buffer
    elif zero is not None:
        for kept in (zero.averaged_gradients, zero.all_grad_tensors):
            yield from (tensor for tensors in kept.values() for tensor in tensors or () if tensor is not None)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the memory behind them; what several share counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Learners:
    """``size`` processes that train together, one thread each; a method of their trainers is called in all at once."""

    def __init__(self, size: int, kinds: Sequence[str], config: VisionLLMConfig, folder: Path):
        context, port = get_context("spawn"), _free_port()
        self._pipes: list[Connection] = []
        self._processes: list[SpawnProcess] = []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = (there, rank, size, port, kinds, config.model_dump(mode="json"), folder)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
        self._answers()

    def call(self, kind: str, method: str, *arguments: Any) -> list[Any]:
        """What each learner answers, in the order of their ranks."""
        for pipe in self._pipes:
            pipe.send((kind, method, arguments))
        return self._answers()

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()

    def _answers(self) -> list[Any]:
        try:
            return [pipe.recv() for pipe in self._pipes]
        except EOFError:
            raise SystemExit("error: a learner died; what it wrote is above") from None


def _serve(
    pipe: Connection, rank: int, size: int, port: int, kinds: Sequence[str], tree: dict[str, Any], folder: Path
) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # as launchers do
    if size > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    config = parse_config(tree, where="the benchmark's config")
    trainers = {kind: Trainer(kind, config, ProcessGroup(rank, size), folder) for kind in kinds}
    pipe.send(None)
    with suppress(EOFError):  # the benchmark is over
        while True:
            kind, method, arguments = pipe.recv()
            nn.functional.linear = trainers[kind].linear
            pipe.send(getattr(trainers[kind], method)(*arguments))


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
