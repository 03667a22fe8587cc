"""STGCN (Yu et al., "Spatio-Temporal Graph Convolutional Networks", IJCAI 2018, arXiv 1709.04875): two ST-Conv blocks
and an output layer.

The output layer gives K frames at once where the authors' gives one and is called again. As in their code the
residual of a gated convolution is added before its gate, on channels that are padded with zeros or mapped, and layer
normalisation is over nodes and channels with weights for each node; without ``nodes`` its weights are of channels
alone. λ_max is 2 (:func:`stdist.nodes.graphs.scaled_laplacian`).
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stdist.errors import InputError
from stdist.nodes.backbones.layers import TemporalConvolution, propagate
from stdist.nodes.forecaster import BackboneConfig, ForecasterSpec, NodeBackbone
from stdist.nodes.graphs import scaled_laplacian
from stdist.nodes.kinds import BACKBONES


class STGCNSpec(ForecasterSpec):
    """``channels`` of a block's temporal convolutions, ``graph_channels`` of the graph convolution between them; frames
    and Chebyshev terms of a kernel (K_t, K). Defaults are the authors'."""

    model_type: Literal["stgcn"] = "stgcn"
    channels: int = 64
    graph_channels: int = 16
    temporal_kernel: int = 3
    chebyshev_terms: int = 3

    def backbone(self) -> "STGCN":
        return STGCN(self)


@BACKBONES.register("stgcn")
class STGCNConfig(BackboneConfig):
    """``d``: channels of temporal convolutions, the authors' 64 where absent; those of graph convolutions a quarter."""

    Spec = STGCNSpec
    kind: Literal["stgcn"] = "stgcn"
    d: int | None = Field(None, ge=1)

    def options(self) -> dict[str, object]:
        d = self.d or STGCNSpec.model_fields["channels"].default
        return {"channels": d, "graph_channels": max(1, d // 4)}


class STGCN(NodeBackbone):
    """Raises InputError without a graph, and where the history is too short for four temporal convolutions."""

    def __init__(self, spec: STGCNSpec) -> None:
        super().__init__(spec)
        left = spec.history - 4 * (spec.temporal_kernel - 1)
        if spec.graph is None:
            raise InputError("stgcn needs a graph, and there is none; prepare the store with its adjacency")
        if left < 1:
            raise InputError(f"stgcn needs a history of {spec.history - left + 1} frames or more, not {spec.history}")
        self.blocks = nn.ModuleList([STConvBlock(spec, 1), STConvBlock(spec, spec.channels)])
        self.last = GatedConvolution(spec.channels, spec.channels, left)
        self.output = nn.Linear(spec.channels, spec.horizon)

    def forward(self, features: Tensor, slot: Tensor, weekday: Tensor, graph: Tensor | None) -> Tensor:
        assert graph is not None
        laplacian = scaled_laplacian(graph)
        x = features.permute(2, 0, 1, 3)
        for block in self.blocks:
            x = block(x, laplacian)
        return self.output(self.last(x)[:, :, 0]).transpose(0, 1)


class STConvBlock(nn.Module):
    """Eq. 8: Γ₁ ∗ ReLU(Θ ∗ (Γ₀ ∗ v)), then layer normalisation of each frame."""

    def __init__(self, spec: STGCNSpec, inputs: int) -> None:
        super().__init__()
        self.first = GatedConvolution(inputs, spec.channels, spec.temporal_kernel)
        self.graph = ChebyshevConvolution(spec.channels, spec.graph_channels, spec.chebyshev_terms)
        self.second = GatedConvolution(spec.graph_channels, spec.channels, spec.temporal_kernel)
        weights = (1 if spec.nodes is None else spec.nodes, 1, 1, spec.channels)
        self.scale, self.shift = nn.Parameter(torch.ones(weights)), nn.Parameter(torch.zeros(weights))

    def forward(self, v: Float[Tensor, "N B T C"], laplacian: Float[Tensor, "N N"]) -> Float[Tensor, "N B t D"]:
        v = self.second(self.graph(self.first(v), laplacian).relu())
        variance, mean = torch.var_mean(v, (0, 3), correction=0, keepdim=True)
        return (v - mean) * (variance + 1e-6).rsqrt() * self.scale + self.shift


class GatedConvolution(nn.Module):
    """Eq. 7 with the residual: (P + v) ⊙ σ(Q), over ``kernel`` frames."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.convolution = TemporalConvolution(inputs, 2 * outputs, kernel)
        self.mapped = nn.Linear(inputs, outputs) if inputs > outputs else None
        self.padding = max(outputs - inputs, 0)

    def forward(self, v: Float[Tensor, "N B T C"]) -> Float[Tensor, "N B t D"]:
        P, Q = self.convolution(v).chunk(2, -1)
        v = v[:, :, -P.shape[2] :]
        v = F.pad(v, (0, self.padding)) if self.mapped is None else self.mapped(v)
        return (P + v) * Q.sigmoid()


class ChebyshevConvolution(nn.Module):
    """Eq. 3 and 6: Σₖ T_k(L̃)XΘ_k, T₀ = I, T₁ = L̃, T_k = 2L̃T_{k−1} − T_{k−2}; with a bias."""

    def __init__(self, inputs: int, outputs: int, terms: int) -> None:
        super().__init__()
        self.terms = terms
        self.linear = nn.Linear(terms * inputs, outputs)

    def forward(self, x: Float[Tensor, "N B T C"], laplacian: Float[Tensor, "N N"]) -> Float[Tensor, "N B T D"]:
        terms = [x]
        if self.terms > 1:
            terms.append(propagate(laplacian, x))
        while len(terms) < self.terms:
            terms.append(2 * propagate(laplacian, terms[-1]) - terms[-2])
        return self.linear(torch.cat(terms, -1))
