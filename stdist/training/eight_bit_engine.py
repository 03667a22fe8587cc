"""AdamW with moments of eight bits, by bitsandbytes (Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
arXiv 2110.02861), behind the engine of plain torch.

A block is 256 elements with a scale of its own, and tensors of fewer than 4,096 elements keep float32. Numeral rows of
2,048 or 3,584 numbers are whole blocks: no row's scale is another row's.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from stdist.errors import InputError
from stdist.training.engine import BETAS, ParameterGroup, TorchEngine, torch_groups

BLOCK, SMALLEST = 256, 4096
STATE = ("state1", "state2", "absmax1", "absmax2")
"""A parameter's moments and their scales, as bitsandbytes calls them; its tables of values are the same for all."""


class EightBitEngine(TorchEngine):
    """See :class:`stdist.training.engine.Engine`. ``paged``: on a GPU moments lie in memory that the driver moves to
    the CPU's where the step needs the room."""

    def __init__(
        self,
        groups: Iterable[ParameterGroup],
        schedule: Callable[[int], float],
        max_grad_norm: float,
        paged: bool = False,
    ):
        super().__init__(groups, schedule, max_grad_norm, partial(_adamw_8bit, paged=paged))

    def state(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.parameters.items():
            if held := self._optimizer.state.get(parameter):
                yield f"{name}/step", torch.tensor(float(held["step"]))
                for key in STATE:
                    if key in held:
                        yield f"{name}/{key}", held[key]

    def load_state(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        optimizer: Any = self._optimizer
        named = {parameter: name for name, parameter in self.parameters.items()}
        for g, group in enumerate(optimizer.param_groups):
            for p, parameter in enumerate(group["params"]):
                name = named[parameter]
                if f"{name}/step" not in tensors:
                    continue  # it has not had a gradient yet
                optimizer.init_state(group, parameter, g, p)
                held = optimizer.state[parameter]
                held["step"] = int(tensors[f"{name}/step"])
                for key in STATE:
                    if key in held:
                        held[key].copy_(tensors[f"{name}/{key}"])
        self._steps = steps


def require_bitsandbytes(key: str) -> None:
    """Raises InputError, naming the configuration's ``key``, where it is not installed."""
    if find_spec("bitsandbytes") is None:
        raise InputError(f"{key} needs bitsandbytes: pip install 'stdist[quantised]'")


def moment_bytes(elements: int) -> int:
    """Bytes of both moments of a tensor, their scales included."""
    return 8 * elements if elements < SMALLEST else 2 * (elements + 4 * -(-elements // BLOCK))


def _adamw_8bit(groups: Iterable[ParameterGroup], paged: bool) -> torch.optim.Optimizer:
    # Seconds to import, and not installed everywhere.
    from bitsandbytes.optim import AdamW8bit

    given = torch_groups(groups)
    on_gpu = all(parameter.is_cuda for group in given for parameter in group["params"])
    return AdamW8bit(given, betas=BETAS, min_8bit_size=SMALLEST, is_paged=paged and on_gpu)
