"""A linear model trained by the real loop, engine, checkpoints and log; as a script, a process for tests to kill.

    python toy.py RUN_DIR HANG_AT

hangs inside step HANG_AT: it writes RUN_DIR/hanging and goes on once RUN_DIR/go_on exists.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stdist.training.checkpoint import StageCheckpoints
from stdist.training.engine import ParameterGroup, TorchEngine, cosine_schedule
from stdist.training.loop import LoopSettings, Stage, Trainer

MAX_STEPS = 24
SETTINGS = LoopSettings(max_steps=MAX_STEPS, logging_steps=1, save_steps=3, eval_steps=8)


class ToyStage(Stage):
    """y = x·w* with a batch that depends on the step's number; ``on_step`` may look at a step before it is made."""

    name = "toy"
    headline = ("error",)

    def __init__(self, monitor: str | None = None, on_step: Callable[[int], None] = lambda step: None):
        self.monitor, self.on_step = monitor, on_step
        self.model = torch.nn.Linear(3, 1)
        with torch.no_grad():
            self.model.weight.copy_(torch.tensor([[0.5, -0.25, 0.125]]))
            self.model.bias.zero_()
        self.evaluations: list[float] | None = None

    def step(self, step: int, backward: Callable[[torch.Tensor], None]) -> dict[str, float]:
        self.on_step(step)
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 3, generator=generator)
        loss = (self.model(x) - x @ torch.tensor([[1.0], [2.0], [3.0]])).pow(2).mean()
        backward(loss)
        return {"loss": loss.item()}

    def evaluate(self) -> dict[str, float]:
        """Distance from w*, or the next of ``evaluations`` where a test has set them."""
        error = (self.model.weight - torch.tensor([1.0, 2.0, 3.0])).norm().item()
        return {"error": self.evaluations.pop(0) if self.evaluations else error}

    def describe_batch(self, step: int) -> str:
        return f"batch {step}"

    def snapshot(self) -> Callable[[Path], None]:
        copy = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        return lambda path: save_file(copy, path / "model.safetensors")

    def read(self, path: Path) -> None:
        self.model.load_state_dict(load_file(path / "model.safetensors"))

    def engine(self, max_grad_norm: float = 1.0) -> TorchEngine:
        schedule = cosine_schedule(2, MAX_STEPS)
        return TorchEngine([ParameterGroup(dict(self.model.named_parameters()), 0.1, 0.01)], schedule, max_grad_norm)


class PromptCheckpoints(StageCheckpoints):
    """Waits for the writer after every step: how far it got by then is the machine's business and no test's."""

    def wait(self, block: bool = True) -> None:
        super().wait()


class PromptTrainer(Trainer):
    def checkpoints(self, stage: str) -> StageCheckpoints:
        return PromptCheckpoints(self.run_dir / "checkpoints" / stage)


def run(
    run_dir: Path, stage: ToyStage, settings: LoopSettings = SETTINGS, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Runs or resumes the stage in ``run_dir``; returns the loop's closing summary."""
    run_dir.mkdir(exist_ok=True)
    trainer = PromptTrainer(run_dir, log=log)
    try:
        return trainer.fit(stage, stage, stage.engine, settings)
    finally:
        trainer.close()


if __name__ == "__main__":
    folder, hang_at = Path(sys.argv[1]), int(sys.argv[2])

    def hang(step: int) -> None:
        if step == hang_at:
            (folder / "hanging").touch()
            while not (folder / "go_on").exists():
                time.sleep(0.005)

    torch.set_num_threads(1)
    run(folder, ToyStage(on_step=hang))
