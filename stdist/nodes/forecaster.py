"""Networks of nodes without a city, and :class:`NodeForecaster`, which puts one into a city.

A network takes features of nodes and gives z-scores; a city is its data's mean and standard deviation and its graph. So
one network can serve cities of any N. Where a method ties weights to nodes, a spec with ``nodes`` None leaves these
weights out.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from stdist.errors import InputError
from stdist.nodes.dataset import NodeDataset
from stdist.nodes.folders import CONFIG, load_module, load_spec, save_module
from stdist.nodes.graphs import matrix, sparse_graph
from stdist.nodes.interface import Forecaster
from stdist.nodes.kinds import BACKBONES, ModelConfig
from stdist.nodes.scaling import MINUTES_PER_DAY, CityScaling


class ForecasterSpec(BaseModel):
    """S (``history``) and K (``horizon``) in frames, ``cadence`` in minutes; ``weekdays``: see
    :class:`stdist.nodes.scaling.CityScaling`.

    ``nodes``: how many have weights of their own; None for a network that fits any city. ``graph``: nodes and edges
    of the graph, None without one; ``build`` fills it in. ``uses_graph``: False for a method that passes a graph over.
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
        """A new network; raises InputError where the spec makes no sense."""
        raise NotImplementedError


class NodeBackbone(nn.Module, ABC):
    """``time_of_day``: True where features have a second channel behind the z-scores, each frame's fraction of the
    day."""

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
        slot: Int64[Tensor, " B"],
        weekday: Int64[Tensor, " B"],
        graph: Float[Tensor, "N N"] | None,
    ) -> Float[Tensor, "B N K"]:
        """z-scores of the next K frames. ``slot``, ``weekday``: of the last history frame; ``graph``: sparse, weights
        of the edges from node (row) to node (column)."""


class NodeForecaster(CityScaling, Forecaster):
    """``backbone``, which is not copied, on data of this mean and std and a graph (:func:`sparse_graph`).

    The graph is saved with the weights. Raises InputError where it is of another number of nodes than the backbone's
    weights, or where one of the two has a graph and the other has not.
    """

    edges: Tensor
    weights: Tensor

    def __init__(
        self, backbone: NodeBackbone, mean: float, std: float, graph: Float[Tensor, "N N"] | None = None
    ) -> None:
        super().__init__(
            f"weights of {backbone.spec.model_type}", backbone.spec.cadence, mean, std, backbone.spec.weekdays
        )
        self.backbone = backbone
        self.spec = _of_graph(backbone.spec, graph)
        if (self.spec.graph is None) != (backbone.spec.graph is None):
            used, made = ("without", "with") if self.spec.graph is None else ("with", "without")
            raise InputError(f"{self.who} are used {used} a graph but were made {made} one; give them what they had")
        if graph is not None:
            self.register_buffer("edges", graph.indices())
            self.register_buffer("weights", graph.values())

    @property
    def scaling(self) -> CityScaling:
        return self

    @property
    def nodes(self) -> int | None:
        return self.spec.nodes or (self.spec.graph[0] if self.spec.graph else None)

    def forward(self, history: Tensor, slot: Tensor, weekday: Tensor, *, noise_seed: int | None = None) -> Tensor:
        self.check(history, slot, weekday)
        features = self.normalise(history).transpose(1, 2)[..., None]
        if self.backbone.time_of_day:
            ago = torch.arange(history.shape[1] - 1, -1, -1, device=slot.device)
            fraction = ((slot[:, None] - ago) % self.slots / self.slots)[..., None, None]
            features = torch.cat([features, fraction.to(features).expand_as(features)], -1)
        graph = matrix(self.edges, self.weights, self.spec.graph[0]) if self.spec.graph else None
        return self.restore(self.backbone(features, slot, weekday, graph))

    def check(self, history: Tensor, slot: Tensor, weekday: Tensor) -> None:
        remedy = "give the data they were trained on, or train others"
        self.check_batch(history, slot, weekday, self.spec.history, self.nodes, remedy)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors``, the graph among the weights."""
        save_module(self, self.spec, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "NodeForecaster":
        kind = load_spec(_AnySpec, Path(folder)).model_type
        if kind not in BACKBONES:
            raise InputError(f"{Path(folder) / CONFIG} is of a {kind!r}, which is no backbone of nodes")
        config = BACKBONES[kind]
        assert issubclass(config, BackboneConfig)
        return load_module(_empty, config.Spec, Path(folder)).eval()


class BackboneConfig(ModelConfig):
    """A run's ``model:`` of a network inside :class:`NodeForecaster`. ``Spec``: its spec, whose ``model_type`` is the
    ``kind``; options have the spec's names and are the authors' where None, unless :meth:`options` says more."""

    Spec: ClassVar[type[ForecasterSpec]]

    def options(self) -> dict[str, object]:
        """Fields of ``Spec`` beside those that the data says."""
        return self.model_dump(exclude={"kind"}, exclude_none=True)

    def build(self, dataset: NodeDataset, seed: int) -> NodeForecaster:
        """On the store's graph where the method takes one. Raises InputError where it needs one and there is none."""
        torch.manual_seed(seed)
        windows, statistics = dataset.train, dataset.statistics
        spec = self.Spec.model_validate(
            {"history": windows.S, "horizon": windows.K, "cadence": dataset.cadence, "weekdays": dataset.holds_weeks}
            | {"nodes": len(dataset.nodes)}
            | self.options()
        )
        return build(spec, statistics.mean, statistics.std, dataset.nodes.adjacency if spec.uses_graph else None)

    def load(self, folder: Path) -> NodeForecaster:
        return NodeForecaster.from_pretrained(folder)


def build(spec: ForecasterSpec, mean: float, std: float, graph: np.ndarray | Tensor | None = None) -> NodeForecaster:
    """A new network of ``spec`` in a city with ``graph`` [N, N], dense or sparse, which a method may pass over.

    Raises InputError where the spec makes no sense, the graph is none or not of these nodes, or the method needs one.
    """
    sparse = sparse_graph(graph) if graph is not None and spec.uses_graph else None
    backbone = _of_graph(spec, sparse).backbone()
    return NodeForecaster(backbone, mean, std, sparse)


class _AnySpec(BaseModel):
    model_type: str


def _of_graph(spec: ForecasterSpec, graph: Float[Tensor, "N N"] | None) -> ForecasterSpec:
    size = None if graph is None else (len(graph), graph.values().numel())
    if size and spec.nodes and size[0] != spec.nodes:
        raise InputError(f"the graph has {size[0]} nodes, {spec.model_type} is of {spec.nodes}; give the data's graph")
    return spec.model_copy(update={"graph": size})


def _empty(spec: ForecasterSpec) -> NodeForecaster:
    """The module that a folder's weights and graph are loaded into."""
    graph = None
    if spec.graph is not None:
        nodes, edges = spec.graph
        graph = matrix(torch.empty(2, edges, dtype=torch.int64), torch.empty(edges), nodes)
    return NodeForecaster(spec.backbone(), 0.0, 1.0, graph)
