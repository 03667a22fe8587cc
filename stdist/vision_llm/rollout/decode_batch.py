"""Candidates that decode together, and the cell and window that each continues.

Continuous batching over cells: a candidate that ends leaves at once, the last one takes its place, and new cells are
let in when enough room is free.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stdist.vision_llm.kernels.prefix import Prefix
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.decode_memory import DecodeMemory, Family, Sizes, Step
from stdist.vision_llm.rollout.recorded_step import RecordedStep

# Candidates that decode together: enough to keep matrix products busy, few enough that their states stay in caches.
MOST_SEQUENCES = 1024
# Keys and values of their tokens take at most this much.
CACHE_BYTES = 2**30
# Cell prompts are encoded this many tokens at a time.
PREFILL_TOKENS = 8192


def most_cells(policy: PolicyModel, num_generations: int, max_tokens: int) -> int:
    """Cells whose candidates may decode at once, at least one."""
    fits = CACHE_BYTES // (max_tokens * policy.cache_bytes_per_token)
    return max(1, min(MOST_SEQUENCES, fits) // num_generations)


def batch_sizes(
    policy: PolicyModel, prefix: Prefix, prompts: Int[Tensor, "cells tokens"], num_generations: int, max_tokens: int
) -> Sizes:
    """What a batch of these cells needs; see :class:`DecodeBatch`."""
    # An even share of all cells: a last handful of candidates would cost almost as much time as a full batch.
    rounds = -(-len(prompts) // most_cells(policy, num_generations, max_tokens))
    cells = -(-len(prompts) // rounds)
    per_window = len(prompts) // prefix.sequences
    return Sizes(
        windows=prefix.sequences,
        window_tokens=prefix.keys[0].shape[2],
        cells=2 * cells,  # those that wait for a last candidate may take as many places again
        cell_tokens=prompts.shape[1],
        sequences=cells * num_generations,
        of_window=min(cells, per_window) * num_generations,
        of_cell=num_generations,
        tokens=max_tokens,
    )


class DecodeBatch:
    """See the module docstring.

    Args:
        policy: whose cells are forecast.
        prefix: the windows.
        prompts: cell prompts, consecutive cells share a window.
        num_generations: candidates of each cell, G.
        max_tokens: most tokens of a candidate.
        recorded: has room for the batch and has begun with its windows; without it every step is run.

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
        recorded: RecordedStep | None = None,
    ):
        self.policy, self.prefix, self.prompts = policy, prefix, prompts
        self.num_generations = num_generations
        sizes = batch_sizes(policy, prefix, prompts, num_generations, max_tokens)
        self.slots = sizes.sequences
        self._cells_per_window = len(prompts) // prefix.sequences
        self._free_cells = list(range(sizes.cells))[::-1]
        self._next_cell = 0
        self.memory = recorded.memory if recorded else DecodeMemory(policy, prefix, sizes)
        nothing = prompts.new_zeros(0)
        self.number = self.step = self.position = self._cell = self._window = nothing
        self._recorded = recorded

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
            for buffers, tensors in ((self.memory.cell_keys, node.keys), (self.memory.cell_values, node.values)):
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

    def keep(self, stay: Bool[Tensor, " sequences"]) -> Int[Tensor, " staying"]:
        """Drops the others: sequences from the end move into their places. Returns the new order of the old numbers."""
        count = int(stay.sum())
        order = torch.arange(count, device=stay.device)
        if count < len(stay):
            holes, movers = (~stay[:count]).nonzero()[:, 0], stay[count:].nonzero()[:, 0] + count
            order[holes] = movers
            for buffer in (*self.memory.own_keys, *self.memory.own_values):
                buffer[holes] = buffer[movers]
            left = set(self._cell[~stay].tolist()) - set(self._cell[stay].tolist())
            self._free_cells = sorted([*self._free_cells, *left], reverse=True)
            for name in ("number", "step", "position", "_cell", "_window"):
                setattr(self, name, getattr(self, name)[order])
        return order

    def feed(self, ids: Int[Tensor, " sequences"]) -> Float[Tensor, "sequences d"]:
        """Appends one token to every sequence. Returns the hidden states that predict the next ones."""
        # What is recorded reads all windows, whichever are left.
        first, last = 0, self.prefix.sequences
        if not self._recorded:
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
        hidden = self._recorded(step) if self._recorded else self.memory.run(step)
        self.step = self.step + 1
        self.position = self.position + 1
        return hidden
