"""The one interface of the backbones: features of nodes in, forecasts out, and no city in between.

What a city is (its mean and standard deviation, its graph) is ``NodeForecaster``'s, so that one backbone can serve
cities of any N. Where a method ties weights to nodes, a spec with ``nodes`` None leaves these weights out.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from jaxtyping import Float, Int64
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from stdist.errors import InputError
from stdist.nodes.scaling import MINUTES_PER_DAY


class ForecasterSpec(BaseModel):
    """S (``history``) and K (``horizon``) in frames, ``cadence`` in minutes; ``weekdays``: see
    :class:`stdist.nodes.scaling.City`.

    ``nodes``: how many have weights of their own; None for a backbone that fits any city. ``graph``: nodes and edges
    of the graph, None without one; ``build`` fills it in. ``uses_graph``: whether the method wants one at all.
    """

    uses_graph: ClassVar[bool] = True
    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: str
    history: int
    horizon: int
    cadence: int
    weekdays: bool = True
    nodes: int | None = None
    graph: tuple[int, int] | None = None

    @property
    def slots(self) -> int:
        return MINUTES_PER_DAY // self.cadence

    def backbone(self) -> "NodeBackbone":
        """A new backbone; raises InputError where the spec makes no sense."""
        raise NotImplementedError


class NodeBackbone(nn.Module, ABC):
    """``time_of_day``: whether features have a second channel behind the z-scores, each frame's fraction of the day."""

    time_of_day: ClassVar[bool] = False

    def __init__(self, spec: ForecasterSpec) -> None:
        super().__init__()
        sizes = [value for value in dict(spec).values() if type(value) is int]
        if min(sizes) < 1:
            raise InputError(f"{spec.model_type}: {spec!r} has a size below 1; give at least 1 of each")
        self.spec = spec

    @abstractmethod
    def forward(
        self,
        features: Float[Tensor, "B S N C"],
        slot: Int64[Tensor, "B"],
        weekday: Int64[Tensor, "B"],
        graph: Float[Tensor, "N N"] | None,
    ) -> Float[Tensor, "B N K"]:
        """z-scores of the next K frames. ``slot``, ``weekday``: of the last history frame; ``graph``: sparse, weights
        of the edges from node (row) to node (column)."""
