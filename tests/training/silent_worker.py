"""Two learners of which one falls silent, for test_guards.py.

    python silent_worker.py RANK FOLDER TIMEOUT PHASE

Learner 1 writes FOLDER/ready in its third step and waits to be stopped or killed. Learner 0 is then alone in a real
collective of gloo: the loop's own gather (PHASE ``step``), or a stage's all-reduce (``evaluation``).
"""

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from stdist.errors import ResourceError
from stdist.training.engine import ParameterGroup, TorchEngine
from stdist.training.loop import LoopSettings, Trainer
from stdist.training.loop import Stage as LoopStage
from stdist.training.process_group import ProcessGroup


class Stage(LoopStage):
    """One weight, each learner's the same."""

    name, monitor, headline = "toy", None, ()

    def __init__(self, rank: int, folder: Path, phase: str):
        self.rank, self.folder, self.phase, self.evaluations = rank, folder, phase, 0
        self.weight = torch.nn.Parameter(torch.ones(1))

    def fall_silent(self) -> None:
        if self.rank == 1:
            (self.folder / "ready").touch()
            time.sleep(600)

    def step(self, step: int, backward: Callable[[Tensor], None]) -> dict[str, float]:
        if step == 2 and self.phase == "step":
            self.fall_silent()
        backward(self.weight.sum())
        return {"loss": 1.0}

    def evaluate(self) -> dict[str, float]:
        self.evaluations += 1
        if self.evaluations == 2 and self.phase == "evaluation":
            self.fall_silent()
        total = torch.ones(1)
        dist.all_reduce(total)
        return {"total": float(total)}

    def describe_batch(self, step: int) -> str:
        return "nothing"

    def snapshot(self) -> Callable[[Path], None]:
        copy = {"weight": self.weight.detach().clone()}
        return lambda path: save_file(copy, path / "model.safetensors")

    def read(self, path: Path) -> None:
        self.weight.data.copy_(load_file(path / "model.safetensors")["weight"])


def main(rank: int, folder: Path, timeout: float, phase: str) -> None:
    # The time-out is for what comes now, not for the start of a process on a busy machine.
    (folder / f"started-{rank}").touch()
    while not (folder / f"started-{1 - rank}").exists():
        time.sleep(0.01)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=timeout))
    stage = Stage(rank, folder, phase)
    engine = TorchEngine([ParameterGroup({"weight": stage.weight}, 0.1, 0.0)], lambda step: 1.0, 1.0)
    settings = LoopSettings(max_steps=4, logging_steps=1, save_steps=9, eval_steps=2)
    try:
        Trainer(folder, ProcessGroup.current(), print).fit(stage, stage, lambda: engine, settings)
    except ResourceError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(5)  # as a process that leaves without asking the silent learner


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
