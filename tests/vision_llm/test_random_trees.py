"""Random prefix trees against separate sequences: ragged levels, one to three windows, one to three depths."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stdist.vision_llm.kernels.prefix import parents_of
from stdist.vision_llm.policy.model import Policy
from stdist.vision_llm.tree import prefix_tree
from stdist.vision_llm.tree.prefix_tree import Level, Tree, slices


@pytest.fixture(scope="module")
def blind(make_policy: Callable[..., Policy]) -> Policy:
    """Trains in full and sees no frames."""
    policy = make_policy(frames=None)
    policy.train_only("full")
    return policy


@st.composite
def trees(draw: st.DrawFn) -> tuple[Tree, list[int]]:
    """A tree of random ids, and random micro-batch sizes. A level has lengths or, now and then, none."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    windows = draw(st.integers(1, 3))
    shared = torch.randint(300, 2000, (windows, draw(st.integers(1, 6))), generator=generator)
    sequences, levels = windows, []
    for _ in range(draw(st.integers(1, 3))):
        sequences *= draw(st.integers(1, 3))
        longest = draw(st.integers(1, 5))
        ids = torch.randint(300, 2000, (sequences, longest), generator=generator)
        lengths = torch.randint(1, longest + 1, (sequences,), generator=generator)
        levels.append(Level(ids, lengths if draw(st.integers(0, 3)) else None))
    sizes = draw(st.lists(st.integers(1, 10), min_size=1 + len(levels), max_size=1 + len(levels)))
    return Tree(shared, torch.zeros(windows, 0, 1, 1), tuple(levels)), sizes


def real_tokens(level: Level, sequence: int) -> Tensor:
    return level.ids[sequence, : None if level.lengths is None else level.lengths[sequence]]


def leaf_loss(states: Tensor, leaf: int) -> Tensor:
    """Another function of every leaf's states, and of each of them."""
    generator = torch.Generator().manual_seed(leaf)
    weights = torch.randn(states.shape[-1], 2, generator=generator) / states.shape[-1] ** 0.5
    position = torch.arange(1.0, len(states) + 1)[:, None]
    return ((states @ weights).tanh() * position).sum()


def flat_gradient(policy: Policy) -> Tensor:
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def separate_sequences(policy: Policy, tree: Tree) -> float:
    """One window and all that one leaf continues, as one sequence through autograd without a cut; leaf by leaf."""
    total, leaves = 0.0, len(tree.levels[-1])
    for leaf in range(leaves):
        window = leaf * len(tree.shared) // leaves
        path = [real_tokens(level, leaf * len(level) // leaves) for level in tree.levels]
        prefix = policy.prefix(tree.shared[window : window + 1], tree.grids[window : window + 1])
        hidden, _ = policy.branch(prefix, torch.cat(path)[None])
        states = torch.cat([prefix.last, hidden[0]])[-len(path[-1]) - 1 :]
        loss = leaf_loss(states, leaf)
        loss.backward()
        total += loss.item()
    return total


# Trees are small as they are drawn: shrinking one that fails would take minutes.
@given(trees())
@settings(max_examples=25, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
def test_value_and_gradient_equal_those_of_separate_sequences(blind: Policy, drawn: tuple[Tree, list[int]]) -> None:
    tree, sizes = drawn
    leaves, visited = tree.levels[-1], []

    def loss(rows: slice, states: Tensor) -> Tensor:
        visited.extend(range(rows.start, rows.stop))
        assert states.shape[:2] == (rows.stop - rows.start, leaves.ids.shape[1] + 1)
        return torch.stack(
            [
                leaf_loss(own[: len(real_tokens(leaves, leaf)) + 1], leaf)
                for leaf, own in zip(range(rows.start, rows.stop), states, strict=True)
            ]
        ).sum()

    blind.zero_grad()
    total = prefix_tree.backward(blind, tree, loss, Tensor.backward, sizes)
    found = flat_gradient(blind)
    assert visited == list(range(len(leaves))), "every leaf once, in order"
    blind.zero_grad()
    assert total == pytest.approx(separate_sequences(blind, tree), rel=1e-4, abs=1e-5)
    expected = flat_gradient(blind)
    assert (found - expected).norm() / expected.norm() < 1e-5

    visited.clear()
    forwards: list[Tensor] = []
    prefix_tree.forward(blind, tree, lambda rows, states: forwards.append(loss(rows, states)), sizes)
    assert visited == list(range(len(leaves))) and not any(value.requires_grad for value in forwards)
    assert sum(value.item() for value in forwards) == pytest.approx(total, rel=1e-5, abs=1e-6)


# --- micro-batches of a level --------------------------------------------------------------------------------------


@given(family=st.integers(1, 12), parents=st.integers(1, 12), size=st.integers(1, 200))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_slices_are_even_and_keep_families(family: int, parents: int, size: int) -> None:
    count = family * parents
    parts = slices(count, size, family)
    assert [i for start, stop in parts for i in range(start, stop)] == list(range(count)), "all, once, in order"
    lengths = [stop - start for start, stop in parts]
    assert min(lengths) >= 1 and max(lengths) <= size
    for start, stop in parts:
        first, last = start // family, (stop - 1) // family + 1
        whole = start % family == 0 and stop % family == 0
        assert whole or last - first == 1, "whole families, or inside one of them"
        assert parents_of(start, stop, family) == (first, last)
    # No more parts than needed, and one differs from another by no more than their unit, a family or a sequence.
    if size >= family:
        assert len(parts) == -(-parents // (size // family)) and max(lengths) - min(lengths) <= family
    else:
        assert len(parts) == parents * -(-family // size) and max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("start", "stop"), [(2, 4), (0, 4), (1, 6), (3, 7), (2, 7)])
def test_broken_families_are_refused(start: int, stop: int) -> None:
    """Sequences of two families of three, not all of both."""
    with pytest.raises(AssertionError, match="families must stay whole"):
        parents_of(start, stop, 3)


def test_one_size_for_every_depth(blind: Policy) -> None:
    tree = Tree(torch.full((1, 2), 300), torch.zeros(1, 0, 1, 1), (Level(torch.full((2, 2), 300)),))
    with pytest.raises(AssertionError, match="one size for the windows and one for each level"):
        prefix_tree.backward(blind, tree, lambda rows, states: states.sum(), Tensor.backward, [1])
