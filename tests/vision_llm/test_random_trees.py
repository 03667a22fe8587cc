"""Random prefix trees against separate sequences: one to three windows, one to three depths."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stdist.vision_llm.kernels.prefix import parents_of
from stdist.vision_llm.policy.adapters import train_only
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.tree import prefix_tree
from stdist.vision_llm.tree.prefix_tree import Level, Tree, slices


@pytest.fixture(scope="module")
def blind(make_policy: Callable[..., PolicyModel]) -> PolicyModel:
    """Trains in full and sees no frames."""
    policy = make_policy(frames=None)
    train_only(policy, "full")
    return policy


@st.composite
def trees(draw: st.DrawFn) -> tuple[Tree, list[int]]:
    """A tree of random ids, and random micro-batch sizes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    windows = draw(st.integers(1, 3))
    shared = torch.randint(300, 2000, (windows, draw(st.integers(1, 6))), generator=generator)
    sequences, levels = windows, []
    for _ in range(draw(st.integers(1, 3))):
        sequences *= draw(st.integers(1, 3))
        levels.append(Level(torch.randint(300, 2000, (sequences, draw(st.integers(1, 5))), generator=generator)))
    sizes = draw(st.lists(st.integers(1, 10), min_size=1 + len(levels), max_size=1 + len(levels)))
    return Tree(shared, torch.zeros(windows, 0, 1, 1), tuple(levels)), sizes


def leaf_loss(states: Tensor, leaf: int) -> Tensor:
    """Another function of every leaf's states, and of each of them."""
    generator = torch.Generator().manual_seed(leaf)
    weights = torch.randn(states.shape[-1], 2, generator=generator) / states.shape[-1] ** 0.5
    position = torch.arange(1.0, len(states) + 1)[:, None]
    return ((states @ weights).tanh() * position).sum()


def flat_gradient(policy: PolicyModel) -> Tensor:
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def separate_sequences(policy: PolicyModel, tree: Tree) -> float:
    """One window and all that one leaf continues, as one sequence through autograd without a cut; leaf by leaf."""
    total, leaves = 0.0, len(tree.levels[-1])
    for leaf in range(leaves):
        window = leaf * len(tree.shared) // leaves
        path = [level.ids[leaf * len(level) // leaves] for level in tree.levels]
        prefix = policy.prefix(tree.shared[window : window + 1], tree.grids[window : window + 1])
        hidden, _ = policy.branch(prefix, torch.cat(path)[None])
        states = torch.cat([prefix.last, hidden[0]])[-len(path[-1]) - 1 :]
        loss = leaf_loss(states, leaf)
        loss.backward()
        total += loss.item()
    return total


# Trees are small as they are drawn: shrinking one that fails would take minutes.
@given(trees())
@settings(max_examples=16, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
def test_value_and_gradient_equal_those_of_separate_sequences(
    blind: PolicyModel, drawn: tuple[Tree, list[int]]
) -> None:
    tree, sizes = drawn
    leaves, visited = tree.levels[-1], []

    def loss(rows: slice, states: Tensor) -> Tensor:
        visited.extend(range(rows.start, rows.stop))
        assert states.shape[:2] == (rows.stop - rows.start, leaves.ids.shape[1] + 1)
        return torch.stack([leaf_loss(x, leaf) for leaf, x in enumerate(states, start=rows.start)]).sum()

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


def test_a_micro_batch_of_candidates_may_end_inside_a_window(blind: PolicyModel) -> None:
    """Two windows of four cells at once, three cells' candidates at a time: [0, 3, 5, 8] would cut both windows."""
    tree = Tree(
        torch.full((2, 2), 300),
        torch.zeros(2, 0, 1, 1),
        (Level(torch.full((8, 1), 301)), Level(torch.full((16, 1), 302))),
    )
    seen: list[tuple[int, int]] = []

    def visit(leaves: slice, states: Tensor) -> Tensor:
        seen.append((leaves.start, leaves.stop))
        return states.sum()

    prefix_tree.forward(blind, tree, visit, [2, 8, 6])
    assert seen == [(0, 4), (4, 8), (8, 12), (12, 16)]


# --- micro-batches of a level --------------------------------------------------------------------------------------


@given(
    families=st.lists(st.integers(1, 6), min_size=1, max_size=3), ancestors=st.integers(1, 6), size=st.integers(1, 200)
)
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_slices_are_even_and_keep_families(families: list[int], ancestors: int, size: int) -> None:
    units = [math.prod(families[:i]) for i in range(len(families) + 1)]
    count = units[-1] * ancestors
    parts = slices(count, size, *families)
    assert [i for start, stop in parts for i in range(start, stop)] == list(range(count)), "all, once, in order"
    lengths = [stop - start for start, stop in parts]
    assert min(lengths) >= 1 and max(lengths) <= size
    for start, stop in parts:
        for unit in units:  # of every generation complete families, or inside one of them
            assert parents_of(start, stop, unit) == (start // unit, (stop - 1) // unit + 1)
    # No more parts than needed, and one differs from another by no more than their unit.
    unit = max(u for u in units if u <= size)
    block = next((u for u in units if u > size), count)
    assert len(parts) == count // block * -(-(block // unit) // (size // unit))
    assert max(lengths) - min(lengths) <= unit


@pytest.mark.parametrize(("start", "stop"), [(2, 4), (0, 4), (1, 6), (3, 7), (2, 7)])
def test_broken_families_are_refused(start: int, stop: int) -> None:
    """Sequences of two families of three, not all of both."""
    with pytest.raises(AssertionError, match="families must stay together"):
        parents_of(start, stop, 3)


def test_one_size_for_every_depth(blind: PolicyModel) -> None:
    tree = Tree(torch.full((1, 2), 300), torch.zeros(1, 0, 1, 1), (Level(torch.full((2, 2), 300)),))
    with pytest.raises(AssertionError, match="one size for the windows and one for each level"):
        prefix_tree.backward(blind, tree, lambda rows, states: states.sum(), Tensor.backward, [1])
