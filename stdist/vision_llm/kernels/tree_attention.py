"""Attention of a tree node's tokens over its keys and those of every ancestor, none of them copied per child.

Queries of all children of an ancestor stand side by side over its keys: a window's keys are read by all of its cells'
candidates in one call. The parts (the node's, causal; every ancestor's, all of it) are merged by their log-sum-exps.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stdist.vision_llm.kernels.attention import Attention

# The name under which transformers' decoder layers find `attend` (its `attn_implementation`).
IMPLEMENTATION = "stdist_tree"
# A decoder call that brings its own attention needs no mask from transformers.
NO_MASK = {"full_attention": None}


class Segment(NamedTuple):
    """One layer's keys and values of ``parents`` sequences."""

    keys: Float[Tensor, "parents kv_heads tokens d"]
    values: Float[Tensor, "parents kv_heads tokens d"]


class TreeContext(Protocol):
    """The attention that a decoder call passes down to its layers as ``tree``."""

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
    node: Segment,
    ancestors: Sequence[Segment],
) -> Float[Tensor, "sequences tokens heads d"]:
    """Causal over the sequences' keys in ``node``, unmasked over their ancestors'.

    ``sequences`` is a multiple of each segment's parents; consecutive sequences share a parent. Differentiable in
    query, keys and values of all segments.
    """
    tensors = [tensor for segment in (node, *ancestors) for tensor in segment]
    return _TreeAttention.apply(attention, scale, query.transpose(1, 2).contiguous(), *tensors)


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
    """Layout: queries and outputs ``[sequences, tokens, heads, d]``, so that all children of a parent lie together."""

    @staticmethod
    def forward(ctx, attention: Attention, scale: float, query, *keys_values):
        parts: list[tuple[Tensor, Tensor]] = []
        for keys, values in zip(keys_values[::2], keys_values[1::2], strict=True):
            q = _by_parent(query, len(keys))
            groups = q.shape[1] // keys.shape[1]
            causal = not parts
            out, lse = attention.forward(q, _shared(keys, groups), _shared(values, groups), scale, causal)
            parts.append((_by_sequence(out, query.shape), _by_sequence(lse, query.shape[:3])))
        out, lse = merge(parts)
        out = out.contiguous()
        ctx.save_for_backward(query, out, lse, *keys_values)
        ctx.attention, ctx.scale = attention, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        query, out, lse, *keys_values = ctx.saved_tensors
        grad = grad.contiguous()
        d_query = torch.zeros_like(query) if len(keys_values) > 2 else None
        d_keys_values: list[Tensor] = []
        for keys, values in zip(keys_values[::2], keys_values[1::2], strict=True):
            parents, groups = len(keys), query.shape[2] // keys.shape[1]
            causal = not d_keys_values
            d_q, d_k, d_v = ctx.attention.backward(
                *(_by_parent(grad, parents), _by_parent(query, parents)),
                *(_shared(keys, groups), _shared(values, groups)),
                *(_by_parent(out, parents), _by_parent(lse, parents).contiguous(), ctx.scale, causal),
            )
            d_q = _by_sequence(d_q, query.shape)
            d_query = d_q if d_query is None else d_query.add_(d_q)
            d_keys_values += [d.unflatten(1, (-1, groups)).sum(2) if groups > 1 else d for d in (d_k, d_v)]
        return None, None, d_query, *d_keys_values


def _by_parent(x: Tensor, parents: int) -> Tensor:
    """``[sequences, tokens, heads, …]`` → ``[parents, heads, children·tokens, …]``, a view."""
    return x.reshape(parents, -1, *x.shape[2:]).transpose(1, 2)


def _by_sequence(x: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of :func:`_by_parent`."""
    return x.transpose(1, 2).reshape(shape)


def _shared(x: Tensor, groups: int) -> Tensor:
    """Key-value heads as often as query heads read them (grouped-query attention)."""
    return x.repeat_interleave(groups, 1) if groups > 1 else x
