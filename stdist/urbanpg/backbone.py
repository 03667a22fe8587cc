"""UrbanPG's backbone, folded for speed: it computes Eq. 5–7 as :mod:`stdist.urbanpg.plain` has them in print.

D is 1: one channel of a store. Nodes meet in Eq. 6 alone, in sums. ``Backbone.attention_sums`` are one set of nodes'
part of them, ``Backbone.node_maps`` are matrices made of all nodes', and ``Backbone.node_forecasts`` multiplies each
node with these, so that nodes may lie on several learners (:mod:`stdist.urbanpg.node_parallel`) or pass in blocks
(:mod:`stdist.urbanpg.blocks`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from stdist.errors import InputError
from stdist.nodes.folders import load_module, save_module


class BackboneSpec(BaseModel):
    """S (``history``) and K (``horizon``) in frames; ``stca`` False is the ablation without attention.

    ``stca_normalizer``: Eq. 6 as printed has none, so its scale grows with N; ``sum`` divides by the sum of a query's
    weights over all nodes, which makes them a mean. ``residual`` False is Eq. 5–7 as printed: what Eq. 7 makes of H_st
    takes the place of H and is not added to it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: Literal["urbanpg_backbone"] = "urbanpg_backbone"
    history: int
    horizon: int
    d: int = 256
    stca: bool = True
    stca_normalizer: Literal["none", "sum"] = "none"
    residual: bool = True


Term = tuple[Float[Tensor, "b n r"], Float[Tensor, "b r m"]]
"""Features of nodes and the map that they are multiplied with; a dimension b of 1 serves all samples."""


def sum_of_products(terms: Sequence[Term]) -> Float[Tensor, "B n m"]:
    """Σ features · map, each product added into the one result."""
    (B,) = torch.broadcast_shapes(*(factor.shape[:1] for term in terms for factor in term))
    first, *others = ([factor.expand(B, -1, -1) for factor in term] for term in terms)
    total = torch.bmm(*first)
    for term in others:
        total = total.baddbmm_(*term)
    return total


def hidden_layer(terms: Sequence[Term]) -> Float[Tensor, "B n d"]:
    """The MLP's hidden layer of nodes that come to it in terms, ReLU(Σ features · map)."""
    return sum_of_products(terms).relu_()


HiddenLayer = Callable[[Sequence[Term]], Tensor]
"""Computes :func:`hidden_layer`, perhaps with less memory."""


class QKVMaps(NamedTuple):
    """Eq. 5 and the embedding before it: from X̃, which is x and a one, to φ's arguments Q and K, and to V."""

    query: Float[Tensor, "S+1 d"]
    key: Float[Tensor, "S+1 d"]
    value: Float[Tensor, "S+1 d"]


class NodeMaps(NamedTuple):
    """Matrices that nodes are multiplied with, the same for all nodes of a sample.

    ``query``, ``context``: of x to φ's argument Q, and of φ(Q) to what a node attends to; None without STCA. To their
    hidden layer go that, P_s and x; to their forecast that layer, P_s and x.
    """

    query: Float[Tensor, "S+1 d"] | None
    context: Float[Tensor, "B d S+1"] | None
    to_hidden: list[Float[Tensor, "b r d"]]
    to_output: list[Float[Tensor, "b r K"]]


class Backbone(nn.Module):
    """Linear [S -> d], STCA, MLP, linear [d -> K], on z-scores. No weight depends on nodes or on the calendar."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        if min(spec.history, spec.horizon, spec.d) < 1:
            raise InputError(f"S {spec.history}, K {spec.horizon}, d {spec.d} of a backbone: give at least 1 of each")
        self.spec, d = spec, spec.d
        self.embed = nn.Linear(spec.history, d)
        if spec.stca:
            self.qkv = nn.Linear(d, 3 * d)
        self.mlp_in, self.mlp_out = nn.Linear(d, d), nn.Linear(d, d)
        self.output = nn.Linear(d, spec.horizon)

    def qkv_maps(self) -> QKVMaps:
        return QKVMaps(*_with_bias(*_in_one(self.embed, self.qkv)).chunk(3, 1))

    def attention_sums(
        self, x: Float[Tensor, "B n S"], spatial: Float[Tensor, "n d"] | None, qkv: QKVMaps
    ) -> Float[Tensor, "B d+1 S+1"]:
        """Returns these nodes' part of Eq. 6's sums. Rows 0…d-1: (φ(K) + φ(P_s))ᵀX̃, row d: ΣX̃; X̃ is x and a one.

        V is linear in X̃, V = X̃U with U = ``qkv.value``, and so is φ(·)ᵀV = φ(·)ᵀX̃U: no row of V is ever made, and the
        sums have S + 1 columns and not d.
        """
        x = _with_one(x)
        keys = (x @ qkv.key).softmax(-1)
        if spatial is not None:
            keys = keys + spatial.softmax(-1)
        # keysᵀX̃ as (X̃ᵀkeys)ᵀ: the long rows last, which BLAS does in less than half the time.
        return torch.cat([(x.mT @ keys).mT, x.sum(1, keepdim=True)], 1)

    def node_maps(
        self,
        sums: Float[Tensor, "B d+1 S+1"] | None,
        temporal: Float[Tensor, "B d"] | None,
        qkv: QKVMaps | None,
    ) -> NodeMaps:
        """Returns the maps that all nodes share, from the whole city's ``sums`` and P_t; both absent without STCA.

        With C = (φ(K) + φ(P_t) + φ(P_s))ᵀX̃, H_st = φ(Q)CU, where every row of φ(Q)C has S + 1 elements. Before and
        behind the MLP all is linear in φ(Q)C, P_s and x, and P_t has one row. With H = xE and the gate
        g = (1 + P_t) ∘ P_t of Eq. 7, Z = H + H_st ∘ g + P_s ∘ P_t (H with ``residual`` only) and
        Ŷ = ((ReLU(ZW₁ + b₁)W₂ + b₂) ∘ g + P_s ∘ P_t)W₃ + b₃. So a node needs its products with U diag(g)W₁, diag(P_t)W₁
        and EW₁, then with W₂ diag(g)W₃ and diag(P_t)W₃, and no other row of d. Without P_t these diagonals are ones,
        without STCA H_st is H: x and E are in the place of φ(Q)C and U.
        """
        of_input = _with_bias(self.embed.weight, self.embed.bias)
        query, context, values = None, None, of_input
        if sums is not None and qkv is not None:
            query, context, values = qkv.query, sums[:, :-1], qkv.value
            if temporal is not None:
                # Every node has the same P_t: φ(P_t)ᵀX̃ is one outer product, φ(P_t) ⊗ ΣX̃.
                context = context + temporal.softmax(-1)[:, :, None] * sums[:, -1:]
        shift = gate = of_input.new_ones(1, self.spec.d)
        if temporal is not None:
            shift, gate = temporal, (1 + temporal) * temporal
        W1, W2, W3 = self.mlp_in.weight.T, self.mlp_out.weight.T, self.output.weight.T
        of_one = self.mlp_in.bias[None], F.linear(gate * self.mlp_out.bias, self.output.weight, self.output.bias)
        of_x = [F.pad(bias[:, None], (0, 0, self.spec.history, 0)) for bias in of_one]
        if self.spec.residual:
            of_x[0] = of_x[0] + of_input @ W1
        gate, shift = gate[:, :, None], shift[:, :, None]
        return NodeMaps(
            query,
            context,
            [values @ (gate * W1), shift * W1, of_x[0]],
            [W2 @ (gate * W3), shift * W3, of_x[1]],
        )

    def node_forecasts(
        self,
        x: Float[Tensor, "B n S"],
        maps: NodeMaps,
        spatial: Float[Tensor, "n d"] | None,
        hidden: HiddenLayer = hidden_layer,
    ) -> Float[Tensor, "B n K"]:
        """Forecasts of these nodes."""
        attended = x = _with_one(x)
        if maps.query is not None and maps.context is not None:
            attended = (x @ maps.query).softmax(-1) @ maps.context
            if self.spec.stca_normalizer == "sum":
                # X̃ ends with a one, so what is attended to ends with the sum of the weights.
                attended = attended / attended[..., -1:]

        def with_prompts_and_x(features: Tensor, maps: list[Tensor]) -> list[Term]:
            return [(features, maps[0]), *([] if spatial is None else [(spatial[None], maps[1])]), (x, maps[2])]

        layer = hidden(with_prompts_and_x(attended, maps.to_hidden))
        return sum_of_products(with_prompts_and_x(layer, maps.to_output))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors``."""
        save_module(self, self.spec, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Backbone":
        """Raises InputError where the folder does not hold a backbone."""
        return load_module(cls, BackboneSpec, Path(folder))


def _in_one(first: nn.Linear, second: nn.Linear) -> tuple[Tensor, Tensor]:
    """(weight, bias) of the one linear map that two make, nothing being between them: fewer products per node, and
    nothing of what lies between is kept."""
    return second.weight @ first.weight, F.linear(first.bias, second.weight, second.bias)


def _with_one(x: Float[Tensor, "B n S"]) -> Float[Tensor, "B n S+1"]:
    """So that a bias is a row of its map: its gradient then costs no pass over the nodes."""
    return F.pad(x, (0, 1), value=1.0)


def _with_bias(weight: Float[Tensor, "d S"], bias: Float[Tensor, " d"]) -> Float[Tensor, "S+1 d"]:
    return torch.cat([weight, bias[:, None]], 1).T
