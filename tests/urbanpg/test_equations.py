"""Each equation of UrbanPG's model against what it says, node by node, with no product reordered."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stdist.urbanpg import UrbanPG


def phi(rows: Tensor) -> Tensor:
    return torch.softmax(rows, -1)


def equation_6(Q: Tensor, K: Tensor, V: Tensor, P_t: Tensor | None, P_s: Tensor | None, normalizer: str) -> Tensor:
    """The quadratic form: [N, N] weights of nodes, one sample."""
    weights = phi(Q) @ phi(K).T
    for prompt in (P_t, P_s):
        if prompt is not None:
            weights = weights + phi(Q) @ phi(prompt).T
    return (weights if normalizer == "none" else weights / weights.sum(1, keepdim=True)) @ V


def equation_7(H: Tensor, P_t: Tensor | None, P_s: Tensor | None) -> Tensor:
    if P_t is None:
        return H if P_s is None else H + P_s
    return H * (1 + P_t) * P_t if P_s is None else (H * (1 + P_t) + P_s) * P_t


def reference(model: UrbanPG, history: Tensor, slot: Tensor, weekday: Tensor) -> Tensor:
    """Evaluation mode, sample by sample, every intermediate [N, d]."""
    backbone, prompts, outputs = model.backbone, model.prompts, []
    for sample in range(len(history)):
        X = torch.nan_to_num((history[sample] - prompts.mean) / prompts.std, nan=0.0).T
        N = len(X)
        P_t = P_s = None
        if prompts.spec.temporal:  # Eq. 3
            P_t = torch.stack([prompts.time_of_day[slot[sample]] + prompts.day_of_week[weekday[sample]]] * N)
        if prompts.spec.spatial:
            P_s = torch.cat(list(prompts.node_rows))
        H = H_st = backbone.embed(X)
        if backbone.spec.stca:
            Q, K, V = backbone.qkv(H).chunk(3, -1)  # Eq. 5
            H_st = equation_6(Q, K, V, P_t, P_s, backbone.spec.stca_normalizer)
        Z = equation_7(H_st, P_t, P_s)
        if backbone.spec.residual:
            Z = H + Z
        made = equation_7(backbone.mlp_out(F.relu(backbone.mlp_in(Z))), P_t, P_s)
        outputs.append(backbone.output(made).T * prompts.std + prompts.mean)
    return torch.stack(outputs)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("normalizer", ["none", "sum"])
@pytest.mark.parametrize("stca", [True, False])
@pytest.mark.parametrize("temporal", [True, False])
@pytest.mark.parametrize("spatial", [True, False])
def test_values_and_gradients_are_those_of_equations_3_and_5_to_7(
    model, batch, normalizer, stca, temporal, spatial, residual
):
    ours = model(
        backbone={"stca": stca, "stca_normalizer": normalizer, "residual": residual},
        prompts={"temporal": temporal, "spatial": spatial},
    ).eval()
    inputs = batch()
    inputs[0][1, 2, 5] = torch.nan
    value, expected = ours(*inputs), reference(ours, *inputs)
    assert value.shape == (3, 4, 30)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-3)
    parameters = [p for name, p in ours.named_parameters() if "shared" not in name]  # E_d: training mode only
    weights = torch.randn_like(value)
    for ours_, theirs in zip(
        torch.autograd.grad((value * weights).sum(), parameters),
        torch.autograd.grad((expected * weights).sum(), parameters),
        strict=True,
    ):
        assert (ours_ - theirs).norm() <= 1e-5 * theirs.norm()


def test_equation_3_has_one_row_per_sample(model):
    prompts = model().prompts
    row = prompts.temporal(torch.tensor([23, 0]), torch.tensor([6, 2]))
    assert torch.equal(row[0], prompts.time_of_day[23] + prompts.day_of_week[6])
    assert torch.equal(row[1], prompts.time_of_day[0] + prompts.day_of_week[2])


def test_equation_4_replaces_as_often_as_p_and_q_say(model):
    prompts = model(40_000, prompts={"p": 0.1, "q": 0.25}).prompts
    rows = prompts.rows()
    perturbed = prompts.perturb(rows, 0, draw=1).detach()
    shared = (perturbed == prompts.shared).all(1)
    kept = (perturbed == rows).all(1)
    assert shared.float().mean() == pytest.approx(0.025, abs=0.004)
    assert (~shared & ~kept).float().mean() == pytest.approx(0.075, abs=0.006)
    noise = perturbed[~shared & ~kept]
    assert noise.mean() == pytest.approx(0, abs=0.001)
    assert noise.std() == pytest.approx(0.02, rel=0.02)
    assert len(noise.unique(dim=0)) == len(noise), "noise is drawn per node"
    assert not torch.equal(perturbed, prompts.perturb(rows, 0, draw=2)), "and per step"


def test_equation_4_trains_the_shared_row_and_the_rows_that_stay(model):
    prompts = model(20_000, prompts={"p": 0.5}).prompts
    rows = prompts.rows()
    perturbed = prompts.perturb(rows, 0, draw=1)
    shared, kept = (perturbed == prompts.shared).all(1), (perturbed == rows).all(1)
    perturbed.sum().backward()
    assert torch.equal(prompts.shared.grad, torch.full((8,), float(shared.sum())))
    assert torch.equal(prompts.node_rows[0].grad, kept[:, None].expand(-1, 8).float())


def test_a_part_of_the_city_draws_what_the_city_draws(model):
    prompts = model(40_000).prompts
    whole = prompts.perturb(prompts.rows(), 0, draw=9)
    for start, stop in [(0, 5), (16_380, 16_390), (100, 39_999)]:
        part = prompts.part(start, stop)
        assert torch.equal(part.perturb(part.rows(), 0, draw=9), whole[start:stop])
    assert torch.equal(prompts.perturb(prompts.rows()[20_000:], 20_000, draw=9), whole[20_000:])


def test_evaluation_and_p_0_have_no_perturbation(model, batch):
    perturbed = model(prompts={"p": 0.9})
    training = perturbed(*batch())
    assert not torch.equal(training, perturbed(*batch())), "training draws anew at every step"
    assert torch.equal(perturbed(*batch(), draw=4), perturbed(*batch(), draw=4))
    perturbed.eval()
    assert torch.equal(perturbed(*batch()), perturbed(*batch(), draw=4))
    without = model(prompts={"p": 0.0})
    assert torch.equal(without(*batch()), perturbed(*batch()))


def test_what_nobody_reads_is_kept_and_not_trained(model, tmp_path):
    """E_d without Eq. 4: an optimizer that decays all its parameters would change it."""
    without, with_it = (model(prompts={"p": p}).prompts for p in (0.0, 0.1))
    assert without.state_dict().keys() == with_it.state_dict().keys()
    assert set(dict(with_it.named_parameters())) - set(dict(without.named_parameters())) == {"shared"}
    without.save_pretrained(tmp_path)
    for again in (type(without).from_pretrained(tmp_path), without.part(3, 9), without.expand(2)):
        assert torch.equal(again.shared, without.shared) and "shared" not in dict(again.named_parameters())


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("normalizer", ["none", "sum"])
def test_no_tensor_is_larger_than_nodes_times_d(model, batch, normalizer):
    nodes, samples = 3_000, 2
    ours, inputs = model(nodes, backbone={"stca_normalizer": normalizer}), batch(nodes, samples)
    with Largest() as largest:
        ours(*inputs).sum().backward()
    assert nodes * samples * 8 <= largest.elements < 1.01 * nodes * samples * 8


def test_calendar_of_local_times(model):
    slot, weekday = model().prompts.calendar(np.array(["2019-01-06T23:00", "2019-01-07T00:00"], "datetime64[ns]"))
    assert slot.tolist() == [23, 0]
    assert weekday.tolist() == [6, 0]  # a Sunday, then a Monday
