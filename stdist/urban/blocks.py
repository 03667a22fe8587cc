"""UrbanPG on more nodes than fit: they pass in blocks, twice, once for the sums of Eq. 6 and once for the outputs.

Autograd keeps a block's inputs alone and computes the block again when its gradient is due (Chen et al., arXiv
1604.06174): first every block's outputs, which completes the gradient of the sums, then every block's sums.
What grows with N is the history, the forecasts, the prompts' rows and their gradient; activations are of one block.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stdist.errors import InputError
from stdist.urban.urbanpg import UrbanPG


def forward_in_blocks(
    model: UrbanPG,
    history: Float[Tensor, "B S N"],
    slot: Int64[Tensor, "B"],
    weekday: Int64[Tensor, "B"],
    *,
    block_nodes: int,
    draw: int | None = None,
) -> Float[Tensor, "B K N"]:
    """What ``model(history, slot, weekday, draw=draw)`` gives, ``block_nodes`` nodes at a time; raises as it does.

    Exact: values and gradients differ in the order of additions only. A step computes every block twice.
    """
    if block_nodes < 1:
        raise InputError(f"block_nodes {block_nodes}: give at least 1")
    model.check(history, slot, weekday)
    backbone, prompts, draw = model.backbone, model.prompts, model.draw(draw)
    temporal, rows = prompts.temporal(slot, weekday), prompts.rows()
    histories = history.split(block_nodes, 2)
    # Split once, not sliced per block: the gradient of a slice is as large as what it was cut from.
    blocks = [None] * len(histories) if rows is None else rows.split(block_nodes)
    firsts = range(0, history.shape[2], block_nodes)

    def inputs(history: Tensor, rows: Tensor | None, first: int) -> tuple[Tensor, Tensor | None]:
        return prompts.normalise(history), None if rows is None else prompts.perturb(rows, first, draw)

    def sums_of(history: Tensor, rows: Tensor | None, first: int) -> Tensor:
        return backbone.sums(*inputs(history, rows, first))

    def outputs_of(history: Tensor, rows: Tensor | None, first: int, sums: Tensor | None) -> Tensor:
        x, spatial = inputs(history, rows, first)
        return prompts.restore(backbone.outputs(x, sums, temporal, spatial, model.total_nodes))

    streamed = list(zip(histories, blocks, firsts, strict=True))
    sums = None
    if backbone.spec.stca:
        sums = model.meet(reduce(torch.add, (_recomputed(sums_of, *block) for block in streamed)))
    return torch.cat([_recomputed(outputs_of, *block, sums) for block in streamed], 2)


def _recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    # Draws depend on their numbers alone, so torch's generators need no rewinding.
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
