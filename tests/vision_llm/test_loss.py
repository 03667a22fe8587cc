"""GRPO's objective, its variants by hand, and each of them as TRL computes it on the same tensors."""

import math
from collections import defaultdict
from dataclasses import fields, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from stdist.vision_llm.config import GRPOConfig
from stdist.vision_llm.stages.loss import LOSSES, LossInputs, grpo, kl

PER_CANDIDATE = {field.name for field in fields(LossInputs)} - {"tokens", "sequences", "max_tokens"}


def inputs_of(
    ratio: list[list[float]], advantages: list[float], mask: list[list[bool]] | None = None, **changes: object
) -> LossInputs:
    """At given π/π_old, the reference equal to the policy; a step of these candidates alone."""
    log_probs = torch.tensor(ratio).log() - 1.0
    written = torch.ones_like(log_probs, dtype=torch.bool) if mask is None else torch.tensor(mask)
    inputs = LossInputs(
        trainer_log_probs=log_probs,
        rollout_log_probs=torch.full_like(log_probs, -1.0),
        reference_log_probs=log_probs,
        advantages=torch.tensor(advantages),
        mask=written,
        tokens=int(written.sum()),
        sequences=len(advantages),
        max_tokens=5,
    )
    return replace(inputs, **changes)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "low", "high"),
    [
        (1.1, 2.0, 2.2, 0, 0),
        (1.5, 2.0, 2.4, 0, 1),  # raised enough: the gain ends at 1 + ε
        (0.5, 2.0, 1.0, 0, 0),  # good but less likely than before: pulled back in full
        (0.9, -2.0, -1.8, 0, 0),
        (0.5, -2.0, -1.6, 1, 0),  # lowered enough: ends at 1 − ε
        (1.5, -2.0, -3.0, 0, 0),  # bad and more likely than before: pushed down in full
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, objective: float, low: int, high: int) -> None:
    loss, details = grpo(inputs_of([[ratio]], [advantage]), GRPOConfig(beta=0.0))
    assert loss.item() == pytest.approx(-objective, rel=1e-6)
    assert details == {"kl": 0, "clip_ratio/low": low, "clip_ratio/high": high, "clip_ratio": low + high}
    wider = GRPOConfig(beta=0.0, epsilon_high=0.6)
    assert grpo(inputs_of([[ratio]], [advantage]), wider)[1]["clip_ratio"] == low


@pytest.mark.parametrize(("ratio", "advantage"), [(0.5, -1.0), (2.0, 1.0)])
def test_a_ratio_on_the_edge_of_the_clip_is_not_counted_as_clipped(ratio: float, advantage: float) -> None:
    """Exact powers of two, so that no rounding decides: the clip leaves such a ratio as it is."""
    log_ratio = torch.tensor([[ratio]]).log()
    inputs = inputs_of(
        [[ratio]], [advantage], trainer_log_probs=log_ratio, rollout_log_probs=torch.zeros_like(log_ratio)
    )
    assert log_ratio.exp().item() == ratio, "the edge itself"
    loss, details = grpo(inputs, GRPOConfig(beta=0.0, epsilon=0.5, epsilon_high=1.0))
    assert loss.item() == -ratio * advantage
    assert details["clip_ratio/low"] == details["clip_ratio/high"] == details["clip_ratio"] == 0


# Two candidates of two tokens and of one: objectives 1.0 and 1.1, 2.4 (clipped) per token.
RATIO, ADVANTAGES, MASK = [[1.0, 1.1, 7.0], [1.5, 9.0, 9.0]], [1.0, 2.0], [[True, True, False], [True, False, False]]


@pytest.mark.parametrize(
    ("loss_type", "expected", "clipped"),
    [
        ("grpo", -((1.0 + 1.1) / 2 + 2.4) / 2, 1 / 3),
        ("dr_grpo", -(1.0 + 1.1 + 2.4) / (2 * 5), 1 / 3),
        ("dapo", -(1.0 + 1.1 + 2.4) / 3, 1 / 3),
        ("gspo", -(math.sqrt(1.0 * 1.1) * 1.0 + 2.4) / 2, 1 / 2),
    ],
)
def test_what_each_variant_averages_over_by_hand(loss_type: str, expected: float, clipped: float) -> None:
    """What is masked counts nowhere; GSPO has one ratio a candidate, and counts clipped candidates."""
    loss, details = LOSSES[loss_type](inputs_of(RATIO, ADVANTAGES, MASK), GRPOConfig(beta=0.0))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert details["clip_ratio"] == details["clip_ratio/high"] == pytest.approx(clipped)


def random_inputs(candidates: int = 30, tokens: int = 5, stale: bool = False) -> LossInputs:
    """Lengths from 1 to all tokens; ratios on both sides of the clip, a reference elsewhere. ``stale``: other weights
    wrote the candidates than began to learn from them."""
    generator = torch.Generator().manual_seed(3)
    old = torch.randn(candidates, tokens, generator=torch.Generator().manual_seed(4)) * 0.6 - 2
    trainer, rollout, reference = torch.randn(3, candidates, tokens, generator=generator) * 0.6 - 2
    mask = torch.arange(tokens) <= torch.arange(candidates)[:, None] % tokens
    return LossInputs(
        trainer_log_probs=trainer.requires_grad_(),
        rollout_log_probs=rollout,
        reference_log_probs=reference,
        advantages=torch.randn(candidates, generator=generator),
        mask=mask,
        tokens=int(mask.sum()),
        sequences=candidates,
        max_tokens=tokens + 2,
        old_log_probs=old if stale else None,
    )


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_parts_add_up_however_a_step_is_cut(loss_type: str, stale: bool) -> None:
    """Micro-batches and learners: the counts are the whole step's, so any cut gives one loss and one gradient."""
    inputs, config = random_inputs(stale=stale), GRPOConfig(beta=0.1)
    per_candidate = PER_CANDIDATE - (set() if stale else {"old_log_probs"})
    loss, details = LOSSES[loss_type](inputs, config)
    (gradient,) = torch.autograd.grad(loss, inputs.trainer_log_probs)
    for cut in ([15, 15], [1, 12, 17], [1] * 30):
        edges = torch.tensor([0, *cut]).cumsum(0).tolist()
        parts = [
            LOSSES[loss_type](replace(inputs, **{n: getattr(inputs, n)[a:b] for n in per_candidate}), config)
            for a, b in pairwise(edges)
        ]
        total = torch.stack([part for part, _ in parts]).sum()
        assert total.item() == pytest.approx(loss.item(), rel=1e-5)
        (of_parts,) = torch.autograd.grad(total, inputs.trainer_log_probs)
        assert torch.allclose(of_parts, gradient, rtol=1e-5, atol=1e-8)
        for name, value in details.items():
            assert sum(part[name] for _, part in parts) == pytest.approx(value, rel=1e-5), name


def test_truncated_importance_weights_by_hand() -> None:
    """Written at π_rollout = e^-1, learnt from at π_old: weights e^0.5, the cap of 3 and e^-0.7; the ratio is to
    π_old, and the KL term is not weighted. What is masked counts nowhere."""
    old = torch.tensor([[-0.5, 2.0, -1.7, 9.0]])
    inputs = inputs_of([[1.0, 1.0, 1.0, 1.0]], [2.0], [[True, True, True, False]])
    trainer = old + torch.tensor([[0.1, 0.0, -0.1, 0.0]])
    inputs = replace(inputs, trainer_log_probs=trainer, old_log_probs=old, reference_log_probs=trainer - 0.3)
    expected = [math.exp(0.5), 3.0, math.exp(-0.7)]
    assert inputs.importance_weights[0, :3].tolist() == pytest.approx(expected, rel=1e-6)
    loss, details = grpo(inputs, GRPOConfig(beta=0.5, kl_estimator="k1"))
    objective = 2.0 * (expected[0] * math.exp(0.1) + expected[1] + expected[2] * math.exp(-0.1)) / 3
    assert loss.item() == pytest.approx(0.5 * 0.3 - objective, rel=1e-5)
    assert details["kl"] == pytest.approx(0.3, rel=1e-5) and details["clip_ratio"] == 0


@pytest.mark.parametrize("shift", [-2.0, -0.1, 0.0, 0.1, 2.0])
def test_kl_estimators_by_hand(shift: float) -> None:
    inputs = inputs_of([[1.0]], [0.0])
    inputs = replace(inputs, reference_log_probs=inputs.trainer_log_probs + shift)
    expected = {"k1": -shift, "k2": shift**2 / 2, "k3": math.exp(shift) - shift - 1}
    for name, value in expected.items():
        loss, details = grpo(inputs, GRPOConfig(beta=0.5, kl_estimator=name))
        assert details["kl"] == pytest.approx(value, rel=1e-4, abs=1e-7)
        assert loss.item() == pytest.approx(0.5 * value, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimates_are_unbiased(estimator: str) -> None:
    """E_π[−r] = E_π[exp(r) − r − 1] = KL(π ‖ π_ref), summed exactly over a distribution of four tokens."""
    p, q = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    inputs = inputs_of([[1.0]] * 4, [0.0] * 4, trainer_log_probs=p.log()[:, None], reference_log_probs=q.log()[:, None])
    mean = float((p * kl(inputs, estimator)[:, 0]).sum())
    assert mean == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)


def test_gradient_at_ratio_one_is_the_policy_gradient() -> None:
    """−A / (tokens · candidates) at every written token, 0 elsewhere; the KL term has no slope at equality."""
    inputs = inputs_of([[1.0] * 3] * 2, [0.8, -0.3], [[True, True, False], [True, True, True]])
    log_probs = inputs.trainer_log_probs.clone().requires_grad_()
    loss, _ = grpo(replace(inputs, trainer_log_probs=log_probs), GRPOConfig())
    (gradient,) = torch.autograd.grad(loss, log_probs)
    expected: Tensor = -torch.tensor([[0.8 / 4, 0.8 / 4, 0.0], [-0.3 / 6, -0.3 / 6, -0.3 / 6]])
    assert torch.allclose(gradient, expected, atol=1e-7)


def test_a_clipped_token_has_no_gradient() -> None:
    inputs = inputs_of([[1.5, 1.0]], [1.0])
    log_probs = inputs.trainer_log_probs.clone().requires_grad_()
    loss, _ = grpo(replace(inputs, trainer_log_probs=log_probs), GRPOConfig(beta=0.0))
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert gradient.tolist() == [[0.0, -0.5]]


def trl_loss(inputs: LossInputs, config: GRPOConfig) -> tuple[Tensor, dict[str, float]]:
    """``GRPOTrainer._compute_loss`` of one process and one micro-batch, on log-probabilities that no model made."""
    trainer_class = pytest.importorskip("trl", reason="TRL is not installed: pip install 'stdist[dev]'").GRPOTrainer
    metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            inputs.trainer_log_probs,
            torch.zeros_like(inputs.trainer_log_probs),
            None,
        ),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if config.loss_type == "gspo" else "token",
        loss_type="grpo" if config.loss_type == "gspo" else config.loss_type,
        beta=config.beta,
        epsilon_low=config.epsilon,
        epsilon_high=config.epsilon_high or config.epsilon,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        use_vllm=inputs.old_log_probs is not None,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode="token_truncate",
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=inputs.max_tokens,
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
        _entropy_bonus_enabled=False,
        _metrics=metrics,
    )
    ids = torch.zeros_like(inputs.mask, dtype=torch.long)
    batch = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": inputs.mask.long(),
        "advantages": inputs.advantages,
        "old_per_token_logps": inputs.rollout_log_probs if inputs.old_log_probs is None else inputs.old_log_probs,
        "importance_sampling_ratio": inputs.importance_weights,
        "ref_per_token_logps": inputs.reference_log_probs,
        "num_items_in_batch": inputs.mask.sum(),
    }
    loss = trainer_class._compute_loss(trainer, None, batch)
    return loss, {name: values[0] for name, values in metrics["train"].items()}


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("epsilon_high", [None, 0.28])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_gradient_and_details_are_trls(loss_type: str, epsilon_high: float | None, stale: bool) -> None:
    inputs, config = random_inputs(stale=stale), GRPOConfig(loss_type=loss_type, epsilon_high=epsilon_high, beta=0.07)
    ours, details = LOSSES[loss_type](inputs, config)
    theirs, metrics = trl_loss(inputs, config)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, inputs.trainer_log_probs)[0] for loss in (ours, theirs)]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-8)
    assert details["kl"] == pytest.approx(metrics["kl"], rel=1e-5)
    for name in ("low", "high", "region"):
        mine = details["clip_ratio" if name == "region" else f"clip_ratio/{name}"]
        assert 0 < mine == pytest.approx(metrics[f"clip_ratio/{name}_mean"], rel=1e-5), name
