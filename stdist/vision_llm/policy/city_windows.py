"""From a store's windows to what the policy reads: shared prompts, grids, cell prompts and answers."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stdist.data import Region, WindowBatch, Windows
from stdist.errors import InputError
from stdist.vision_llm.policy.model import Policy


@dataclass
class PolicyBatch:
    """W windows × C cells, window by window. ``prompts`` and ``answers`` have W·C rows; ``truth`` is ``[W, C, K]``;
    ``origins`` are indices of the last history frames on the store's time axis."""

    shared: Int[Tensor, "windows tokens"]
    grids: Float[Tensor, "windows S rows cols"]
    prompts: Int[Tensor, "cells tokens"]
    answers: Int[Tensor, "cells K+1"]
    truth: Float[np.ndarray, "windows cells K"]
    observed: np.ndarray
    cells: Int[np.ndarray, "cells"]
    origins: Int[np.ndarray, "windows"]


class CityWindows:
    """Reads windows for a policy. Cells are numbered row by row inside the windows' region.

    ``clamp`` limits values to the numerals' range (``numeral_range`` tells how many that are); otherwise a value out of
    range is an InputError, and so is a store of nodes.
    """

    def __init__(self, policy: Policy, windows: Windows, clamp: bool = False):
        self.policy, self.windows, self._clamp = policy, windows, clamp
        region = windows.region
        if not isinstance(region, Region):
            raise InputError(f"{windows.store.path} holds nodes, the vision-LLM reads grids; choose a store of a grid")
        rows, cols = np.mgrid[region.r0 : region.r1, region.c0 : region.c1]
        inside = windows.store.inside[region.slices].ravel()
        self.cells = np.flatnonzero(inside)
        self._rows, self._cols = rows.ravel(), cols.ravel()
        grid = windows.store.dataset
        self._row_ids, self._col_ids = grid["row"].values, grid["col"].values
        self._local = windows.store.local_times

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, indices: np.ndarray, cells: np.ndarray) -> PolicyBatch:
        """Windows number ``indices`` with ``cells`` of each."""
        return self.batch_of(self.read(indices), cells)

    def read(self, indices: np.ndarray) -> WindowBatch:
        """Windows number ``indices``, in the numerals' range if ``clamp``."""
        return self.in_range(self.windows.read(indices))

    def in_range(self, read: WindowBatch) -> WindowBatch:
        """Windows that were read, in the numerals' range if ``clamp``."""
        if not self._clamp:
            return read
        history, target = (self.policy.vocabulary.clamp(x)[0].astype(np.float32) for x in (read.history, read.target))
        return replace(read, history=history, target=target)

    def batch_of(self, read: WindowBatch, cells: np.ndarray) -> PolicyBatch:
        """``cells`` of windows that were read."""
        history, target, w = read.history, read.target, len(read.history)
        rows, cols = self._rows[cells], self._cols[cells]
        own_history = history[:, :, rows, cols].transpose(0, 2, 1).reshape(w * len(cells), -1)
        truth = target.reshape(w, target.shape[1], -1)[:, :, cells].transpose(0, 2, 1)
        observed = read.target_observed.reshape(w, target.shape[1], -1)[:, :, cells].transpose(0, 2, 1)
        prompts, device = self.policy.prompts, self.policy.device
        shared = [prompts.shared(self._local[origin]) for origin in read.origin_index]
        return PolicyBatch(
            shared=torch.tensor(shared, device=device),
            grids=torch.from_numpy(history),
            prompts=torch.from_numpy(
                prompts.cells(np.tile(self._row_ids[rows], w), np.tile(self._col_ids[cols], w), own_history)
            ).to(device),
            answers=torch.from_numpy(prompts.answers(truth.reshape(w * len(cells), -1))).to(device),
            truth=truth,
            observed=observed,
            cells=cells,
            origins=read.origin_index,
        )

    def describe(self, indices: np.ndarray) -> str:
        """Windows number ``indices`` by the local times of their last history frames."""
        times = np.sort(self._local[self.windows.origins[indices]])
        return "windows at " + ", ".join(str(time.astype("datetime64[m]")) for time in times)

    def evenly(self, count: int) -> np.ndarray:
        """At most ``count`` windows, evenly spaced: the same ones at every validation."""
        return np.unique(np.linspace(0, len(self.windows) - 1, min(count, len(self.windows))).round().astype(int))
