"""What a configuration's names stand for, and the peer that UrbanPG's scaling is measured against."""

from importlib import import_module
from pathlib import Path

import torch

from stdist.nodes.dataset import open_dataset

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_run_has_stgcn_in_the_authors_sizes(city, make_config, tmp_path):
    """Layer normalisation with weights of each node and channel."""
    config = make_config(city, tmp_path, model={"kind": "stgcn", "d": None}, data={"history": 12})
    for block in config.model.build(open_dataset(config.data), 0).backbone.blocks:
        assert block.scale.shape == block.shift.shape == (9, 1, 1, 64)


def test_the_quadratic_peer_is_urbanpg_with_softmax_attention(model, batch, monkeypatch):
    """softmax(Q(K + P_t + P_s)ᵀ/√d)V node by node, Eq. 7, the residual, the MLP and Eq. 7 again."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    linear, (history, slot, weekday) = model(8).eval(), batch(8)
    quadratic = import_module("_urban_ours").Quadratic(linear.backbone, linear.prompts).eval()
    backbone, prompts, expected = linear.backbone, linear.prompts, []
    for sample in range(3):
        H = backbone.embed(((history[sample] - 100) / 40).T)
        Q, K, V = backbone.qkv(H).chunk(3, 1)
        P_t = prompts.time_of_day[slot[sample]] + prompts.day_of_week[weekday[sample]]
        P_s = prompts.node_rows[0]
        attended = torch.empty(8, 8)
        for node in range(8):
            scores = torch.stack([Q[node] @ (K[other] + P_t + P_s[other]) for other in range(8)]) / 8**0.5
            weights = scores.exp() / scores.exp().sum()
            attended[node] = sum(weight * row for weight, row in zip(weights, V, strict=True))
        Z = H + (attended * (1 + P_t) + P_s) * P_t
        made = backbone.mlp_out(torch.relu(backbone.mlp_in(Z)))
        expected.append(backbone.output((made * (1 + P_t) + P_s) * P_t).T * 40 + 100)
    made = quadratic(history, slot, weekday)
    torch.testing.assert_close(made, torch.stack(expected), rtol=1e-5, atol=1e-3)
    assert (made - linear(history, slot, weekday)).abs().max() > 1, "another attention gives other forecasts"
