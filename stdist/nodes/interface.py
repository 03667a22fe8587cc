"""A forecaster of nodes as the rest of the house sees it: training, forecasting and scoring ask these things of it and
know no model."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor, nn

from stdist.evaluation import Embeddings
from stdist.nodes.scaling import CityScaling


class Forecaster(nn.Module, ABC):
    """A model of one city's nodes. ``block_nodes``: how many are computed together where not all fit, None for all.
    ``elsewhere``: advice for data that it does not know."""

    block_nodes: int | None = None
    elsewhere: ClassVar[str] = "train others on it"

    @property
    @abstractmethod
    def scaling(self) -> CityScaling:
        """Mean, standard deviation and calendar of its city's data."""

    @property
    @abstractmethod
    def nodes(self) -> int | None:
        """N of the whole city; None where any number fits."""

    @abstractmethod
    def forward(
        self,
        history: Float[Tensor, "B S N"],
        slot: Int64[Tensor, " B"],
        weekday: Int64[Tensor, " B"],
        *,
        noise_seed: int | None = None,
    ) -> Float[Tensor, "B K N"]:
        """Forecasts in the data's units from history in the data's units, NaN where it is missing.

        ``slot``, ``weekday``: of the last history frame (``scaling.calendar``). ``noise_seed``: of what is random in
        training mode, the same on every learner of a step; by default from torch's generator. Raises InputError as
        :meth:`check` does.
        """

    @abstractmethod
    def check(self, history: Tensor, slot: Tensor, weekday: Tensor) -> None:
        """Raises InputError where the input does not fit, or a node has no value at all; waits for the device once."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Writes specs as JSON and weights as safetensors."""

    @classmethod
    @abstractmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The saved forecaster in evaluation mode. Raises InputError where the folder holds none of this kind."""

    def snapshot(self) -> Callable[[Path], None]:
        """See :class:`stdist.training.loop.Model`; of the whole city."""
        return copy.deepcopy(self).save_pretrained

    def read(self, folder: Path) -> None:
        """Loads the weights that a snapshot wrote. Raises InputError as ``from_pretrained`` does."""
        self.load_state_dict(self.from_pretrained(folder).state_dict())

    def node_parameters(self) -> list[nn.Parameter]:
        """Parameters with a row for each node, which learners along ``nodes`` share out; each has all of the others."""
        return []

    def part(self, nodes: slice) -> "Forecaster":
        """The forecaster of these nodes alone, as one learner along ``nodes`` holds it."""
        return self

    def embeddings(self, node_means: Float[np.ndarray, " N"], seed: int) -> Embeddings | None:
        """Learnt embeddings in two dimensions for a report; None where it has none to show."""
        return None
