"""Keys and values that several sequences share: a window's prompt for its cells, a cell's for its candidates.

The simplest real form: a child gets its own copy of the shared keys and values, in the graph, so gradients of all
children add up in the one prefix.
"""

from dataclasses import dataclass
from typing import cast

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


@dataclass
class Prefix:
    """Keys and values of ``sequences`` prompts; ``position`` is the M-RoPE position where every child starts."""

    cache: DynamicCache
    sequences: int
    position: int


def repeated(prefix: Prefix, times: int) -> Prefix:
    """A prefix whose every sequence appears ``times`` times in a row; gradients add up in the original."""
    copy = DynamicCache()
    for index, layer in enumerate(cast(list[DynamicLayer], prefix.cache.layers)):
        keys, values = (cast(Tensor, part).repeat_interleave(times, dim=0) for part in (layer.keys, layer.values))
        copy.update(keys, values, index)
    return Prefix(copy, prefix.sequences * times, prefix.position)
