"""Evaluation mode around whatever only computes: evaluations, forecasts and candidates of a model that trains."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in evaluation mode and computes without gradients; behind it each of its parts is in the
    mode that it was in.

    Training mode costs more than it looks: layers that gradient checkpointing wraps save the random generators' state
    at every call, which no CUDA graph can record.
    """
    parts = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in parts:
            part.training = True
