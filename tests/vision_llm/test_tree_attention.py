"""Attention over a node's own keys and its ancestors' is attention over all of them side by side."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stdist.vision_llm.kernels.attention import MATH, Attention, SDPAOnCPU
from stdist.vision_llm.kernels.tree_attention import IMPLEMENTATION, Segment, merge, tree_attention
from stdist.vision_llm.policy.model import PolicyModel

SCALE = 0.3
D = 8
BACK_ENDS = pytest.mark.parametrize("backend", [MATH, SDPAOnCPU()], ids=lambda backend: backend.name)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- merging -------------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(-1, -2)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 1000))
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
def test_merged_parts_equal_attention_over_all_keys(sizes: list[int], seed: int) -> None:
    """out = Σ out_i · exp(lse_i − lse) with lse = log Σ exp(lse_i)."""
    q, k, v = draw(2, 3, 4, D, seed=seed), draw(2, 3, sum(sizes), D, seed=seed + 1), draw(2, 3, sum(sizes), D, seed=1)
    parts = [attend(q, *pair) for pair in zip(k.split(sizes, 2), v.split(sizes, 2), strict=True)]
    before = [(out.clone(), lse.clone()) for out, lse in parts]
    torch.testing.assert_close(merge(parts), attend(q, k, v), rtol=1e-12, atol=1e-12)
    for (out, lse), (same_out, same_lse) in zip(parts, before, strict=True):
        assert torch.equal(out, same_out) and torch.equal(lse, same_lse), "parts are left as they were"


@pytest.mark.parametrize("logit", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_extreme_logits(logit: float, dtype: torch.dtype) -> None:
    """A part whose logits are 10⁴ above or below the others' takes everything or nothing, without overflow."""
    q, k, v = draw(1, 1, 3, D), draw(1, 1, 6, D, seed=1), draw(1, 1, 6, D, seed=2)
    q[..., 0] = 1.0
    k[:, :, 2:4, 0] = logit
    parts = [
        (out.to(dtype), lse.float())
        for out, lse in (attend(q, k[:, :, i : i + 2], v[:, :, i : i + 2]) for i in (0, 2, 4))
    ]
    out, lse = merge(parts)
    expected_out, expected_lse = attend(q, k, v)
    assert out.dtype == dtype and out.isfinite().all() and lse.isfinite().all()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    if logit < 0:
        torch.testing.assert_close(out.double(), expected_out, rtol=tolerance, atol=tolerance)
    else:  # float32 holds logits of 10⁴ to 10⁻³
        torch.testing.assert_close(out.double(), parts[1][0].double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-5)


# --- the tree ------------------------------------------------------------------------------------------------------


def segment(parents: int, kv_heads: int, tokens: int, seed: int, dtype: torch.dtype) -> Segment:
    shape = (parents, kv_heads, tokens, D)
    return Segment(*(draw(*shape, seed=seed + i, dtype=dtype).requires_grad_() for i in (0, 1)))


def side_by_side(query: Tensor, own: Segment, ancestors: list[Segment]) -> Tensor:
    """Plain autograd: every sequence with a copy of all keys it continues, key heads repeated for their queries."""
    n, heads, tokens, _ = query.shape
    groups = heads // own.keys.shape[1]
    keys, values, hidden = [], [], []
    for one in (*ancestors, own):
        copies = n // len(one.keys)
        keys.append(one.keys.repeat_interleave(copies, 0).repeat_interleave(groups, 1))
        values.append(one.values.repeat_interleave(copies, 0).repeat_interleave(groups, 1))
        mask = torch.zeros(n, 1, tokens, one.keys.shape[2], dtype=torch.bool)
        if one is own:
            mask |= torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        hidden.append(mask)
    scores = query @ torch.cat(keys, 2).transpose(-1, -2) * SCALE
    scores = scores.masked_fill(torch.cat(hidden, 3), -torch.inf)
    return (scores.softmax(-1) @ torch.cat(values, 2)).transpose(1, 2)


def families(groups: int, depth: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Segment, list[Segment]]:
    """12 sequences of 3 tokens below up to three ancestors of 6, 2 and 1 sequences; 2 key-value heads."""
    query = draw(12, 2 * groups, 3, D, seed=1, dtype=dtype).requires_grad_()
    own = segment(12, 2, 3, seed=2, dtype=dtype)
    ancestors = [segment(n, 2, n + 4, seed=10 * n, dtype=dtype) for n in (6, 2, 1)]
    return query, own, ancestors[:depth]


@pytest.mark.parametrize(("groups", "depth"), [(1, 0), (2, 0), (2, 1), (1, 2), (3, 2), (2, 3)])
@BACK_ENDS
def test_outputs_and_gradients_equal_plain_autograd(backend: Attention, groups: int, depth: int) -> None:
    """Grouped queries, zero to three ancestors."""
    query, own, ancestors = families(groups, depth)
    leaves = [query, *(x for one in (own, *ancestors) for x in (one.keys, one.values))]
    ours, theirs = tree_attention(backend, SCALE, query, own, ancestors), side_by_side(query, own, ancestors)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grad = draw(*ours.shape, seed=5)
    expected = torch.autograd.grad(theirs, leaves, grad)
    assert all(gradient.norm() > 0 for gradient in expected)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves, grad), expected, rtol=1e-11, atol=1e-11)


@BACK_ENDS
def test_half_precision_stays_within_its_rounding(backend: Attention) -> None:
    query, own, ancestors = families(groups=2, depth=2, dtype=torch.bfloat16)
    ours = tree_attention(backend, SCALE, query, own, ancestors)
    leaves = [query, *(x for one in (own, *ancestors) for x in (one.keys, one.values))]
    grad = draw(*ours.shape, seed=5)
    found = torch.autograd.grad(ours, leaves, grad.bfloat16())
    wide = [Segment(one.keys.double(), one.values.double()) for one in (own, *ancestors)]
    theirs = side_by_side(query.double(), wide[0], wide[1:])
    assert ours.dtype == torch.bfloat16
    for a, b in zip((ours, *found), (theirs, *torch.autograd.grad(theirs, leaves, grad)), strict=True):
        assert a.dtype == torch.bfloat16 and (a.double() - b).norm() / b.double().norm() < 2e-2


@BACK_ENDS
def test_a_frozen_ancestor_stays_without_gradient(backend: Attention) -> None:
    query, own, (parent,) = families(groups=2, depth=1)
    frozen = Segment(parent.keys.detach(), parent.values.detach())
    tree_attention(backend, SCALE, query, own, [frozen]).square().sum().backward()
    assert frozen.keys.grad is None and query.grad is not None and own.keys.grad is not None


def test_shared_keys_are_not_copied_for_children(largest_made: Callable[[], Any]) -> None:
    """32 sequences of one token over one parent of 512: nothing as large as 32 × 512 keys, forward or backward."""
    shared = segment(1, 2, 512, seed=3, dtype=torch.float32)
    own = segment(32, 2, 1, seed=4, dtype=torch.float32)
    query = draw(32, 2, 1, D, dtype=torch.float32).requires_grad_()
    replicated = 32 * shared.keys.numel()
    with largest_made() as ours:
        tree_attention(SDPAOnCPU(), SCALE, query, own, [shared]).square().sum().backward()
    with largest_made() as theirs:
        side_by_side(query, own, [shared]).square().sum().backward()
    assert 0 < ours.elements < replicated / 8
    assert theirs.elements >= replicated, "this test would see a copy"


def test_a_decoder_call_without_a_tree_is_transformers_own(make_policy: Callable[..., PolicyModel]) -> None:
    """Under our implementation's name, padding on the left included: their SDPA and their masks."""
    policy = make_policy(frames=None).eval()
    ids = torch.randint(300, 2000, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    decoder, config = policy.base_model.model.language_model, policy.base_model.config.get_text_config()
    assert config._attn_implementation == IMPLEMENTATION
    outputs = []
    for name in (IMPLEMENTATION, "sdpa", "eager"):
        config._attn_implementation = name
        with torch.no_grad():
            outputs.append(decoder(inputs_embeds=policy.embed(ids), attention_mask=mask).last_hidden_state[mask == 1])
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2], rtol=1e-4, atol=1e-4)
