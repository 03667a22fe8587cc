"""Attention of a tree node's tokens over its own keys and those of every ancestor, none of them copied per child.

Queries of all children of an ancestor are one long row of queries over its keys: a window's keys are read by all of its
cells' candidates in one call. The parts (own, causal; each ancestor, whole) are merged by their log-sum-exps.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stdist.vision_llm.kernels.attention import MATH, Attention

# The name under which transformers' decoder layers find `attend` (its `attn_implementation`).
IMPLEMENTATION = "stdist_tree"
# A decoder call that brings its own attention needs no mask from transformers.
NO_MASK = {"full_attention": None}


class Segment(NamedTuple):
    """One layer's keys and values of ``parents`` sequences; ``lengths`` where they are padded on the right."""

    keys: Float[Tensor, "parents kv_heads tokens d"]
    values: Float[Tensor, "parents kv_heads tokens d"]
    lengths: Int[Tensor, "parents"] | None = None


class TreeContext(Protocol):
    """What a decoder call passes down to its layers as ``tree``."""

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "sequences heads tokens d"],
        key: Float[Tensor, "sequences kv_heads tokens d"],
        value: Float[Tensor, "sequences kv_heads tokens d"],
        scale: float,
    ) -> Float[Tensor, "sequences tokens heads d"]: ...


def _attend(module, query, key, value, attention_mask, scaling=None, tree: TreeContext | None = None, **kwargs):
    """transformers' attention interface: through the tree where a call brings one, else its own SDPA."""
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return tree.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def tree_attention(
    attention: Attention,
    scale: float,
    query: Float[Tensor, "sequences heads tokens d"],
    own: Segment,
    ancestors: Sequence[Segment],
) -> Float[Tensor, "sequences tokens heads d"]:
    """Causal over the sequences' own keys, whole over their ancestors'.

    ``sequences`` is a multiple of each segment's parents; consecutive sequences share a parent. Differentiable in
    query, keys and values of all segments.
    """
    lengths = (None, *(segment.lengths for segment in ancestors))
    tensors = [tensor for segment in (own, *ancestors) for tensor in (segment.keys, segment.values)]
    return _TreeAttention.apply(attention, scale, lengths, query.transpose(1, 2).contiguous(), *tensors)


def merge(
    parts: Sequence[tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch"]]],
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch"]]:
    """Attention over the union of disjoint sets of keys, from (output, log-sum-exp) over each."""
    if len(parts) == 1:
        return parts[0]
    lse = parts[0][1]
    for _, other in parts[1:]:
        lse = torch.logaddexp(lse, other)
    (first, first_lse), *rest = parts
    out = first * (first_lse - lse).exp().unsqueeze(-1).to(first.dtype)
    for part, part_lse in rest:
        out.addcmul_(part, (part_lse - lse).exp().unsqueeze(-1).to(out.dtype))
    return out, lse


class _TreeAttention(torch.autograd.Function):
    """Layout: queries and outputs ``[sequences, tokens, heads, d]``, so that all children of a parent are one row."""

    @staticmethod
    def forward(ctx, attention: Attention, scale: float, lengths, query, *keys_values):
        parts = []
        for i, length in enumerate(lengths):
            keys, values = keys_values[2 * i : 2 * i + 2]
            kernel, padding = _kernel(attention, length)
            q = _rows(query, len(keys))
            groups = q.shape[1] // keys.shape[1]
            causal = i == 0
            out, lse = kernel.forward(q, _shared(keys, groups), _shared(values, groups), scale, causal, **padding)
            parts.append((_sequences(out, query.shape), _sequences(lse, query.shape[:3])))
        out, lse = merge(parts)
        out = out.contiguous()
        ctx.save_for_backward(query, out, lse, *keys_values)
        ctx.attention, ctx.scale, ctx.lengths = attention, scale, lengths
        return out

    @staticmethod
    def backward(ctx, grad):
        query, out, lse, *keys_values = ctx.saved_tensors
        grad = grad.contiguous()
        d_query = torch.zeros_like(query) if len(ctx.lengths) > 1 else None
        d_keys_values: list[Tensor] = []
        for i, length in enumerate(ctx.lengths):
            keys, values = keys_values[2 * i : 2 * i + 2]
            kernel, padding = _kernel(ctx.attention, length)
            parents, groups = len(keys), query.shape[2] // keys.shape[1]
            d_q, d_k, d_v = kernel.backward(
                *(_rows(grad, parents), _rows(query, parents), _shared(keys, groups), _shared(values, groups)),
                *(_rows(out, parents), _rows(lse, parents).contiguous(), ctx.scale, i == 0),
                **padding,
            )
            d_q = _sequences(d_q, query.shape)
            d_query = d_q if d_query is None else d_query.add_(d_q)
            d_keys_values += [d.unflatten(1, (-1, groups)).sum(2) if groups > 1 else d for d in (d_k, d_v)]
        return None, None, None, d_query, *d_keys_values


def _kernel(attention: Attention, lengths: Tensor | None):
    """Padded keys go through plain products; the fused kernels have no mask that all of them know."""
    return (attention, {}) if lengths is None else (MATH, {"lengths": lengths})


def _rows(x: Tensor, parents: int) -> Tensor:
    """``[sequences, tokens, heads, …]`` → ``[parents, heads, children·tokens, …]``, a view."""
    return x.reshape(parents, -1, *x.shape[2:]).transpose(1, 2)


def _sequences(x: Tensor, shape: torch.Size) -> Tensor:
    """Back from :func:`_rows`."""
    return x.transpose(1, 2).reshape(shape)


def _shared(x: Tensor, groups: int) -> Tensor:
    """Key-value heads as often as query heads read them (grouped-query attention)."""
    return x.repeat_interleave(groups, 1) if groups > 1 else x
