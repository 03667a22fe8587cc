"""UrbanPG (Liu and Zhang, "UrbanPG: An Efficient Framework with Personalized Context and General Backbone Interaction
for Urban Spatio-Temporal Learning"): a backbone that knows no city (Eq. 5–7) and prompts that know one.

The learning paradigms are ways of putting the two together:

* from scratch: ``UrbanPG(Backbone(spec), Prompts(spec))``;
* fine-tuning (Eq. 8): ``UrbanPG(backbone.requires_grad_(False), Prompts(spec_of_the_new_city))``;
* continual learning (Eq. 9–10): ``UrbanPG(backbone.requires_grad_(False), prompts.expand(new_nodes))``.

D is 1: one channel of a store. Nodes meet in Eq. 6 alone, in sums: ``Backbone.sums`` is what one set of nodes
adds to them, ``Backbone.maps`` what all nodes then share, ``Backbone.outputs`` what that gives each of them, so that
nodes may lie on several ranks (:mod:`stdist.urbanpg.node_parallel`) or pass in blocks (:mod:`stdist.urbanpg.blocks`).

Eq. 7 adjusts what STCA gives and, as the paper's text says, what the MLP gives. Left open by the paper, and taken here:
one block, ReLU in the MLP, no dropout, and a residual around STCA and its Eq. 7, Z = H + H_st^p (without it all of a
node's own history passes through a softmax over features). Without temporal context Eq. 7 is H_st + P_s, without
spatial context H_st (1 + P_t) P_t, without STCA H_st is H.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from stdist.errors import InputError
from stdist.nodes.folders import load_module, save_module
from stdist.urbanpg.prompts import Prompts

BACKBONE, PROMPTS = "backbone", "prompts"


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


Pair = tuple[Float[Tensor, "b n r"], Float[Tensor, "b r m"]]
"""Rows of nodes and the map that they go through; a dimension b of 1 serves all samples."""


def products(pairs: Sequence[Pair]) -> Float[Tensor, "B n m"]:
    """Σ rows · map, each product added into the one result."""
    (B,) = torch.broadcast_shapes(*(each.shape[:1] for pair in pairs for each in pair))
    rows, *others = ([each.expand(B, -1, -1) for each in pair] for pair in pairs)
    total = torch.bmm(*rows)
    for pair in others:
        total = total.baddbmm_(*pair)
    return total


def hidden_layer(pairs: Sequence[Pair]) -> Float[Tensor, "B n d"]:
    """The MLP's hidden layer of nodes that come to it in parts, ReLU(Σ rows · map)."""
    return products(pairs).relu_()


Hidden = Callable[[Sequence[Pair]], Tensor]
"""What computes :func:`hidden_layer`."""


class IntoAttention(NamedTuple):
    """What makes φ's arguments Q and K, and V, of X̃: x and a one."""

    query: Float[Tensor, "S+1 d"]
    key: Float[Tensor, "S+1 d"]
    value: Float[Tensor, "S+1 d"]


class Maps(NamedTuple):
    """What nodes are multiplied with, the same for all nodes of a sample.

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

    def into_attention(self) -> IntoAttention:
        """Eq. 5 and the embedding before it, in one."""
        return IntoAttention(*_with_bias(*_in_one(self.embed, self.qkv)).chunk(3, 1))

    def sums(
        self, x: Float[Tensor, "B n S"], spatial: Float[Tensor, "n d"] | None, into: IntoAttention
    ) -> Float[Tensor, "B d+1 S+1"]:
        """What these nodes add to the sums of Eq. 6. Rows 0…d-1: (φ(K) + φ(P_s))ᵀX̃, row d: ΣX̃, where X̃ is x and a one.

        V is linear in X̃, V = X̃U with U = ``into.value``, and so is φ(·)ᵀV = φ(·)ᵀX̃U: no row of V is ever made, and the
        sums have S + 1 columns and not d.
        """
        x = _with_one(x)
        keys = (x @ into.key).softmax(-1)
        if spatial is not None:
            keys = keys + spatial.softmax(-1)
        # keysᵀX̃ as (X̃ᵀkeys)ᵀ: the long rows last, which BLAS does in less than half the time.
        return torch.cat([(x.mT @ keys).mT, x.sum(1, keepdim=True)], 1)

    def maps(
        self,
        sums: Float[Tensor, "B d+1 S+1"] | None,
        temporal: Float[Tensor, "B d"] | None,
        into: IntoAttention | None,
    ) -> Maps:
        """From the ``sums`` over all nodes of the city and P_t; without STCA there are neither sums nor ``into``.

        With C = (φ(K) + φ(P_t) + φ(P_s))ᵀX̃, H_st = φ(Q)CU, where every row of φ(Q)C has S + 1 elements. Before and
        behind the MLP all is linear in φ(Q)C, P_s and x, and P_t has one row. With H = xE and the gate
        g = (1 + P_t) ∘ P_t of Eq. 7, Z = H + H_st ∘ g + P_s ∘ P_t (H with ``residual`` only) and
        Ŷ = ((ReLU(ZW₁ + b₁)W₂ + b₂) ∘ g + P_s ∘ P_t)W₃ + b₃. So a node needs its products with U diag(g)W₁, diag(P_t)W₁
        and EW₁, then with W₂ diag(g)W₃ and diag(P_t)W₃, and no other row of d. Without P_t these diagonals are ones,
        without STCA H_st is H: x and E are in the place of φ(Q)C and U.
        """
        of_input = _with_bias(self.embed.weight, self.embed.bias)
        query, context, values = None, None, of_input
        if sums is not None and into is not None:
            query, context, values = into.query, sums[:, :-1], into.value
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
        return Maps(
            query,
            context,
            [values @ (gate * W1), shift * W1, of_x[0]],
            [W2 @ (gate * W3), shift * W3, of_x[1]],
        )

    def outputs(
        self,
        x: Float[Tensor, "B n S"],
        maps: Maps,
        spatial: Float[Tensor, "n d"] | None,
        hidden: Hidden = hidden_layer,
    ) -> Float[Tensor, "B n K"]:
        """Forecasts of these nodes."""
        attended = x = _with_one(x)
        if maps.query is not None and maps.context is not None:
            attended = (x @ maps.query).softmax(-1) @ maps.context
            if self.spec.stca_normalizer == "sum":
                # X̃ ends with a one, so what is attended to ends with the sum of the weights.
                attended = attended / attended[..., -1:]

        def with_prompts_and_x(rows: Tensor, maps: list[Tensor]) -> list[Pair]:
            return [(rows, maps[0]), *([] if spatial is None else [(spatial[None], maps[1])]), (x, maps[2])]

        rows = hidden(with_prompts_and_x(attended, maps.to_hidden))
        return products(with_prompts_and_x(rows, maps.to_output))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors``."""
        save_module(self, self.spec, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Backbone":
        """Raises InputError where the folder does not hold a backbone."""
        return load_module(cls, BackboneSpec, Path(folder))


class UrbanPG(nn.Module):
    """A backbone with the prompts of one scenario, neither of them copied. Raises InputError where their d differ.

    Saved as ``backbone/`` and ``prompts/SCENARIO/``, so that many scenarios share one backbone.
    """

    def __init__(self, backbone: Backbone, prompts: Prompts) -> None:
        super().__init__()
        if backbone.spec.d != prompts.spec.d:
            raise InputError(
                f"the backbone has d {backbone.spec.d}, prompts {prompts.spec.scenario!r} have {prompts.spec.d}; "
                "make prompts of the backbone's d"
            )
        self.backbone, self.prompts = backbone, prompts
        self.total_nodes = prompts.spec.nodes

    def forward(
        self,
        history: Float[Tensor, "B S N"],
        slot: Int64[Tensor, "B"],
        weekday: Int64[Tensor, "B"],
        *,
        draw: int | None = None,
    ) -> Float[Tensor, "B K N"]:
        """Forecasts in the data's units from history in the data's units, NaN where it is missing.

        ``slot``, ``weekday``: of the last history frame (:meth:`Prompts.calendar`). ``draw`` numbers the random
        perturbation in training mode; by default it comes from torch's CPU generator. Raises InputError where the
        input does not fit backbone and prompts, or a node has no value at all.
        """
        self.check(history, slot, weekday)
        x, temporal = self.prompts.normalise(history), self.prompts.temporal(slot, weekday)
        spatial = self.prompts.rows()
        if spatial is not None:
            spatial = self.prompts.perturb(spatial, 0, self.draw(draw))
        into = self.backbone.into_attention() if self.backbone.spec.stca else None
        sums = None if into is None else self.meet(self.backbone.sums(x, spatial, into))
        maps = self.backbone.maps(sums, temporal, into)
        return self.prompts.restore(self.backbone.outputs(x, maps, spatial))

    def meet(self, sums: Float[Tensor, "B d+1 S+1"]) -> Float[Tensor, "B d+1 S+1"]:
        """The sums over all nodes from those over the nodes that are here: here, all are."""
        return sums

    def draw(self, draw: int | None) -> int | None:
        """The number of this step's perturbation (Eq. 4); None in evaluation mode: there is none."""
        if not self.training:
            return None
        return int(torch.randint(2**62, ())) if draw is None else draw

    def check(self, history: Tensor, slot: Tensor, weekday: Tensor) -> None:
        """Raises InputError as ``forward`` does; waits for the device once."""
        remedy = "expand them for nodes that joined, or fit new prompts on the frozen backbone"
        frames, nodes = self.backbone.spec.history, self.prompts.spec.nodes
        self.prompts.check_batch(history, slot, weekday, frames, nodes, remedy, self.prompts.first_node)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``backbone/`` and ``prompts/SCENARIO/`` in ``folder``; other scenarios there stay."""
        self.backbone.save_pretrained(Path(folder) / BACKBONE)
        self.prompts.save_pretrained(Path(folder) / PROMPTS / self.prompts.spec.scenario)

    @classmethod
    def from_pretrained(cls, folder: str | Path, scenario: str) -> "UrbanPG":
        """A saved backbone with the prompts of ``scenario``, in evaluation mode. Raises InputError as both do."""
        prompts = Path(folder) / PROMPTS
        if not (prompts / scenario).is_dir():
            found = ", ".join(sorted(p.name for p in prompts.glob("*/"))) or "none"
            raise InputError(f"{folder} has no prompts {scenario!r}; it has: {found}")
        backbone = Backbone.from_pretrained(Path(folder) / BACKBONE)
        return cls(backbone, Prompts.from_pretrained(prompts / scenario)).eval()


def _in_one(first: nn.Linear, second: nn.Linear) -> tuple[Tensor, Tensor]:
    """(weight, bias) of the one linear map that two make, nothing being between them: fewer products per node, and
    nothing of what lies between is kept."""
    return second.weight @ first.weight, F.linear(first.bias, second.weight, second.bias)


def _with_one(x: Float[Tensor, "B n S"]) -> Float[Tensor, "B n S+1"]:
    """So that a bias is a row of its map: its gradient then costs no pass over the nodes."""
    return F.pad(x, (0, 1), value=1.0)


def _with_bias(weight: Float[Tensor, "d S"], bias: Float[Tensor, "d"]) -> Float[Tensor, "S+1 d"]:
    return torch.cat([weight, bias[:, None]], 1).T
