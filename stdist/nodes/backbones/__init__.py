"""Published forecasters of nodes behind one interface: baselines here, and backbones of what trains across cities."""

from stdist.nodes.backbones.graph_wavenet import GraphWaveNetSpec
from stdist.nodes.backbones.graphs import sparse_graph
from stdist.nodes.backbones.interface import ForecasterSpec, NodeBackbone
from stdist.nodes.backbones.stgcn import STGCNSpec
from stdist.nodes.backbones.stid import STIDSpec
from stdist.nodes.forecaster import NodeForecaster, build

__all__ = [
    "ForecasterSpec",
    "GraphWaveNetSpec",
    "NodeBackbone",
    "NodeForecaster",
    "STGCNSpec",
    "STIDSpec",
    "build",
    "sparse_graph",
]
