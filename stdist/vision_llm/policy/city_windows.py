"""Windows of a store as the policy reads them: shared prompts, grids, cell prompts and answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stdist.data import Region, WindowBatch, Windows
from stdist.errors import InputError
from stdist.vision_llm.policy.model import PolicyModel


@dataclass
class PolicyBatch:
    """W windows × C cells; ``prompts`` and ``answers`` are sequences of all cells of a window, window by window.
    ``origins``: indices of the last history frames on the store's time axis."""

    shared: Int[Tensor, "windows tokens"]
    grids: Float[Tensor, "windows S rows cols"]
    prompts: Int[Tensor, "sequences tokens"]
    answers: Int[Tensor, "sequences K+1"]
    truth: Float[np.ndarray, "windows cells K"]
    observed: np.ndarray
    cells: Int[np.ndarray, " cells"]
    origins: Int[np.ndarray, " windows"]


def encode_windows(
    policy: PolicyModel,
    history: Float[np.ndarray, "windows S rows cols"],
    origins: Sequence[np.datetime64],
    positions: Int[np.ndarray, "cells 2"],
    names: Int[np.ndarray, "cells 2"],
) -> tuple[Int[Tensor, "windows tokens"], Float[Tensor, "windows S rows cols"], Int[Tensor, "sequences tokens"]]:
    """Shared prompts, grids and cell prompts (window by window), the prompts on the policy's device.

    Args:
        history: in units; ``origins``: local time of each window's last frame.
        positions: row and column of each cell in ``history``; ``names``: the data's own ids of these.
    """
    values = history[:, :, positions[:, 0], positions[:, 1]].transpose(0, 2, 1).reshape(-1, history.shape[1])
    names = np.tile(names, (len(history), 1))
    shared = [policy.prompts.shared(origin) for origin in origins]
    prompts = policy.prompts.cells(names[:, 0], names[:, 1], values)
    device = policy.device
    return torch.tensor(shared, device=device), torch.from_numpy(history), torch.from_numpy(prompts).to(device)


class CityWindows:
    """Reads windows for a policy. Cells are numbered row by row inside the windows' region.

    ``clamp`` limits values to the numerals' range (``numeral_range`` tells how many that are); otherwise a value out of
    range is an InputError, and so is a store of nodes.
    """

    def __init__(self, policy: PolicyModel, windows: Windows, clamp: bool = False):
        self.policy, self.windows, self._clamp = policy, windows, clamp
        region = windows.region
        if not isinstance(region, Region):
            raise InputError(f"{windows.store.path} holds nodes, the vision-LLM reads grids; choose a store of a grid")
        self._positions = np.mgrid[region.r0 : region.r1, region.c0 : region.c1].reshape(2, -1).T
        inside = windows.store.inside[region.slices].ravel()
        self.cells = np.flatnonzero(inside)
        grid = windows.store.dataset
        self._names = np.stack([grid[name].values[self._positions[:, i]] for i, name in enumerate(("row", "col"))], 1)
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
        origins = self._local[read.origin_index]
        inputs = encode_windows(self.policy, read.history, origins, self._positions[cells], self._names[cells])
        truth, observed = (
            x.reshape(*x.shape[:2], -1)[:, :, cells].transpose(0, 2, 1) for x in (read.target, read.target_observed)
        )
        answers = torch.from_numpy(self.policy.prompts.answers(truth.reshape(-1, truth.shape[-1])))
        return PolicyBatch(*inputs, answers.to(self.policy.device), truth, observed, cells, read.origin_index)

    def describe(self, indices: np.ndarray) -> str:
        """Windows number ``indices`` by the local times of their last history frames."""
        times = np.sort(self._local[self.windows.origins[indices]])
        return "windows at " + ", ".join(str(time.astype("datetime64[m]")) for time in times)

    def evenly(self, count: int) -> np.ndarray:
        """See the function of this name."""
        return evenly(self.windows, count)


def evenly(windows: Windows, count: int) -> np.ndarray:
    """At most ``count`` windows, evenly spaced: the same ones at every validation."""
    return np.unique(np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(int))
