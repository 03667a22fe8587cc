"""Our side of ``urbanpg_scaling.py``: UrbanPG, and UrbanPG with softmax attention in place of the linear one."""

import torch
from _urban_point import MEAN, STD, K, Made, S
from torch import Tensor
from torch.nn import functional as F

from stdist.urbanpg import Backbone, BackboneSpec, ContextPrompts, PromptSpec, UrbanPG

SLOT, WEEKDAY = torch.tensor([5]), torch.tensor([2])


class Quadratic(UrbanPG):
    """softmax(Q(K + P_t + P_s)ᵀ/√d)V in place of Eq. 6, by torch's own kernel; all else is UrbanPG's."""

    def forward(self, history: Tensor, slot: Tensor, weekday: Tensor) -> Tensor:
        backbone, prompts = self.backbone, self.prompts
        H = backbone.embed(prompts.normalise(history))
        q, k, v = backbone.qkv(H).chunk(3, -1)
        P_t = prompts.temporal(slot, weekday)[:, None]
        P_s = prompts.perturb(prompts.node_embeddings(), 0, self.step_seed(None))
        attended = F.scaled_dot_product_attention(q[:, None], (k + P_t + P_s)[:, None], v[:, None])[:, 0]
        Z = H + (attended * (1 + P_t) + P_s) * P_t
        made = backbone.mlp_out(backbone.mlp_in(Z).relu())
        return prompts.restore(backbone.output((made * (1 + P_t) + P_s) * P_t))


def make(model: str, nodes: int, width: int, block_nodes: int | None = None) -> Made:
    """``model``: ``urbanpg`` or ``quadratic``; ``block_nodes``: nodes that pass together, None for all."""
    spec = BackboneSpec(history=S, horizon=K, d=width)
    prompts = ContextPrompts(PromptSpec(scenario="city", periods=(nodes,), cadence=15, d=width), MEAN, STD)
    made = (UrbanPG if model == "urbanpg" else Quadratic)(Backbone(spec), prompts)
    made.block_nodes = block_nodes
    return made, lambda history: made(history, SLOT, WEEKDAY)
