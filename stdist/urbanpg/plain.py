"""UrbanPG as the paper prints it, Eq. 3–7 in order: read this first.

Nothing is folded or reordered, and the nodes' weights in Eq. 6 are an [N, N] matrix, so it serves small cities alone.
``UrbanPG`` computes the same numbers in time linear in N (:mod:`stdist.urbanpg.backbone` says how), and tests hold it
against this over all ablations: this module is documentation that runs, and the oracle.

Eq. 7 adjusts what STCA gives and, as the paper's text says, what the MLP gives. Left open by the paper, and taken here:
one block, ReLU in the MLP, no dropout, and a residual around STCA and its Eq. 7, Z = H + H_st^p (without it all of a
node's own history passes through a softmax over features).
"""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from stdist.urbanpg.backbone import Backbone
from stdist.urbanpg.prompts import ContextPrompts


def phi(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """φ, softmax over features."""
    return x.softmax(-1)


def equation_6(
    Q: Float[Tensor, "B N d"],
    K: Float[Tensor, "B N d"],
    V: Float[Tensor, "B N d"],
    P_t: Float[Tensor, "B 1 d"] | None,
    P_s: Float[Tensor, "N d"] | None,
    normalizer: Literal["none", "sum"] = "none",
) -> Float[Tensor, "B N d"]:
    """STCA: H_st = φ(Q)(φ(K) + φ(P_t) + φ(P_s))ᵀV. The paper has no ``normalizer``; ``sum`` makes each node's weights
    a mean over nodes."""
    keys = phi(K)
    for context in (P_t, P_s):
        if context is not None:
            keys = keys + phi(context)
    weights = phi(Q) @ keys.mT
    if normalizer == "sum":
        weights = weights / weights.sum(-1, keepdim=True)
    return weights @ V


def equation_7(
    H: Float[Tensor, "B N d"], P_t: Float[Tensor, "B 1 d"] | None, P_s: Float[Tensor, "N d"] | None
) -> Float[Tensor, "B N d"]:
    """(H ∘ (1 + P_t) + P_s) ∘ P_t; without temporal context H + P_s, without spatial context H ∘ (1 + P_t) ∘ P_t."""
    if P_t is not None:
        H = H * (1 + P_t)
    if P_s is not None:
        H = H + P_s
    return H if P_t is None else H * P_t


def plain_forecasts(
    backbone: Backbone,
    prompts: ContextPrompts,
    history: Float[Tensor, "B S N"],
    slot: Int64[Tensor, " B"],
    weekday: Int64[Tensor, " B"],
    noise_seed: int | None = None,
) -> Float[Tensor, "B K N"]:
    """Forecasts in the data's units, as ``UrbanPG(backbone, prompts)`` gives them; ``noise_seed`` as in training."""
    spec = backbone.spec
    X = torch.nan_to_num((history - prompts.mean) / prompts.std, nan=0.0).mT
    P_t = P_s = None
    if prompts.spec.temporal:  # Eq. 3, the same for all nodes of a sample
        P_t = (prompts.time_of_day[slot] + prompts.day_of_week[weekday])[:, None]
    if prompts.spec.spatial:  # Eq. 4
        P_s = prompts.perturb(torch.cat(list(prompts.node_rows)), 0, noise_seed)
    H = H_st = backbone.embed(X)
    if spec.stca:
        Q, K, V = backbone.qkv(H).chunk(3, -1)  # Eq. 5
        H_st = equation_6(Q, K, V, P_t, P_s, spec.stca_normalizer)
    Z = equation_7(H_st, P_t, P_s)
    if spec.residual:
        Z = H + Z
    mlp = backbone.mlp_out(backbone.mlp_in(Z).relu())
    forecasts = backbone.output(equation_7(mlp, P_t, P_s))
    return forecasts.mT * prompts.std + prompts.mean
