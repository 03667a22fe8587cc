"""Moments at which a learner waits for a test, so that it is killed, stopped or told to stop exactly there."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from stdist.nodes.stage import ForecastStage
from stdist.training import checkpoint
from stdist.vision_llm.stages.alignment import AlignmentStage
from stdist.vision_llm.stages.grpo import GRPOStage
from stdist.vision_llm.stages.sft import SFTStage

TRAP, TRAPPED = "trap", "trapped"


def install(folder: Path) -> None:
    """FOLDER/trap names a moment: "step STAGE NUMBER RANK", in a step whose gradient is half there, or "checkpoint
    STAGE NUMBER RANK", with half of the learner's first file written. The learner that comes there writes its process
    id into FOLDER/trapped and waits until FOLDER/trap is gone; with "interrupt STAGE NUMBER RANK" it gets a Ctrl-C."""

    def reach(moment: str) -> None:
        try:
            armed = (folder / TRAP).read_text()
        except FileNotFoundError:
            return
        if armed == f"interrupt {moment.removeprefix('step ')}":
            (folder / TRAP).unlink()
            os.kill(os.getpid(), signal.SIGINT)
        elif armed == moment:
            written = folder / f"{TRAPPED}.partial"
            written.write_text(str(os.getpid()))
            os.replace(written, folder / TRAPPED)
            while (folder / TRAP).exists():
                time.sleep(0.02)

    for kind in (AlignmentStage, SFTStage, GRPOStage, ForecastStage):
        kind.step = _reaching_in_mid_step(kind.step, reach)  # type: ignore[assignment]
    checkpoint.save_file = _half_written(checkpoint.save_file, reach)  # type: ignore[attr-defined]


def _reaching_in_mid_step(step: Callable[..., dict[str, float]], reach: Callable[[str], None]) -> Callable[..., Any]:
    def wrapped(stage: Any, number: int, backward: Callable[[Tensor], None]) -> dict[str, float]:
        def then_reach(loss: Tensor) -> None:
            backward(loss)
            reach(f"step {stage.name} {number + 1} {dist.get_rank()}")

        return step(stage, number, then_reach)

    return wrapped


def _half_written(save_file: Callable[..., None], reach: Callable[[str], None]) -> Callable[..., None]:
    def wrapped(tensors: dict[str, Tensor], path: Path) -> None:
        save_file(tensors, path)
        os.truncate(path, path.stat().st_size // 2)
        stage, step = path.parts[-4], path.parts[-3].removeprefix("step-").removesuffix(".partial")
        reach(f"checkpoint {stage} {step} {int(path.name.split('-')[1])}")
        save_file(tensors, path)

    return wrapped
