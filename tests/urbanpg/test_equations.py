"""Each equation of UrbanPG by hand, and the folded model against the plain one over all ablations."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stdist.urbanpg import BackboneSpec, PromptSpec
from stdist.urbanpg.models import UrbanPGModelConfig
from stdist.urbanpg.plain import equation_6, equation_7, plain_forecasts
from stdist.urbanpg.prompts import INITIAL_STD


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("normalizer", ["none", "sum"])
@pytest.mark.parametrize("stca", [True, False])
@pytest.mark.parametrize("temporal", [True, False])
@pytest.mark.parametrize("spatial", [True, False])
def test_the_folded_form_is_the_plain_one(model, batch, normalizer, stca, temporal, spatial, residual):
    """Values and gradients, in training with Eq. 4 and in evaluation."""
    folded = model(
        backbone={"stca": stca, "stca_normalizer": normalizer, "residual": residual},
        prompts={"temporal": temporal, "spatial": spatial, "p": 0.5},
    )
    inputs = batch()
    inputs[0][1, 2, 5] = torch.nan
    for noise_seed in (3, None):
        folded.train(noise_seed is not None)
        value = folded(*inputs, noise_seed=noise_seed)
        expected = plain_forecasts(folded.backbone, folded.prompts, *inputs, noise_seed)
        assert value.shape == (3, 4, 30)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-3)
        parameters = [p for name, p in folded.named_parameters() if noise_seed or "shared" not in name]
        weights = torch.randn_like(value)
        for mine, plain in zip(
            torch.autograd.grad((value * weights).sum(), parameters),
            torch.autograd.grad((expected * weights).sum(), parameters),
            strict=True,
        ):
            assert (mine - plain).norm() <= 2e-5 * plain.norm()


def test_equation_6_by_hand():
    """Two nodes, d 2; softmax of (0, ln 3) is (1/4, 3/4)."""
    quarters, halves = torch.tensor([0.0, 1.0986123]), torch.zeros(2)
    Q, K = torch.stack([quarters, halves])[None], torch.stack([halves, quarters])[None]
    V, P_t, P_s = torch.tensor([[[1.0], [10.0]]]), quarters.view(1, 1, 2), torch.stack([quarters, halves])
    # φ(K): (1/2, 1/2), (1/4, 3/4); with P_t (3/4, 5/4), (1/2, 3/2); with P_s (1, 2), (1, 2).
    torch.testing.assert_close(equation_6(Q, K, V, None, None), torch.tensor([[[0.5 + 6.25], [0.5 + 5.0]]]))
    torch.testing.assert_close(equation_6(Q, K, V, P_t, P_s), torch.tensor([[[1.75 * 11], [1.5 * 11]]]))
    torch.testing.assert_close(equation_6(Q, K, V, P_t, P_s, "sum"), torch.full((1, 2, 1), 5.5))


def test_equation_7_by_hand():
    H, P_t, P_s = torch.tensor([[[3.0]]]), torch.tensor([[[2.0]]]), torch.tensor([[5.0]])
    assert equation_7(H, P_t, P_s).item() == (3 * (1 + 2) + 5) * 2
    assert (equation_7(H, None, P_s).item(), equation_7(H, P_t, None).item(), equation_7(H, None, None).item()) == (
        3 + 5,
        3 * (1 + 2) * 2,
        3,
    )


def test_the_papers_and_our_own_numbers():
    """Eq. 4's p and q; the spread of untrained embeddings and of noise, which the paper leaves open."""
    spec, config = PromptSpec(scenario="a", periods=(1,), cadence=60), UrbanPGModelConfig()
    assert (spec.p, spec.q, config.p, config.q, INITIAL_STD) == (0.1, 0.5, 0.1, 0.5, 0.02)
    assert (spec.d, BackboneSpec(history=1, horizon=1).d) == (256, 256)


def test_equation_3_has_one_row_per_sample(model):
    prompts = model().prompts
    row = prompts.temporal(torch.tensor([23, 0]), torch.tensor([6, 2]))
    assert torch.equal(row[0], prompts.time_of_day[23] + prompts.day_of_week[6])
    assert torch.equal(row[1], prompts.time_of_day[0] + prompts.day_of_week[2])


def test_equation_4_replaces_as_often_as_p_and_q_say(model):
    prompts = model(40_000, prompts={"p": 0.1, "q": 0.25}).prompts
    rows = prompts.node_embeddings()
    perturbed = prompts.perturb(rows, 0, noise_seed=1).detach()
    shared = (perturbed == prompts.shared).all(1)
    kept = (perturbed == rows).all(1)
    assert shared.float().mean() == pytest.approx(0.025, abs=0.004)
    assert (~shared & ~kept).float().mean() == pytest.approx(0.075, abs=0.006)
    noise = perturbed[~shared & ~kept]
    assert noise.mean() == pytest.approx(0, abs=0.001)
    assert noise.std() == pytest.approx(0.02, rel=0.02)
    assert len(noise.unique(dim=0)) == len(noise), "noise is drawn per node"
    assert not torch.equal(perturbed, prompts.perturb(rows, 0, noise_seed=2)), "and per step"


def test_equation_4_trains_the_shared_row_and_the_rows_that_stay(model):
    prompts = model(20_000, prompts={"p": 0.5}).prompts
    rows = prompts.node_embeddings()
    perturbed = prompts.perturb(rows, 0, noise_seed=1)
    shared, kept = (perturbed == prompts.shared).all(1), (perturbed == rows).all(1)
    perturbed.sum().backward()
    assert torch.equal(prompts.shared.grad, torch.full((8,), float(shared.sum())))
    assert torch.equal(prompts.node_rows[0].grad, kept[:, None].expand(-1, 8).float())


def test_a_part_of_the_city_draws_what_the_city_draws(model):
    prompts = model(40_000).prompts
    whole = prompts.perturb(prompts.node_embeddings(), 0, noise_seed=9)
    for start, stop in [(0, 5), (16_380, 16_390), (100, 39_999)]:
        part = prompts.part(start, stop)
        assert torch.equal(part.perturb(part.node_embeddings(), 0, noise_seed=9), whole[start:stop])
    assert torch.equal(prompts.perturb(prompts.node_embeddings()[20_000:], 20_000, noise_seed=9), whole[20_000:])


def test_evaluation_and_p_0_have_no_perturbation(model, batch):
    perturbed = model(prompts={"p": 0.9})
    training = perturbed(*batch())
    assert not torch.equal(training, perturbed(*batch())), "training draws anew at every step"
    assert torch.equal(perturbed(*batch(), noise_seed=4), perturbed(*batch(), noise_seed=4))
    perturbed.eval()
    assert torch.equal(perturbed(*batch()), perturbed(*batch(), noise_seed=4))
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
