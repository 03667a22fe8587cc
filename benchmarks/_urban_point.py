"""One point of ``urbanpg_scaling.py``, in a process of its own: seconds of each step, and the peak of resident bytes.

Run by the Python of whichever environment has the model, so it imports nothing of stdist itself:

    python benchmarks/_urban_point.py '{"module": "_urban_ours", "model": "urbanpg", "nodes": 716, …}'
"""

import json
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from _harness import peak_bytes, reset_peak, seconds
from torch import Tensor, nn

S = K = 12
BATCH = 1
MEAN, STD = 100.0, 40.0
"""Of the synthetic traffic, in its units."""

Made = tuple[nn.Module, Callable[[Tensor], Tensor]]
"""A model, and its forecasts [B, K, N] of a history [B, S, N]."""


def measure(
    model: nn.Module, forecast: Callable[[Tensor], Tensor], nodes: int, mode: str, steps: int
) -> dict[str, Any]:
    """``mode``: ``training`` (forward, backward and AdamW in one step) or ``inference``. The first step, which is not
    timed, counts for memory: gradients and moments are made in it."""
    history, target = (MEAN + STD * torch.randn(2, BATCH, S, nodes)).unbind(0)
    model.train(mode == "training")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def train() -> None:
        optimizer.zero_grad()
        (forecast(history) - target).abs().mean().backward()
        optimizer.step()

    def infer() -> None:
        with torch.inference_mode():
            forecast(history)

    step = train if mode == "training" else infer
    before = reset_peak()
    step()
    taken = [seconds(step) for _ in range(steps)]
    return {
        "seconds": taken,
        "peak_bytes": peak_bytes() - before,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main() -> None:
    point = json.loads(sys.argv[1])
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    module, mode, steps = (point.pop(key) for key in ("module", "mode", "steps"))
    print(json.dumps(measure(*import_module(module).make(**point), point["nodes"], mode, steps)))


if __name__ == "__main__":
    main()
