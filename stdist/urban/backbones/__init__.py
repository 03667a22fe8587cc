"""Published forecasters of nodes behind one interface: baselines here, and backbones of what trains across cities."""

from stdist.urban.backbones.forecaster import NodeForecaster, build
from stdist.urban.backbones.graph_wavenet import GraphWaveNetSpec
from stdist.urban.backbones.graphs import sparse_graph
from stdist.urban.backbones.interface import ForecasterSpec, NodeBackbone
from stdist.urban.backbones.stgcn import STGCNSpec
from stdist.urban.backbones.stid import STIDSpec

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
