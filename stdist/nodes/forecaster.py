"""A backbone in a city: what makes it a forecaster in the data's units, with the interface of UrbanPG."""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import Field, RootModel
from torch import Tensor

from stdist.errors import InputError
from stdist.nodes.backbones.graph_wavenet import GraphWaveNetSpec
from stdist.nodes.backbones.graphs import matrix, sparse_graph
from stdist.nodes.backbones.interface import ForecasterSpec, NodeBackbone
from stdist.nodes.backbones.stgcn import STGCNSpec
from stdist.nodes.backbones.stid import STIDSpec
from stdist.nodes.folders import load_module, save_module
from stdist.nodes.scaling import City


class NodeForecaster(City):
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
            given, made = ("without", "with") if self.spec.graph is None else ("with", "without")
            raise InputError(f"{self.who} are used {given} a graph but were made {made} one; give them what they had")
        if graph is not None:
            self.register_buffer("edges", graph.indices())
            self.register_buffer("weights", graph.values())

    @property
    def nodes(self) -> int | None:
        """N, where weights or the graph say it."""
        return self.spec.nodes or (self.spec.graph[0] if self.spec.graph else None)

    def forward(
        self, history: Float[Tensor, "B S N"], slot: Int64[Tensor, "B"], weekday: Int64[Tensor, "B"]
    ) -> Float[Tensor, "B K N"]:
        """Forecasts in the data's units from history in the data's units, NaN where it is missing; ``slot``,
        ``weekday`` of the last history frame (:meth:`calendar`). Raises InputError as :meth:`check` does."""
        self.check(history, slot, weekday)
        features = self.normalise(history).transpose(1, 2)[..., None]
        if self.backbone.time_of_day:
            ago = torch.arange(history.shape[1] - 1, -1, -1, device=slot.device)
            fraction = ((slot[:, None] - ago) % self.slots / self.slots)[..., None, None]
            features = torch.cat([features, fraction.to(features).expand_as(features)], -1)
        graph = matrix(self.edges, self.weights, self.spec.graph[0]) if self.spec.graph else None
        return self.restore(self.backbone(features, slot, weekday, graph))

    def check(self, history: Tensor, slot: Tensor, weekday: Tensor) -> None:
        """Raises InputError where the input does not fit the spec, or a node has no value at all."""
        remedy = "give the data they were trained on, or train others"
        self.check_batch(history, slot, weekday, self.spec.history, self.nodes, remedy)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors``, the graph among the weights."""
        save_module(self, self.spec, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "NodeForecaster":
        """In evaluation mode. Raises InputError where the folder holds no such forecaster."""
        return load_module(_empty, BaselineSpec, Path(folder)).eval()


class BaselineSpec(RootModel[Annotated[STIDSpec | GraphWaveNetSpec | STGCNSpec, Field(discriminator="model_type")]]):
    """The spec of any of them, by its ``model_type``."""


def build(spec: ForecasterSpec, mean: float, std: float, graph: np.ndarray | Tensor | None = None) -> NodeForecaster:
    """A new backbone of ``spec`` in a city with ``graph`` [N, N], dense or sparse, which a method may pass over.

    Raises InputError where the spec makes no sense, the graph is none or not of these nodes, or the method needs one.
    """
    sparse = sparse_graph(graph) if graph is not None and spec.uses_graph else None
    backbone = _of_graph(spec, sparse).backbone()
    return NodeForecaster(backbone, mean, std, sparse)


def _of_graph(spec: ForecasterSpec, graph: Float[Tensor, "N N"] | None) -> ForecasterSpec:
    size = None if graph is None else (len(graph), graph.values().numel())
    if size and spec.nodes and size[0] != spec.nodes:
        raise InputError(f"the graph has {size[0]} nodes, {spec.model_type} is of {spec.nodes}; give the data's graph")
    return spec.model_copy(update={"graph": size})


def _empty(saved: BaselineSpec) -> NodeForecaster:
    """What a folder's weights and graph are loaded into."""
    spec, graph = saved.root, None
    if spec.graph is not None:
        nodes, edges = spec.graph
        graph = matrix(torch.empty(2, edges, dtype=torch.int64), torch.empty(edges), nodes)
    return NodeForecaster(spec.backbone(), 0.0, 1.0, graph)
