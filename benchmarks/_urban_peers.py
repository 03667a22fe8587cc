"""The peers of ``urbanpg_scaling.py``: STID of basicts and Graph WaveNet of torch-spatiotemporal, as they come.

Needs an environment of its own (benchmarks/README.md), in which stdist need not be.
"""

import sys
from types import ModuleType

import torch
from _urban_point import MEAN, STD, K, Made, S
from basicts.models.STID import STID, STIDConfig

if "torch_sparse" not in sys.modules:
    # torch-spatiotemporal imports it, and Graph WaveNet calls none of it; to compile it takes a quarter of an hour.
    named = sys.modules["torch_sparse"] = ModuleType("torch_sparse")
    named.SparseTensor = type("SparseTensor", (), {})  # type: ignore[attr-defined]
    for name in ("cat", "matmul", "remove_diag", "set_diag", "fill_diag"):
        setattr(named, name, None)

from tsl.nn.models.stgn.graph_wavenet_model import GraphWaveNetModel

SLOTS = 96
NEIGHBOURS = 23
"""Edges a node, as in LargeST's graph of California."""


def make(model: str, nodes: int, width: int) -> Made:
    """``width``: of STID's hidden layers, four embeddings side by side. Graph WaveNet keeps its authors' sizes."""
    return _stid(nodes, width) if model == "stid" else _graph_wavenet(nodes)


def _stid(nodes: int, width: int) -> Made:
    sizes = dict.fromkeys(
        ("input_hidden_size", "spatial_hidden_size", "tid_hidden_size", "diw_hidden_size"), width // 4
    )
    config = STIDConfig(
        input_len=S,
        output_len=K,
        num_features=nodes,
        num_layers=3,
        if_time_in_day=True,
        if_day_in_week=True,
        num_time_in_day=SLOTS,
        **sizes,
    )
    stid, when = STID(config), torch.tensor([5 / SLOTS, 2 / 7]).expand(1, S, 2)
    return stid, lambda history: stid((history - MEAN) / STD, when) * STD + MEAN


def _graph_wavenet(nodes: int) -> Made:
    """Value and time of day, a given graph and a learnt one; the learnt one, N x N, takes most of its time."""
    model = GraphWaveNetModel(input_size=1, exog_size=1, output_size=1, horizon=K, n_nodes=nodes)
    rows = torch.arange(nodes).repeat_interleave(NEIGHBOURS)
    columns = (rows + torch.arange(NEIGHBOURS).repeat(nodes)) % nodes
    edges, weights = torch.stack([columns, rows]), torch.rand(len(rows)) + 0.1
    of_day = (torch.arange(S) / SLOTS).view(1, S, 1)

    def forecast(history: torch.Tensor) -> torch.Tensor:
        return model(((history - MEAN) / STD)[..., None], edges, weights, u=of_day)[..., 0] * STD + MEAN

    return model, forecast
