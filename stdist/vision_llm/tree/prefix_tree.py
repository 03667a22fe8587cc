"""The training pass over a prefix tree: cost V + C·(T + G·K) tokens a window instead of C·G·(V + T + K).

One rule, applied at every depth: encode a node once and keep its graph; hand its keys, values and last state to the
children as leaf tensors; run the children in micro-batches, each with its own backward, while gradients add up in the
leaves; then one backward through the node, Σ tensor·gradient. By the chain rule this is the gradient of one sequence
per candidate. A node's memory is freed before its sibling is encoded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stdist.training.inference import inference
from stdist.vision_llm.kernels.prefix import Prefix, parents_of
from stdist.vision_llm.policy.model import PolicyModel


@dataclass(frozen=True)
class Level:
    """All sequences of one depth; consecutive ones continue the same sequence of the level above."""

    ids: Int[Tensor, "sequences tokens"]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Tree:
    """Windows and what continues them: ``levels[0]`` the windows' children, the last level the leaves."""

    shared: Int[Tensor, "windows tokens"]
    grids: Float[Tensor, "windows frames rows cols"]
    levels: tuple[Level, ...]

    @property
    def tokens(self) -> int:
        """Tokens that the tree computes: every node once."""
        return self.shared.numel() + sum(level.ids.numel() for level in self.levels)

    @property
    def tokens_per_sample(self) -> int:
        """Tokens that one sequence per leaf would compute."""
        path = self.shared.shape[1] + sum(level.ids.shape[1] for level in self.levels)
        return len(self.levels[-1]) * path


# A function of the leaves start … stop and the states that predict their tokens, from their parents' last one on.
Visit = Callable[[slice, Float[Tensor, "leaves tokens+1 d"]], Tensor]


def backward(
    policy: PolicyModel, tree: Tree, loss: Visit, engine_backward: Callable[[Tensor], None], sizes: Sequence[int]
) -> float:
    """Adds the gradient of Σ loss over all leaves to the parameters. Returns that sum.

    Args:
        loss: a scalar of some leaves that adds up over leaves; called once for each micro-batch.
        engine_backward: accumulates gradients of a scalar (``Engine.backward``); called several times.
        sizes: most sequences in a micro-batch, for the windows and for each level; see :mod:`micro_batches`.
    """
    return _Walk(policy, tree, loss, sizes, engine_backward).run()


def forward(policy: PolicyModel, tree: Tree, visit: Visit, sizes: Sequence[int]) -> None:
    """Calls ``visit`` for every micro-batch of leaves, in evaluation mode and without gradients."""
    with inference(policy):
        _Walk(policy, tree, visit, sizes, None).run()


def slices(count: int, size: int, *families: int) -> list[tuple[int, int]]:
    """Micro-batches of at most ``size`` of ``count`` sequences, as even as they can be.

    ``families``: children of each parent, parents of each grandparent, and so on. At every generation a micro-batch
    holds complete families or lies inside one of them.
    """
    unit, block = 1, count
    for family in families:
        if unit * family > size:
            block = unit * family
            break
        unit *= family
    units = block // unit
    parts = -(-units // (size // unit))
    edges = [round(i * units / parts) * unit for i in range(parts)]
    return list(pairwise([*(first + edge for first in range(0, count, block) for edge in edges), count]))


class _Walk:
    def __init__(
        self,
        policy: PolicyModel,
        tree: Tree,
        visit: Visit,
        sizes: Sequence[int],
        engine_backward: Callable[[Tensor], None] | None,
    ):
        assert len(sizes) == 1 + len(tree.levels), "one size for the windows and one for each level"
        self.policy, self.tree, self.visit, self.sizes = policy, tree, visit, sizes
        self.backward = engine_backward
        self.total = 0.0

    def run(self) -> float:
        shared, grids = self.tree.shared, self.tree.grids
        for start, stop in slices(len(shared), self.sizes[0], 1):
            self._below(self.policy.prefix(shared[start:stop], grids[start:stop]), depth=0, first=start)
        return self.total

    def _below(self, node: Prefix, depth: int, first: int) -> None:
        """Everything that continues ``node``, whose sequences count from ``first``; then back through the node."""
        level = self.tree.levels[depth]
        family = len(level) // (len(self.tree.levels[depth - 1]) if depth else len(self.tree.shared))
        cut = _leaves(node, node.parent) if self.backward else node
        for start, stop in slices(node.sequences * family, self.sizes[depth + 1], family, *node.families):
            parents = parents_of(start, stop, family)
            above = cut.part(*parents)
            above = _all_leaves(above) if self.backward else above
            span = slice(first * family + start, first * family + stop)
            hidden, child = self.policy.branch(above, level.ids[span])
            if depth + 1 < len(self.tree.levels):
                del hidden  # its last states are in the child
                self._below(child, depth + 1, span.start)
            else:
                del child
                before = above.last.repeat_interleave((stop - start) // above.sequences, 0)
                self._visit(span, torch.cat([before[:, None], hidden], dim=1))
            if self.backward:
                _collect(above, cut, *parents)
        if self.backward:
            pairs = [(x, y.grad) for x, y in zip(node.tensors, cut.tensors, strict=True) if x.requires_grad]
            terms = [(x * grad).sum() for x, grad in pairs if grad is not None]
            if terms:
                self.backward(torch.stack(terms).sum())

    def _visit(self, leaves: slice, states: Float[Tensor, "leaves tokens d"]) -> None:
        loss = self.visit(leaves, states)
        if self.backward:
            self.backward(loss)
            self.total += loss.item()


def _leaves(node: Prefix, parent: Prefix | None) -> Prefix:
    """The node cut from its graph: tensors of the same memory that collect gradients."""
    return node.with_tensors([tensor.detach().requires_grad_() for tensor in node.tensors], parent)


def _all_leaves(node: Prefix) -> Prefix:
    """The node and its ancestors as leaves: a part's gradients then have the part's size, not that of all."""
    return _leaves(node, node.parent and _all_leaves(node.parent))


def _collect(part: Prefix, node: Prefix, start: int, stop: int) -> None:
    """Adds the gradients of sequences ``start`` to ``stop``, and of what they continue, to those of their node."""
    for tensor, target in zip(part.tensors, node.tensors, strict=True):
        if tensor.grad is not None:
            if target.grad is None:
                target.grad = torch.zeros_like(target)
            target.grad[start:stop] += tensor.grad
    if part.parent and node.parent:
        _collect(part.parent, node.parent, *parents_of(start, stop, node.families[0]))
