"""Candidates that decode together: their keys and values, and tables of the cell and window that each continues.

Continuous batching over cells: a candidate that ends leaves at once, the last one takes its place, and new cells are
let in when enough room is free. Keys that a cell's candidates share are held once: all of them read these in one
attention call, as all candidates of a window read the window's.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stdist.vision_llm.kernels.attention import MATH
from stdist.vision_llm.kernels.prefix import Prefix
from stdist.vision_llm.kernels.tree_attention import Segment, merge
from stdist.vision_llm.policy.model import PolicyModel

# Candidates that decode together: enough to keep matrix products busy, few enough that their states stay in caches.
MOST_SEQUENCES = 1024
# Keys and values of their tokens take at most this much.
CACHE_BYTES = 2**30
# Cell prompts are encoded this many tokens at a time.
PREFILL_TOKENS = 8192


@dataclass
class Family:
    """The parent of each sequence with its rank among the siblings, and a table of each parent's sequences."""

    parent: Int[Tensor, "sequences"]
    rank: Int[Tensor, "sequences"]
    table: Int[Tensor, "parents most"]

    @classmethod
    def of(cls, parent: Int[Tensor, "sequences"], parents: int) -> "Family":
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
    its parents in ``cells`` of the batch and in ``windows`` of ``prefix``, which holds no others.

    ``extent`` places of the cache are read, those behind ``index`` hidden where ``ragged`` says that sequences differ.
    """

    ids: Int[Tensor, "sequences"]
    position: Int[Tensor, "sequences"]
    index: Int[Tensor, "sequences"]
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


class DecodeBatch:
    """See the module docstring; passed down a decoder call as ``tree`` (one token of every sequence).

    Args:
        policy: whose cells are forecast.
        prefix: the windows.
        prompts: cell prompts, consecutive cells share a window.
        num_generations: candidates of each cell, G.
        max_tokens: most tokens of a candidate.

    ``number``, ``step`` and ``position`` are, for each sequence in the batch, its number among all cells' candidates,
    the number of its tokens, and the M-RoPE position of its next one.
    """

    def __init__(
        self,
        policy: PolicyModel,
        prefix: Prefix,
        prompts: Int[Tensor, "cells tokens"],
        num_generations: int,
        max_tokens: int,
    ):
        self.policy, self.prefix, self.prompts = policy, prefix, prompts
        self.num_generations = num_generations
        fits = CACHE_BYTES // (max_tokens * policy.cache_bytes_per_token)
        most_cells = max(1, min(MOST_SEQUENCES, fits) // num_generations)
        # An even share of all cells: a last handful of candidates would cost almost as much time as a full batch.
        rounds = -(-len(prompts) // most_cells)
        cells = -(-len(prompts) // rounds)
        self.slots = cells * num_generations
        self._cells_per_window = len(prompts) // prefix.sequences
        # Cells that wait for a last candidate may take as many places again.
        self._free_cells = list(range(2 * cells))[::-1]
        self._next_cell = 0

        def buffer(sequences: int, tokens: int) -> list[Tensor]:
            shape = (sequences, prefix.keys[0].shape[1], tokens, prefix.keys[0].shape[3])
            return [prefix.keys[0].new_zeros(shape) for _ in prefix.keys]

        self._own_keys, self._own_values = buffer(self.slots, max_tokens), buffer(self.slots, max_tokens)
        tokens = prompts.shape[1]
        self._cell_keys, self._cell_values = buffer(2 * cells, tokens), buffer(2 * cells, tokens)
        nothing = prompts.new_zeros(0)
        self.number = self.step = self.position = self._cell = self._window = nothing
        self._tokens = max_tokens
        self._step: Step | None = None
        # A window's own table has no bound but the batch: with several windows most of a fixed one would be empty.
        self._recorded = RecordedStep(self) if prompts.is_cuda and prefix.sequences == 1 else None

    def __len__(self) -> int:
        return len(self.number)

    @property
    def waiting(self) -> int:
        """Cells that have not been let in."""
        return len(self.prompts) - self._next_cell

    def admit(self) -> Float[Tensor, "new d"]:
        """Lets cells in where a quarter of the batch is free, and encodes them. Returns the hidden states that predict
        their candidates' first tokens; the candidates stand behind those in the batch."""
        room = (self.slots - len(self)) // self.num_generations
        cells = min(room, len(self._free_cells), self.waiting)
        if cells == 0 or (len(self) and 4 * room * self.num_generations < self.slots):
            return self.prefix.last[:0]
        places = [self._free_cells.pop() for _ in range(cells)]
        last, position, window = [], [], []
        at_once = max(1, PREFILL_TOKENS // self.prompts.shape[1])
        start = self._next_cell
        self._next_cell += cells
        while start < self._next_cell:
            w = start // self._cells_per_window
            stop = min(start + at_once, self._next_cell, (w + 1) * self._cells_per_window)
            _, node = self.policy.branch(self.prefix.part(w, w + 1), self.prompts[start:stop])
            done = start - (self._next_cell - cells)
            at = torch.tensor(places[done : done + stop - start], device=self.prompts.device)
            for buffers, tensors in ((self._cell_keys, node.keys), (self._cell_values, node.values)):
                for buffer, tensor in zip(buffers, tensors, strict=True):
                    buffer[at] = tensor
            last.append(node.last)
            position.append(node.position)
            window.append(torch.full_like(node.position, w))
            start = stop
        first = (self._next_cell - cells) * self.num_generations
        new = torch.arange(first, self._next_cell * self.num_generations, device=self.prompts.device)
        self.number = torch.cat([self.number, new])
        self.step = torch.cat([self.step, torch.zeros_like(new)])
        self.position = torch.cat([self.position, self._per_generation(torch.cat(position))])
        self._cell = torch.cat([self._cell, self._per_generation(new.new_tensor(places))])
        self._window = torch.cat([self._window, self._per_generation(torch.cat(window))])
        return self._per_generation(torch.cat(last))

    def _per_generation(self, of_cells: Tensor) -> Tensor:
        return of_cells.repeat_interleave(self.num_generations, 0)

    def keep(self, stay: Bool[Tensor, "sequences"]) -> Int[Tensor, "staying"]:
        """Drops the others: sequences from the end move into their places. Returns the new order of the old numbers."""
        count = int(stay.sum())
        order = torch.arange(count, device=stay.device)
        if count < len(stay):
            holes, movers = (~stay[:count]).nonzero()[:, 0], stay[count:].nonzero()[:, 0] + count
            order[holes] = movers
            for buffer in (*self._own_keys, *self._own_values):
                buffer[holes] = buffer[movers]
            left = set(self._cell[~stay].tolist()) - set(self._cell[stay].tolist())
            self._free_cells = sorted([*self._free_cells, *left], reverse=True)
            for name in ("number", "step", "position", "_cell", "_window"):
                setattr(self, name, getattr(self, name)[order])
        return order

    def feed(self, ids: Int[Tensor, "sequences"]) -> Float[Tensor, "sequences d"]:
        """Appends one token to every sequence. Returns the hidden states that predict the next ones."""
        first, last = int(self._window.min()), int(self._window.max()) + 1
        step = Step(
            ids,
            self.position,
            self.step,
            Family.of(self._cell, int(self._cell.max()) + 1),
            Family.of(self._window - first, last - first),
            self.prefix.part(first, last),
            extent=int(self.step.max()) + 1,
            ragged=bool((self.step != self.step[0]).any()),
        )
        hidden = self._recorded(step) if self._recorded else self.run(step)
        self.step = self.step + 1
        self.position = self.position + 1
        return hidden

    def run(self, step: Step) -> Float[Tensor, "sequences d"]:
        self._step = step
        return self.policy.decode(step.ids, step.position, tree=self)

    def blank_step(self) -> Step:
        """A step of the largest size there can be, so that any other fits in."""
        zeros = self.prompts.new_zeros

        def family(parents: int, most: int) -> Family:
            return Family(zeros(self.slots), zeros(self.slots), zeros(parents, most))

        cells = family(len(self._cell_keys[0]), self.num_generations)
        windows = family(1, self.slots)
        ids, position, index = zeros(self.slots), zeros(self.slots), zeros(self.slots)
        return Step(ids, position, index, cells, windows, self.prefix, extent=self._tokens, ragged=True)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of each sequence's new token to the sequence's tokens, its cell's prompt and its window's."""
        step, (n, heads, _, d) = self._step, query.shape
        assert step is not None
        keys, values = self._own_keys[layer][:n], self._own_values[layer][:n]
        sequences = torch.arange(n, device=query.device)
        keys[sequences, :, step.index], values[sequences, :, step.index] = key[:, :, 0], value[:, :, 0]
        q = query.reshape(n, keys.shape[1], -1, d)  # grouped queries of a key-value head
        lengths = step.index + 1 if step.ragged else None
        parts = [MATH.forward(q, keys[:, :, : step.extent], values[:, :, : step.extent], scale, lengths=lengths)]
        used = len(step.cells.table)
        cells = Segment(self._cell_keys[layer][:used], self._cell_values[layer][:used])
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


class RecordedStep:
    """A decoding step of fixed size over fixed memory, recorded once as a CUDA graph and replayed.

    Launching the kernels of one token costs a GPU more than running them where few sequences are left.
    """

    def __init__(self, batch: DecodeBatch):
        self._batch, self._step = batch, batch.blank_step()
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, step: Step) -> Float[Tensor, "sequences d"]:
        self._step.copy_(step)
        if self._step.ids.is_cuda:
            self._replay()
        else:
            self._hidden = self._batch.run(self._step)
        return self._hidden[: len(step.ids)].clone()

    def _replay(self) -> None:
        if self._graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries set themselves up; writing a token twice changes nothing
                for _ in range(2):
                    self._batch.run(self._step)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._hidden = self._batch.run(self._step)
        self._graph.replay()
