"""Graph WaveNet (Wu et al., "Graph WaveNet for Deep Spatial-Temporal Graph Modeling", IJCAI 2019, arXiv 1906.00121):
gated dilated convolutions over time, diffusion over a given graph and one that is learnt.

As in the authors' code: the terms k = 0 of Eq. 6 are one, batch normalisation closes a layer, and a history shorter
than the receptive field gets zeros before it. Left out, because nothing reads them: the skip connections of all but
the last frame, and the last layer's graph convolution and normalisation.
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
from stdist.nodes.graphs import transition
from stdist.nodes.kinds import BACKBONES

KERNEL = 2


class GraphWaveNetSpec(ForecasterSpec):
    """Channels of residual and gated layers, of skip connections and of the end's hidden layer; ``blocks`` of
    ``layers`` each, whose dilations are 1, 2, 4, …; K of Eq. 6 (``diffusion_steps``); ``embedding``: width of E₁, E₂.
    Defaults are the authors'."""

    model_type: Literal["graph_wavenet"] = "graph_wavenet"
    residual_channels: int = 32
    dilation_channels: int = 32
    skip_channels: int = 256
    end_channels: int = 512
    blocks: int = 4
    layers: int = 2
    diffusion_steps: int = 2
    embedding: int = 10
    dropout: float = 0.3

    @property
    def dilations(self) -> list[int]:
        return [2**layer for layer in range(self.layers)] * self.blocks

    @property
    def receptive_field(self) -> int:
        return 1 + (KERNEL - 1) * sum(self.dilations)

    def backbone(self) -> "GraphWaveNet":
        return GraphWaveNet(self)


@BACKBONES.register("graph_wavenet")
class GraphWaveNetConfig(BackboneConfig):
    """``d``: residual channels, the authors' 32 where absent; all other widths in proportion."""

    Spec = GraphWaveNetSpec
    batch_normalisation = True
    kind: Literal["graph_wavenet"] = "graph_wavenet"
    d: int | None = Field(None, ge=1)

    def options(self) -> dict[str, object]:
        d = self.d or GraphWaveNetSpec.model_fields["residual_channels"].default
        return {"residual_channels": d, "dilation_channels": d, "skip_channels": 8 * d, "end_channels": 16 * d}


class GraphWaveNet(NodeBackbone):
    """Without ``nodes`` no adjacency is learnt, without ``graph`` none is given; InputError without both."""

    time_of_day = True
    spec: GraphWaveNetSpec

    def __init__(self, spec: GraphWaveNetSpec) -> None:
        super().__init__(spec)
        supports = 2 * (spec.graph is not None) + (spec.nodes is not None)
        if not supports:
            raise InputError("graph_wavenet has neither a graph nor nodes to learn one of; give one of them")
        self.source = self.target = None
        if spec.nodes is not None:
            self.source = nn.Parameter(torch.randn(spec.nodes, spec.embedding))
            self.target = nn.Parameter(torch.randn(spec.nodes, spec.embedding))
        self.start = nn.Linear(2, spec.residual_channels)
        last = len(spec.dilations) - 1
        self.layers = nn.ModuleList(
            _Layer(spec, dilation, 0 if number == last else supports) for number, dilation in enumerate(spec.dilations)
        )
        self.end = nn.Sequential(
            nn.ReLU(),
            nn.Linear(spec.skip_channels, spec.end_channels),
            nn.ReLU(),
            nn.Linear(spec.end_channels, spec.horizon),
        )

    def adaptive(self) -> Float[Tensor, "N N"]:
        """Eq. 5: SoftMax(ReLU(E₁E₂ᵀ))."""
        assert self.source is not None and self.target is not None
        return (self.source @ self.target.T).relu().softmax(1)

    def forward(self, features: Tensor, slot: Tensor, weekday: Tensor, graph: Tensor | None) -> Tensor:
        # P_f and P_b: a walk along the edges and one against them.
        supports = [] if graph is None else [transition(graph), transition(graph.T.coalesce())]
        if self.source is not None:
            supports.append(self.adaptive())
        field = self.spec.receptive_field
        x = features[:, -field:].permute(2, 0, 1, 3)
        x = self.start(F.pad(x, (0, 0, field - x.shape[2], 0)))
        skip: Tensor | float = 0.0
        for layer in self.layers:
            x, from_layer = layer(x, supports)
            skip = skip + from_layer
        return self.end(skip).transpose(0, 1)


class _Layer(nn.Module):
    """A spatial-temporal layer; with no ``supports`` the last, whose gated convolution alone is read."""

    def __init__(self, spec: GraphWaveNetSpec, dilation: int, supports: int) -> None:
        super().__init__()
        self.gated = GatedConvolution(spec.residual_channels, spec.dilation_channels, dilation)
        self.skip = nn.Linear(spec.dilation_channels, spec.skip_channels)
        self.diffusion = None
        if supports:
            self.diffusion = DiffusionConvolution(
                spec.dilation_channels, spec.residual_channels, supports, spec.diffusion_steps
            )
            self.dropout, self.norm = nn.Dropout(spec.dropout), nn.BatchNorm1d(spec.residual_channels)

    def forward(
        self, x: Float[Tensor, "N B T C"], supports: list[Tensor]
    ) -> tuple[Float[Tensor, "N B t C"], Float[Tensor, "N B skip"]]:
        h = self.gated(x)
        skip = self.skip(h[:, :, -1])
        if self.diffusion is not None:
            h = self.dropout(self.diffusion(h, supports)) + x[:, :, -h.shape[2] :]
            h = self.norm(h.flatten(0, 2)).view(h.shape)
        return h, skip


class GatedConvolution(nn.Module):
    """Eq. 8–9: tanh(Θ₁ ⋆ X + b) ⊙ σ(Θ₂ ⋆ X + c), both convolutions in one product."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.convolution = TemporalConvolution(inputs, 2 * outputs, KERNEL, dilation)

    def forward(self, x: Float[Tensor, "N B T C"]) -> Float[Tensor, "N B t D"]:
        filtered, gate = self.convolution(x).chunk(2, -1)
        return filtered.tanh() * gate.sigmoid()


class DiffusionConvolution(nn.Module):
    """Eq. 6 (4 and 7 with fewer supports): Σₖ PᵏXWₖ over the supports P and k = 1 … K, and XW₀; with a bias."""

    def __init__(self, inputs: int, outputs: int, supports: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.linear = nn.Linear((supports * steps + 1) * inputs, outputs)

    def forward(self, x: Float[Tensor, "N B T C"], supports: list[Float[Tensor, "N N"]]) -> Float[Tensor, "N B T D"]:
        terms = [x]
        for support in supports:
            walked = x
            for _ in range(self.steps):
                walked = propagate(support, walked)
                terms.append(walked)
        return self.linear(torch.cat(terms, -1))
