"""STID (Shao et al., "Spatial-Temporal Identity: A Simple yet Effective Baseline for Multivariate Time Series
Forecasting", CIKM 2022, arXiv 2208.05233): an MLP that is told who and when each series is.

Of the authors' three input channels the value alone is embedded: the calendar has embeddings anyway.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stdist.nodes.forecaster import BackboneConfig, ForecasterSpec, NodeBackbone
from stdist.nodes.kinds import BACKBONES


class STIDSpec(ForecasterSpec):
    """``d``: width of each of the four embeddings. Defaults are the authors'."""

    uses_graph = False
    model_type: Literal["stid"] = "stid"
    d: int = 32
    layers: int = 3
    dropout: float = 0.15

    def backbone(self) -> "STID":
        return STID(self)


@BACKBONES.register("stid")
class STIDConfig(BackboneConfig):
    """``d``: width of each of the four embeddings, the authors' 32 where absent; hidden layers are four times as
    wide."""

    Spec = STIDSpec
    kind: Literal["stid"] = "stid"
    d: int | None = Field(None, ge=1)


class STID(NodeBackbone):
    """Without ``nodes`` there is no E: a node's identity is left out of Eq. 2."""

    def __init__(self, spec: STIDSpec) -> None:
        super().__init__(spec)
        self.series = nn.Linear(spec.history, spec.d)
        self.time_of_day_rows, self.day_of_week_rows = _rows(spec.slots, spec.d), _rows(7, spec.d)
        self.node_rows = None if spec.nodes is None else _rows(spec.nodes, spec.d)
        width = (3 + (spec.nodes is not None)) * spec.d
        self.encoder = nn.Sequential(*(_ResidualMLP(width, spec.dropout) for _ in range(spec.layers)))
        self.regression = nn.Linear(width, spec.horizon)

    def forward(self, features: Tensor, slot: Tensor, weekday: Tensor, graph: Tensor | None = None) -> Tensor:
        """Eq. 1 (H), 2 (Z = H ∥ E ∥ T_TiD ∥ T_DiW), 3 (the encoder) and the regression layer."""
        H = self.series(features[..., 0].transpose(1, 2))
        known: list[Tensor] = [] if self.node_rows is None else [self.node_rows]
        known += [self.time_of_day_rows[slot][:, None], self.day_of_week_rows[weekday][:, None]]
        Z = torch.cat([H, *(rows.expand_as(H) for rows in known)], -1)
        return self.regression(self.encoder(Z))


class _ResidualMLP(nn.Module):
    """Eq. 3: FC₂(σ(FC₁(Z))) + Z."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width))

    def forward(self, Z: Tensor) -> Tensor:
        return self.layers(Z) + Z


def _rows(count: int, d: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(count, d)))
