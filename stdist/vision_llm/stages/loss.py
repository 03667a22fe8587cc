"""GRPO's objective and its variants as pure functions, under TRL's names for them (``loss_type``).

Each returns some candidates' share of the loss of a whole step: sums over these candidates divided by counts over all
of them, so that micro-batches add up, and learners too, however many there are. TRL writes gspo as ``loss_type="grpo"``
with ``importance_sampling_level="sequence"``, and multiplies the KL term by the ratio (``use_bias_correction_kl``);
the paper does not, nor do these.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stdist.vision_llm.config import GRPOConfig

IMPORTANCE_CAP = 3.0
"""C of TRL's ``vllm_importance_sampling_clip_max``, mode ``token_truncate``."""
LossOutput = tuple[Float[Tensor, ""], dict[str, float]]
"""A share of the loss, to be minimised, and of the step's ``kl`` and ``clip_ratio`` (``/low``, ``/high``)."""


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """Some candidates of a step. ``rollout_log_probs`` are those of the weights that wrote them.

    Attributes:
        advantages: of each candidate, or of each token where every one was an action of its own.
        old_log_probs: of the weights that began to learn from them, where those are newer than what wrote them; then
            the ratio is to these, and truncated importance weights make up for the difference (Yao et al. 2025).
        tokens: written in the whole step, by all learners' candidates.
        sequences: candidates of the whole step, of all learners.
        max_tokens: the most a candidate may write, the end token included.
    """

    trainer_log_probs: Float[Tensor, "candidates tokens"]
    rollout_log_probs: Float[Tensor, "candidates tokens"]
    reference_log_probs: Float[Tensor, "candidates tokens"]
    advantages: Float[Tensor, " candidates"] | Float[Tensor, "candidates tokens"]
    mask: Bool[Tensor, "candidates tokens"]
    tokens: int
    sequences: int
    max_tokens: int
    old_log_probs: Float[Tensor, "candidates tokens"] | None = None

    @property
    def importance_weights(self) -> Float[Tensor, "candidates tokens"] | None:
        """π_old / π_rollout at each token, at most IMPORTANCE_CAP; None where the two are the same."""
        if self.old_log_probs is None:
            return None
        return ((self.old_log_probs - self.rollout_log_probs) * self.mask).exp().clamp(max=IMPORTANCE_CAP)


def grpo(inputs: LossInputs, config: GRPOConfig) -> LossOutput:
    """Mean over a candidate's tokens, then over candidates: each weighs the same (Shao et al. 2024)."""
    per_token, details = _clipped(inputs, _log_ratio(inputs).exp(), config)
    return _mean_of_sequences(per_token, inputs), details


def dr_grpo(inputs: LossInputs, config: GRPOConfig) -> LossOutput:
    """Sum over tokens divided by candidates · ``max_tokens``, a constant (Liu et al. 2025)."""
    per_token, details = _clipped(inputs, _log_ratio(inputs).exp(), config)
    return (per_token * inputs.mask).sum() / (inputs.sequences * inputs.max_tokens), details


def dapo(inputs: LossInputs, config: GRPOConfig) -> LossOutput:
    """Mean over the tokens of all candidates: long ones weigh more (Yu et al. 2025)."""
    per_token, details = _clipped(inputs, _log_ratio(inputs).exp(), config)
    return (per_token * inputs.mask).sum() / inputs.tokens, details


def gspo(inputs: LossInputs, config: GRPOConfig) -> LossOutput:
    """One ratio a candidate, the geometric mean of its tokens' (Zheng et al. 2025); averaged as ``grpo``."""
    log_ratio = _log_ratio(inputs).sum(1, keepdim=True) / _lengths(inputs)[:, None]
    per_token, details = _clipped(inputs, log_ratio.exp(), config)
    return _mean_of_sequences(per_token, inputs), details


LOSSES: dict[str, Callable[[LossInputs, GRPOConfig], LossOutput]] = {
    loss.__name__: loss for loss in (grpo, dr_grpo, dapo, gspo)
}


def kl(inputs: LossInputs, estimator: str) -> Float[Tensor, "candidates tokens"]:
    """Estimates of KL(π ‖ π_ref) at each token (Schulman 2020), with r = log π_ref − log π.

    ``k1`` −r is unbiased, ``k2`` r²/2 never negative, ``k3`` exp(r) − r − 1 both.
    """
    r = inputs.reference_log_probs - inputs.trainer_log_probs
    return {"k1": lambda: -r, "k2": lambda: r**2 / 2, "k3": lambda: r.exp() - r - 1}[estimator]()


def _log_ratio(inputs: LossInputs) -> Float[Tensor, "candidates tokens"]:
    before = inputs.rollout_log_probs if inputs.old_log_probs is None else inputs.old_log_probs
    return (inputs.trainer_log_probs - before) * inputs.mask


def _clipped(
    inputs: LossInputs, ratio: Float[Tensor, "candidates tokens_or_1"], config: GRPOConfig
) -> tuple[Float[Tensor, "candidates tokens"], dict[str, float]]:
    """−min(ratio · A, clip(ratio) · A) + beta · KL at each token; and the details, as TRL counts them: a mean over
    tokens, of clipped sequences where each has one ratio."""
    advantages = inputs.advantages.view(len(inputs.mask), -1)
    low, high = 1 - config.epsilon, 1 + (config.epsilon if config.epsilon_high is None else config.epsilon_high)
    objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if (weights := inputs.importance_weights) is not None:
        objective = objective * weights
    divergence = kl(inputs, config.kl_estimator)

    def share(per_token: Tensor) -> float:
        if per_token.shape != inputs.mask.shape:
            return per_token.sum().item() / inputs.sequences
        return (per_token * inputs.mask).sum().item() / inputs.tokens

    details = {
        "kl": share(divergence),
        "clip_ratio/low": share((ratio < low) & (advantages < 0)),
        "clip_ratio/high": share((ratio > high) & (advantages > 0)),
    }
    details["clip_ratio"] = details["clip_ratio/low"] + details["clip_ratio/high"]
    return config.beta * divergence - objective, details


def _mean_of_sequences(per_token: Float[Tensor, "candidates tokens"], inputs: LossInputs) -> Float[Tensor, ""]:
    return ((per_token * inputs.mask).sum(1) / _lengths(inputs)).sum() / inputs.sequences


def _lengths(inputs: LossInputs) -> Float[Tensor, " candidates"]:
    return inputs.mask.sum(1).clamp(min=1)
