"""Keys and values of candidates that decode together, and one decoding step over them.

Keys that a cell's candidates share are held once: all of them read these in one attention call, as all candidates of a
window read the window's.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stdist.vision_llm.kernels.attention import MATH
from stdist.vision_llm.kernels.prefix import Prefix
from stdist.vision_llm.kernels.tree_attention import Segment, merge
from stdist.vision_llm.policy.model import PolicyModel


@dataclass
class Family:
    """The parent of each sequence with its rank among the siblings, and a table of each parent's sequences."""

    parent: Int[Tensor, " sequences"]
    rank: Int[Tensor, " sequences"]
    table: Int[Tensor, "parents most"]

    @classmethod
    def of(cls, parent: Int[Tensor, " sequences"], parents: int) -> "Family":
        """``table`` is filled up with sequence 0: a read too many, thrown away."""
        order = parent.argsort(stable=True)
        counts = torch.bincount(parent, minlength=parents)
        start = counts.cumsum(0) - counts
        numbers = torch.arange(len(parent), device=parent.device)
        rank = torch.empty_like(parent)
        rank[order] = numbers - start[parent[order]]
        table = parent.new_zeros(parents, int(counts.max()))
        table[parent, rank] = numbers
        return cls(parent, rank, table)


@dataclass
class Step:
    """Inputs of one decoding step: each sequence's token, M-RoPE position, and number of tokens before it (``index``);
    its parents in ``cells`` of the memory and in ``windows`` of ``prefix``, which holds no others.

    ``extent`` places of the memory are read, those behind ``index`` hidden where ``ragged`` says that sequences differ.
    """

    ids: Int[Tensor, " sequences"]
    position: Int[Tensor, " sequences"]
    index: Int[Tensor, " sequences"]
    cells: Family
    windows: Family
    prefix: Prefix
    extent: int
    ragged: bool

    def copy_(self, other: "Step") -> None:
        """Fills the front of these tensors with another's; sequences behind it write to places nobody reads."""
        pairs = [(self.ids, other.ids), (self.position, other.position), (self.index, other.index)]
        for family, filling in ((self.cells, other.cells), (self.windows, other.windows)):
            pairs += [(family.parent, filling.parent), (family.rank, filling.rank)]
            family.table[: filling.table.shape[0], : filling.table.shape[1]] = filling.table
        for target, source in pairs:
            target[: len(source)] = source


@dataclass(frozen=True)
class Sizes:
    """``windows`` of ``window_tokens``, places for ``cells`` of ``cell_tokens``, and ``sequences`` at a time, at most
    ``of_window`` of one window and ``of_cell`` of one cell, of at most ``tokens`` each."""

    windows: int
    window_tokens: int
    cells: int
    cell_tokens: int
    sequences: int
    of_window: int
    of_cell: int
    tokens: int

    def hold(self, other: "Sizes") -> bool:
        """True where memory of these sizes has room for a batch of the others."""
        lengths = "window_tokens", "cell_tokens", "tokens"
        numbers = "windows", "cells", "sequences", "of_window", "of_cell"
        return all(getattr(self, name) == getattr(other, name) for name in lengths) and all(
            getattr(self, name) >= getattr(other, name) for name in numbers
        )


class DecodeMemory:
    """Keys and values of sequences and of cells' prompts, for each layer; passed down a decoder call as ``tree`` (one
    token of every sequence). ``like``: windows of the kind that the cells continue."""

    def __init__(self, policy: PolicyModel, like: Prefix, sizes: Sizes):
        self.policy, self.sizes = policy, sizes

        def buffers(sequences: int, tokens: int) -> list[Tensor]:
            shape = (sequences, like.keys[0].shape[1], tokens, like.keys[0].shape[3])
            return [like.keys[0].new_zeros(shape) for _ in like.keys]

        self.own_keys, self.own_values = (buffers(sizes.sequences, sizes.tokens) for _ in range(2))
        self.cell_keys, self.cell_values = (buffers(sizes.cells, sizes.cell_tokens) for _ in range(2))
        self._step: Step | None = None

    def run(self, step: Step) -> Float[Tensor, "sequences d"]:
        self._step = step
        return self.policy.decode(step.ids, step.position, tree=self)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of each sequence's new token to the sequence's tokens, its cell's prompt and its window's."""
        step, (n, heads, _, d) = self._step, query.shape
        assert step is not None
        keys, values = self.own_keys[layer][:n], self.own_values[layer][:n]
        sequences = torch.arange(n, device=query.device)
        keys[sequences, :, step.index], values[sequences, :, step.index] = key[:, :, 0], value[:, :, 0]
        q = query.reshape(n, keys.shape[1], -1, d)  # grouped queries of a key-value head
        lengths = step.index + 1 if step.ragged else None
        parts = [MATH.forward(q, keys[:, :, : step.extent], values[:, :, : step.extent], scale, lengths=lengths)]
        used = len(step.cells.table)
        cells = Segment(self.cell_keys[layer][:used], self.cell_values[layer][:used])
        for segment, family in zip((cells, *step.prefix.segments(layer)), (step.cells, step.windows), strict=True):
            parts.append(self._to_parents(q, segment, family, scale))
        return merge(parts)[0].reshape(n, 1, heads, d)

    def _to_parents(self, q: Tensor, segment: Segment, family: Family, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of all sequences to their parents' keys, the queries of siblings side by side."""
        kv_heads, d = q.shape[1], q.shape[3]
        parents, most = family.table.shape
        together = q[family.table].transpose(1, 2).reshape(parents, kv_heads, -1, d)
        out, lse = self.policy.attention.forward(together, segment.keys, segment.values, scale, False)
        out, lse = out.unflatten(2, (most, -1)), lse.unflatten(2, (most, -1))
        return out[family.parent, :, family.rank], lse[family.parent, :, family.rank]
