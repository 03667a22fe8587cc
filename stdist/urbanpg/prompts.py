"""Personalized context prompts (UrbanPG, Eq. 3–4, 9–10): all that UrbanPG knows of one city, and nothing else.

A scenario is a set of nodes at a cadence. Its prompts hold an embedding of every slot of the day, weekday and node, and
the mean and standard deviation of its training span: the backbone sees z-scores only, which is what lets it move to
another city. The paper gives neither the distribution of untrained embeddings nor that of the noise: both are normal
with standard deviation ``INITIAL_STD``, so that a noisy node looks like one that has not been learnt.
"""

import copy
import re
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from stdist.errors import InputError
from stdist.nodes.folders import load_module, save_module
from stdist.nodes.scaling import MINUTES_PER_DAY, CityScaling

INITIAL_STD = 0.02
"""On a synthetic city of 300 nodes, 600 steps of AdamW left a test MAE of 13.0 with it, and of 15.1 with 1."""
NODES_PER_STREAM = 16384
"""Nodes whose replacements come from one random stream, so that any part of a city draws what the whole city does."""


class PromptSpec(BaseModel):
    """``periods``: numbers of nodes as they came (Eq. 9), one number where the city never grew; ``cadence`` in minutes;
    ``weekdays``: see :class:`stdist.nodes.scaling.CityScaling`.

    Ablations: ``temporal`` and ``spatial`` False leave out E_tod and E_dow, or E_s; ``p`` 0 leaves out Eq. 4.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: Literal["urbanpg_prompts"] = "urbanpg_prompts"
    scenario: str
    periods: tuple[int, ...]
    cadence: int
    d: int = 256
    weekdays: bool = True
    temporal: bool = True
    spatial: bool = True
    p: float = 0.1
    q: float = 0.5

    @property
    def nodes(self) -> int:
        return sum(self.periods)

    @property
    def slots(self) -> int:
        """f of E_tod: positions within a day."""
        return MINUTES_PER_DAY // self.cadence


class ContextPrompts(CityScaling):
    """E_tod [slots, d], E_dow [7, d], E_s [N, d] in one tensor per period, E_d [d]; mean and std in the data's units.
    Without Eq. 4 nothing reads E_d: it is in the files and is no parameter, so that no optimizer decays it.

    ``first_node``: number, in the whole city, of the first of these nodes (:meth:`part`). Raises InputError where
    the spec makes no sense.
    """

    shared: Tensor

    def __init__(self, spec: PromptSpec, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__(f"prompts {spec.scenario!r}", spec.cadence, mean, std, spec.weekdays)
        _check(spec)
        self.spec, self.first_node = spec, 0
        if spec.temporal:
            self.time_of_day = nn.Parameter(_initial(spec.slots, spec.d))
            self.day_of_week = nn.Parameter(_initial(7, spec.d))
        # The name in checkpoints.
        self.node_rows = nn.ParameterList(
            nn.Parameter(_initial(count, spec.d)) for count in spec.periods if spec.spatial
        )
        if spec.spatial:
            shared = _initial(1, spec.d)[0]
            if spec.p:
                self.shared = nn.Parameter(shared)
            else:
                self.register_buffer("shared", shared)

    def temporal(self, slot: Int64[Tensor, " B"], weekday: Int64[Tensor, " B"]) -> Float[Tensor, "B d"] | None:
        """P_t (Eq. 3): the same for all nodes of a sample. None without temporal context."""
        return self.time_of_day[slot] + self.day_of_week[weekday] if self.spec.temporal else None

    def node_embeddings(self) -> Float[Tensor, "N d"] | None:
        """E_s, of the nodes of all periods (Eq. 9). None without spatial context."""
        if not self.spec.spatial:
            return None
        return self.node_rows[0] if len(self.node_rows) == 1 else torch.cat(list(self.node_rows))

    def perturb(self, embeddings: Float[Tensor, "n d"], first: int, noise_seed: int | None) -> Float[Tensor, "n d"]:
        """P_s (Eq. 4) of the nodes first, first + 1, … of these prompts; ``noise_seed`` None replaces none.

        u_n and the noise M_d depend on ``noise_seed`` and on the node's number in the whole city alone: blocks, ranks
        and the second pass of a checkpoint see the same ones. On another kind of device they are others.
        """
        if noise_seed is None or self.spec.p == 0:
            return embeddings
        first, stop, spec = self.first_node + first, self.first_node + first + len(embeddings), self.spec
        positions, replacements, device = [], [], embeddings.device
        for start in range(first - first % NODES_PER_STREAM, stop, NODES_PER_STREAM):
            nodes, noisy, noise = _replacements(noise_seed, start, spec.p, spec.q, spec.d, device)
            low, high = torch.searchsorted(nodes, torch.tensor([first, stop], device=device)).tolist()
            low_noisy, high_noisy = torch.searchsorted(noisy, torch.tensor([low, high], device=device)).tolist()
            positions.append(nodes[low:high] - first)
            noisy, noise = noisy[low_noisy:high_noisy] - low, noise[low_noisy:high_noisy].to(embeddings.dtype)
            replacements.append(self.shared.expand(high - low, -1).index_copy(0, noisy, noise))
        return embeddings.index_copy(0, torch.cat(positions), torch.cat(replacements))

    def expand(self, new_nodes: int, *, train_old_rows: bool = False) -> "ContextPrompts":
        """Prompts for ``new_nodes`` more nodes behind the old ones (Eq. 9), whose embeddings are copied bit by bit.

        Unless ``train_old_rows``, those are frozen (Eq. 10): no gradient, so no weight decay either.
        """
        if new_nodes < 1:
            raise InputError(f"{new_nodes} new nodes for prompts {self.spec.scenario!r}: give at least 1")
        rows = [nn.Parameter(old.detach().clone(), requires_grad=train_old_rows) for old in self.node_rows]
        if self.spec.spatial:
            rows.append(nn.Parameter(_initial(new_nodes, self.spec.d).to(self.shared)))
        return self.with_node_rows((*self.spec.periods, new_nodes), rows)

    def part(self, start: int, stop: int) -> "ContextPrompts":
        """A copy for the nodes [start, stop) of these prompts; what is frozen stays frozen."""
        periods: list[int] = []
        rows: list[nn.Parameter] = []
        first = 0
        for period, count in enumerate(self.spec.periods):
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                periods.append(high - low)
                if self.spec.spatial:
                    old = self.node_rows[period]
                    rows.append(nn.Parameter(old.detach()[low:high].clone(), requires_grad=old.requires_grad))
            first += count
        part = self.with_node_rows(tuple(periods), rows)
        part.first_node = self.first_node + start
        return part

    def with_node_rows(self, periods: tuple[int, ...], rows: list[nn.Parameter]) -> "ContextPrompts":
        """A copy, of a city's nodes from its first, around embeddings ``rows`` of ``periods``, which are not copied."""
        prompts = copy.deepcopy(self, {id(self.node_rows): nn.ParameterList(rows)})
        prompts.spec, prompts.first_node = self.spec.model_copy(update={"periods": periods}), 0
        return prompts

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors``."""
        save_module(self, self.spec, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ContextPrompts":
        """Raises InputError where the folder does not hold prompts."""
        return load_module(cls, PromptSpec, Path(folder))


@lru_cache(maxsize=2)
def _replacements(
    noise_seed: int, start: int, p: float, q: float, d: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The nodes that are replaced of ``NODES_PER_STREAM`` from ``start``, int64 [r]; which of these become noise,
    int64 [m] from 0 to r - 1, the others become E_d; and that noise [m, d]. Small blocks ask for the same ones."""
    seed = np.random.SeedSequence((noise_seed, start)).generate_state(1).item()
    generator = torch.Generator(device).manual_seed(seed)
    u = torch.rand(NODES_PER_STREAM, generator=generator, device=device)
    replaced = (u < p).nonzero()[:, 0]
    noisy = (u[replaced] >= p * q).nonzero()[:, 0]
    noise = torch.randn(len(noisy), d, generator=generator, device=device) * INITIAL_STD
    return replaced + start, noisy, noise


def _initial(count: int, d: int) -> Tensor:
    return torch.normal(0.0, INITIAL_STD, (count, d))


def _check(spec: PromptSpec) -> None:
    what = f"prompts {spec.scenario!r}"
    if not re.fullmatch(r"[\w.-]*\w", spec.scenario):
        raise InputError(f"{what}: the scenario names a folder; give letters, digits, '-', '_' and '.' only")
    if not spec.periods or min(spec.periods) < 1 or spec.d < 1:
        raise InputError(f"{what}: {list(spec.periods)} nodes with d {spec.d}; give at least 1 of each")
    if not (0 <= spec.p < 1 and 0 <= spec.q < 1):
        raise InputError(f"{what}: p {spec.p}, q {spec.q}; Eq. 4 takes both from [0, 1)")
