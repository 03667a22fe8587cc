"""UrbanPG on more nodes than fit: they pass in blocks, twice, once for the sums of Eq. 6 and once for the forecasts.

Autograd keeps a block's inputs alone and computes the block again when its gradient is due (Chen et al., arXiv
1604.06174): first every block's forecasts, which completes the gradient of the maps and so of the sums, then every
block's sums. All of it is cheap but the MLP's hidden layer, which is kept: it has the one product of d x d per node.
What grows with N is the history, the forecasts, E_s, its gradient, and the hidden layer, as large as E_s; all other
activations are of one block.
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
from stdist.urbanpg.backbone import Backbone, NodeMaps, QKVMaps, Term, hidden_layer
from stdist.urbanpg.prompts import ContextPrompts


def forward_in_blocks(
    backbone: Backbone,
    prompts: ContextPrompts,
    all_reduce: Callable[[Tensor], Tensor],
    history: Float[Tensor, "B S N"],
    slot: Int64[Tensor, " B"],
    weekday: Int64[Tensor, " B"],
    block_nodes: int,
    noise_seed: int | None,
) -> Float[Tensor, "B K N"]:
    """``UrbanPG.forward`` on checked input, ``block_nodes`` nodes at a time; ``all_reduce`` makes the whole city's sums
    of Eq. 6 of these nodes'. Exact: values and gradients differ in the order of additions only."""
    if block_nodes < 1:
        raise InputError(f"block_nodes {block_nodes}: give at least 1")
    temporal, embeddings = prompts.temporal(slot, weekday), prompts.node_embeddings()
    gradient = _EmbeddingGradient()
    token = None if embeddings is None else _Embeddings.apply(embeddings, gradient)

    def inputs(history: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
        x = prompts.normalise(history)
        if embeddings is None:
            return x, None
        block = slice(first, first + history.shape[2])
        return x, prompts.perturb(_Block.apply(token, embeddings.detach(), block, gradient), first, noise_seed)

    def attention_sums(history: Tensor, first: int, qkv: QKVMaps) -> Tensor:
        return backbone.attention_sums(*inputs(history, first), qkv)

    def forecasts(history: Tensor, first: int, maps: NodeMaps, kept: list[Tensor]) -> Tensor:
        x, spatial = inputs(history, first)

        def hidden(terms: Sequence[Term]) -> Tensor:
            return _KeptHidden.apply(kept, *chain(*terms)) if torch.is_grad_enabled() else hidden_layer(terms)

        return prompts.restore(backbone.node_forecasts(x, maps, spatial, hidden))

    # As equal as can be: a last block of a few nodes would cost nearly what a full one does.
    parts = history.tensor_split(-(-history.shape[2] // block_nodes), 2)
    blocks = list(zip(parts, accumulate((part.shape[2] for part in parts), initial=0), strict=False))
    qkv, sums = None, None
    if backbone.spec.stca:
        qkv = backbone.qkv_maps()
        sums = all_reduce(reduce(torch.add, (_recomputed(attention_sums, *block, qkv) for block in blocks)))
    maps = backbone.node_maps(sums, temporal, qkv)
    return torch.cat([_recomputed(forecasts, *block, maps, []) for block in blocks], 2)


def _recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    # Noise depends on its seed alone, so torch's generators need no rewinding.
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class _KeptHidden(torch.autograd.Function):
    """``hidden_layer``, computed once: the recomputation takes its value out of the list ``kept``."""

    @staticmethod
    def forward(ctx, kept: list[Tensor], *factors: Tensor) -> Tensor:
        recomputing = bool(kept)
        value = kept.pop() if recomputing else hidden_layer(_terms(factors))
        if not recomputing:
            kept.append(value.detach())
        ctx.save_for_backward(*factors, value)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *factors, value = ctx.saved_tensors
        gradient = gradient * (value > 0)
        needed = iter(ctx.needs_input_grad[1:])
        gradients: list[Tensor | None] = [None]
        for features, map_ in _terms(factors):
            gradients.append(_summed(gradient @ map_.mT, features) if next(needed) else None)
            gradients.append(_summed(features.mT @ gradient, map_) if next(needed) else None)
        return tuple(gradients)


def _terms(factors: Sequence[Tensor]) -> list[Term]:
    return list(zip(factors[::2], factors[1::2], strict=True))


def _summed(gradient: Float[Tensor, "B r m"], of: Float[Tensor, "b r m"]) -> Float[Tensor, "b r m"]:
    return gradient if len(of) == len(gradient) else gradient.sum(0, keepdim=True)


class _EmbeddingGradient:
    """dL/dE_s [N, d], to which every block adds its rows, once for the forecasts and once for the sums."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._filled: set[int] = set()

    def add(self, of_block: Tensor, block: slice, shape: torch.Size) -> None:
        if self._total is None:
            self._total = of_block.new_empty(shape)
        if block.start in self._filled:
            self._total[block] += of_block
        else:
            self._total[block] = of_block
            self._filled.add(block.start)

    def take(self) -> Tensor:
        total, self._total = self._total, None
        self._filled.clear()
        assert total is not None
        return total


class _Embeddings(torch.autograd.Function):
    """E_s [N, d] as a token that blocks are cut of; its gradient is what they have left in ``gradient``.

    Plain slices would each have a gradient of E_s's own size, and a split would hold all blocks' and join them.
    """

    @staticmethod
    def forward(ctx, embeddings: Tensor, gradient: _EmbeddingGradient) -> Tensor:
        ctx.gradient = gradient
        return embeddings.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.take(), None


class _Block(torch.autograd.Function):
    """Forward: the nodes ``block`` of E_s. Backward: their part of the one gradient."""

    @staticmethod
    def forward(ctx, token: Tensor, embeddings: Tensor, block: slice, gradient: _EmbeddingGradient) -> Tensor:
        ctx.shape, ctx.block, ctx.gradient = embeddings.shape, block, gradient
        return embeddings[block]

    @staticmethod
    @once_differentiable
    def backward(ctx, of_block: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.gradient.add(of_block, ctx.block, ctx.shape)
        return of_block.new_zeros(()), None, None, None
