"""A decoding step of fixed size over fixed memory, recorded once as a CUDA graph and replayed.

Launching the kernels of one token costs a GPU more than running them where few sequences are left. Nothing here is held
by what it holds: a recording is freed with its last user, not when garbage is collected.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from stdist.vision_llm.kernels.prefix import Prefix
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.decode_memory import DecodeMemory, Family, Sizes, Step


class Recording(Protocol):
    """A function over fixed memory, recorded so that it can be computed again."""

    result: Tensor

    def replay(self) -> None:
        """Computes ``result`` from what the memory holds by now."""
        ...


class CUDARecording:
    """See :class:`Recording`."""

    def __init__(self, run: Callable[[], Tensor]):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up; writing a token twice changes nothing
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.result = run()

    def replay(self) -> None:
        self._graph.replay()


RECORDINGS: dict[str, Callable[[Callable[[], Tensor]], Recording]] = {"cuda": CUDARecording}
"""Makers of recordings by type of device; on others every step is run."""


class RecordedStep:
    """One recording for all batches that its sizes hold: their windows are copied in, their steps fill its front."""

    def __init__(self, policy: PolicyModel, like: Prefix, sizes: Sizes):
        self.memory = DecodeMemory(policy, like, sizes)
        rows = sizes.windows
        self._windows = replace(
            like,
            keys=[x.new_zeros(rows, *x.shape[1:]) for x in like.keys],
            values=[x.new_zeros(rows, *x.shape[1:]) for x in like.values],
            last=like.last.new_zeros(rows, *like.last.shape[1:]),
            position=like.position.new_zeros(rows),
        )
        self._step = self._blank()
        self._recording: Recording | None = None
        self._weights = _addresses(policy)

    def serves(self, policy: PolicyModel, sizes: Sizes) -> bool:
        """True where batches of these sizes fit in, and the weights still lie where the recording reads them."""
        return self.memory.sizes.hold(sizes) and self._weights == _addresses(policy)

    def begin(self, prefix: Prefix) -> None:
        """Takes in the windows of a new batch, and forgets the sequences of the last one."""
        for mine, theirs in zip(
            (*self._windows.keys, *self._windows.values), (*prefix.keys, *prefix.values), strict=True
        ):
            mine[: len(theirs)] = theirs
        # A hidden value counts zero times, which is not nothing where it is infinite.
        for buffer in (*self.memory.own_keys, *self.memory.own_values):
            buffer.zero_()

    def __call__(self, step: Step) -> Float[Tensor, "sequences d"]:
        self._step.copy_(step)
        if self._recording is None:
            memory, blank = self.memory, self._step
            self._recording = RECORDINGS[blank.ids.device.type](lambda: memory.run(blank))
        self._recording.replay()
        return self._recording.result[: len(step.ids)].clone()

    def _blank(self) -> Step:
        """A step of the largest size there can be, so that any other fits in."""
        sizes, zeros = self.memory.sizes, self._windows.position.new_zeros
        slots = sizes.sequences

        def family(parents: int, most: int) -> Family:
            return Family(zeros(slots), zeros(slots), zeros(parents, most))

        cells, windows = family(sizes.cells, sizes.of_cell), family(sizes.windows, sizes.of_window)
        ids, position, index = zeros(slots), zeros(slots), zeros(slots)
        return Step(ids, position, index, cells, windows, self._windows, extent=sizes.tokens, ragged=True)


def _addresses(policy: PolicyModel) -> tuple[int, ...]:
    return tuple(parameter.data_ptr() for parameter in policy.parameters())
