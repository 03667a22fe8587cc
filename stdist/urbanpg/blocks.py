"""UrbanPG on more nodes than fit: they pass in blocks, twice, once for the sums of Eq. 6 and once for the outputs.

Autograd keeps a block's inputs alone and computes the block again when its gradient is due (Chen et al., arXiv
1604.06174): first every block's outputs, which completes the gradient of the maps and so of the sums, then every
block's sums. All of it is cheap but the MLP's hidden layer, which is kept: it has the one product of d x d per node.
What grows with N is the history, the forecasts, the prompts' rows, their gradient, and the hidden layer, as large as
the rows; all other activations are of one block.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import accumulate, chain
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from stdist.errors import InputError
from stdist.urbanpg.model import IntoAttention, Maps, Pair, UrbanPG, hidden_layer


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

    Exact: values and gradients differ in the order of additions only.
    """
    if block_nodes < 1:
        raise InputError(f"block_nodes {block_nodes}: give at least 1")
    model.check(history, slot, weekday)
    backbone, prompts, draw = model.backbone, model.prompts, model.draw(draw)
    temporal, rows = prompts.temporal(slot, weekday), prompts.rows()
    gradient = _GradientOfRows()
    token = None if rows is None else _Rows.apply(rows, gradient)

    def inputs(history: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
        x = prompts.normalise(history)
        if rows is None:
            return x, None
        block = _RowsOfBlock.apply(token, rows.detach(), slice(first, first + history.shape[2]), gradient)
        return x, prompts.perturb(block, first, draw)

    def sums_of(history: Tensor, first: int, into: IntoAttention) -> Tensor:
        return backbone.sums(*inputs(history, first), into)

    def outputs_of(history: Tensor, first: int, maps: Maps, kept: list[Tensor]) -> Tensor:
        x, spatial = inputs(history, first)

        def hidden(pairs: Sequence[Pair]) -> Tensor:
            return _KeptHidden.apply(kept, *chain(*pairs)) if torch.is_grad_enabled() else hidden_layer(pairs)

        return prompts.restore(backbone.outputs(x, maps, spatial, hidden))

    # As equal as can be: a last block of a few nodes would cost nearly what a whole one does.
    parts = history.tensor_split(-(-history.shape[2] // block_nodes), 2)
    blocks = list(zip(parts, accumulate((part.shape[2] for part in parts), initial=0), strict=False))
    into, sums = None, None
    if backbone.spec.stca:
        into = backbone.into_attention()
        sums = model.meet(reduce(torch.add, (_recomputed(sums_of, *block, into) for block in blocks)))
    maps = backbone.maps(sums, temporal, into)
    return torch.cat([_recomputed(outputs_of, *block, maps, []) for block in blocks], 2)


def _recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    # Draws depend on their numbers alone, so torch's generators need no rewinding.
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class _KeptHidden(torch.autograd.Function):
    """``hidden_layer``, which is made once: the recomputation takes its value out of the list ``kept``."""

    @staticmethod
    def forward(ctx, kept: list[Tensor], *rows_and_maps: Tensor) -> Tensor:
        again = bool(kept)
        value = kept.pop() if again else hidden_layer(_pairs(rows_and_maps))
        if not again:
            kept.append(value.detach())
        ctx.save_for_backward(*rows_and_maps, value)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *rows_and_maps, value = ctx.saved_tensors
        gradient = gradient * (value > 0)
        needed = iter(ctx.needs_input_grad[1:])
        gradients: list[Tensor | None] = [None]
        for rows, of_rows in _pairs(rows_and_maps):
            gradients.append(_summed(gradient @ of_rows.mT, rows) if next(needed) else None)
            gradients.append(_summed(rows.mT @ gradient, of_rows) if next(needed) else None)
        return tuple(gradients)


def _pairs(rows_and_maps: Sequence[Tensor]) -> list[Pair]:
    return list(zip(rows_and_maps[::2], rows_and_maps[1::2], strict=True))


def _summed(gradient: Float[Tensor, "B r m"], of: Float[Tensor, "b r m"]) -> Float[Tensor, "b r m"]:
    return gradient if len(of) == len(gradient) else gradient.sum(0, keepdim=True)


class _GradientOfRows:
    """dL/dE_s [N, d], of which every block gives its rows, once for the outputs and once for the sums."""

    def __init__(self) -> None:
        self._whole: Tensor | None = None
        self._filled: set[int] = set()

    def add(self, of_block: Tensor, block: slice, shape: torch.Size) -> None:
        if self._whole is None:
            self._whole = of_block.new_empty(shape)
        if block.start in self._filled:
            self._whole[block] += of_block
        else:
            self._whole[block] = of_block
            self._filled.add(block.start)

    def take(self) -> Tensor:
        whole, self._whole = self._whole, None
        self._filled.clear()
        assert whole is not None
        return whole


class _Rows(torch.autograd.Function):
    """E_s [N, d] as a token of which blocks are cut; its gradient is what they have left in ``gradient``.

    Plain slices would each have a gradient of E_s's own size, and a split would hold all blocks' and join them.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, gradient: _GradientOfRows) -> Tensor:
        ctx.gradient = gradient
        return rows.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.take(), None


class _RowsOfBlock(torch.autograd.Function):
    """Forward: the rows ``block`` of ``rows``. Backward: their part of the one gradient."""

    @staticmethod
    def forward(ctx, token: Tensor, rows: Tensor, block: slice, gradient: _GradientOfRows) -> Tensor:
        ctx.shape, ctx.block, ctx.gradient = rows.shape, block, gradient
        return rows[block]

    @staticmethod
    @once_differentiable
    def backward(ctx, of_block: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.gradient.add(of_block, ctx.block, ctx.shape)
        return of_block.new_zeros(()), None, None, None
