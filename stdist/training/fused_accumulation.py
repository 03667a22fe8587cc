"""Gradients that a kernel adds where they are held.

Autograd makes a parameter's gradient anew in every backward pass and adds it to ``.grad``: of the numerals' rows a
dense matrix as large as they are, of which a look-up fills a few rows. A kernel that knows better adds to ``.grad`` by
itself, as those of Megatron-LM's ``gradient_accumulation_fusion`` do. It may where nobody waits for autograd's own
adding, which DeepSpeed's hooks do: so the engine says for which parameters.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

FUSED = "gradient_accumulation_fusion"


def set_fused_accumulation(parameters: Iterable[torch.nn.Parameter], fused: bool) -> None:
    for parameter in parameters:
        setattr(parameter, FUSED, fused)


def fused_gradient(parameter: Tensor) -> Tensor | None:
    """``.grad`` of a parameter, for a kernel to add to, zeros where it had none yet; None where autograd has to."""
    if not getattr(parameter, FUSED, False):
        return None
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
