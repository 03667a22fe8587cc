"""GRPO from top to bottom (Vision-LLMs for Spatiotemporal Traffic Forecasting, Eq. 17–19), transformers and no more.

    python examples/grpo_minimal.py

Plain and slow: every candidate is a sequence of its own and every token a pass over all before it; no prefix tree, no
adapter, no workers. ``stdist.vision_llm.stages.grpo`` computes the same, and a test holds it against this file. Stdist
lends what is around the algorithm: a synthetic city, a small Qwen2.5-VL, prompts and numerals.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration as Model

from data_prep import READERS
from stdist.data import open_store
from stdist.vision_llm.policy.checkpoints import build_policy
from stdist.vision_llm.policy.city_windows import CityWindows, PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.policy.spec import FrameSpec, PolicySpec, Setting

HISTORY, HORIZON, GENERATIONS = 4, 3, 4
SFT_STEPS, GRPO_STEPS = 24, 12
TEMPERATURE, EPSILON, BETA, HALF_SCORE = 1.0, 0.2, 0.04, 0.5
MAX_TOKENS = HORIZON + 4  # beyond K, so that the length term of Eq. 17 can tell a candidate off


@dataclass
class Prompts:
    """One row a candidate: frames, what all cells share, the cell's own history. ``sayable``: ids of all numerals, then
    of the end; an answer id is a place in it."""

    ids: Int[Tensor, "candidates tokens"]
    patches: Float[Tensor, "patches features"]
    grid_thw: Int[Tensor, "frames 3"]
    image_id: int
    sayable: Int[Tensor, " answers"]

    @classmethod
    def of(cls, policy: PolicyModel, batch: PolicyBatch, generations: int) -> "Prompts":
        """``generations`` rows a cell, cell by cell and window by window."""
        cells = len(batch.prompts) // len(batch.shared)
        ids = torch.cat([batch.shared.repeat_interleave(cells, 0), batch.prompts], dim=1)
        patches, grid_thw = policy.encoder(batch.grids.repeat_interleave(cells * generations, 0))
        first = policy.first_numeral_id
        sayable = torch.tensor([*range(first, first + len(policy.vocabulary)), policy.end_id])
        return cls(ids.repeat_interleave(generations, 0), patches, grid_thw, policy.image_id, sayable)


def plain_model(policy: PolicyModel) -> Model:
    """The policy as transformers knows it: one embedding and one head of text rows, then the numerals' rows."""
    model, first = copy.deepcopy(policy.base_model), policy.first_numeral_id
    model.resize_token_embeddings(first + len(policy.vocabulary), mean_resizing=False)
    model.get_input_embeddings().weight.data[first:] = policy.rows.input.data
    model.lm_head.weight.data[first:] = policy.rows.output.data
    return model.eval().requires_grad_(True)


def answer_logits(
    model: Model, prompts: Prompts, answer_ids: Int[Tensor, "candidates written"]
) -> Float[Tensor, "candidates written+1 answers"]:
    """What may be said behind the prompt and behind each token written so far."""
    ids = torch.cat([prompts.ids, prompts.sayable[answer_ids]], dim=1)
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=prompts.patches,
        image_grid_thw=prompts.grid_thw,
        mm_token_type_ids=(ids == prompts.image_id).int(),
    ).logits
    return logits[:, prompts.ids.shape[1] - 1 :, prompts.sayable]


@torch.no_grad()
def sample(model: Model, prompts: Prompts) -> Int[Tensor, "candidates tokens"]:
    """Answer ids, token by token; behind its end a candidate is filled up with ends."""
    end, answer_ids = len(prompts.sayable) - 1, prompts.ids[:, :0]
    ended = torch.zeros(len(prompts.ids), dtype=torch.bool)
    while answer_ids.shape[1] < MAX_TOKENS and not ended.all():
        probabilities = (answer_logits(model, prompts, answer_ids)[:, -1] / TEMPERATURE).softmax(-1)
        token = torch.multinomial(probabilities, 1)[:, 0].masked_fill(ended, end)
        answer_ids = torch.cat([answer_ids, token[:, None]], dim=1)
        ended |= token == end
    return answer_ids


def log_probs(
    model: Model, prompts: Prompts, answer_ids: Int[Tensor, "candidates tokens"]
) -> Float[Tensor, "candidates tokens"]:
    logits = answer_logits(model, prompts, answer_ids[:, :-1]) / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, answer_ids[..., None])[..., 0]


def written(answer_ids: Int[Tensor, "candidates tokens"], end: int) -> Bool[Tensor, "candidates tokens"]:
    """True up to the end token, which counts."""
    return (answer_ids == end).cumsum(1) - (answer_ids == end).int() == 0


def reward(values: list[float], truth: list[float], d: float) -> float:
    """Eq. 17: accuracy (Eq. 18 of Eq. 19's error over the common prefix), the length term, and 0.5 for nothing."""
    common, accuracy = min(len(values), len(truth)), 0.0
    if common:
        squared = sum((a - b) ** 2 for a, b in zip(values[:common], truth[:common], strict=True))
        accuracy = 0.5 ** (math.sqrt(squared / common) / d / HALF_SCORE)
    return accuracy - 0.5 * abs(len(values) - len(truth)) / len(truth) - 0.5 * (not values)


def rewards_of(
    policy: PolicyModel, answer_ids: Int[Tensor, "candidates tokens"], truth: np.ndarray, d: np.ndarray
) -> Float[Tensor, "groups G"]:
    """``truth`` [groups, K] and ``d`` [groups], in the data's units."""
    end, generations = len(policy.vocabulary), len(answer_ids) // len(truth)
    rewards = []
    for row, answer in enumerate(answer_ids.tolist()):
        numerals = answer[: answer.index(end)] if end in answer else answer
        values, group = policy.vocabulary.decode(np.array(numerals, dtype=np.int64)).tolist(), row // generations
        rewards.append(reward(values, truth[group].tolist(), float(d[group])))
    return torch.tensor(rewards).view(-1, generations)


def grpo_loss(
    new: Float[Tensor, "candidates tokens"],
    old: Float[Tensor, "candidates tokens"],
    reference: Float[Tensor, "candidates tokens"],
    rewards: Float[Tensor, "groups G"],
    mask: Bool[Tensor, "candidates tokens"],
) -> Float[Tensor, ""]:
    """−min(ratio · A, clip(ratio) · A) + β · KL, the mean over a candidate's tokens, then over candidates."""
    advantages = (rewards - rewards.mean(1, keepdim=True)).view(-1, 1)
    ratio = (new - old).exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages)
    kl = (reference - new).exp() - (reference - new) - 1
    return (((BETA * kl - objective) * mask).sum(1) / mask.sum(1)).mean()


def update(optimizer: torch.optim.Optimizer, model: torch.nn.Module, loss: Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    rng, _ = np.random.default_rng(0), torch.manual_seed(0)
    setting = Setting(city="toy", channel="internet", cadence=60, history=HISTORY, horizon=HORIZON)
    frames = FrameSpec(height=4, width=4, pixels_per_cell=14, power=0.5, t_max=2000.0)
    spec = PolicySpec(base="tiny", mantissa_digits=2, setting=setting, frames=frames, base_is_trained=True)
    policy = build_policy(spec, seed=0)
    end = len(policy.vocabulary)
    with TemporaryDirectory() as folder:
        READERS["synthetic"].prepare(
            [], path := Path(folder) / "toy.zarr", city="toy", height=4, width=4, days=6, cadence=60, seed=3
        )
        store = open_store(path)
        city = CityWindows(policy, store.windows("train", HISTORY, HORIZON, channel="internet"))
        cell_mean = store.statistics("internet", store.default_split.train).cell_mean.ravel()
        model = plain_model(policy)

        def draw(windows: int) -> PolicyBatch:
            return city.batch(rng.choice(len(city), windows), rng.choice(city.cells, 4, replace=False))

        # Supervised fine-tuning (Eq. 16): without it no candidate is near enough to be told from another.
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
        for _ in range(SFT_STEPS):
            batch = draw(4)
            prompts = Prompts.of(policy, batch, 1)
            answers = torch.nn.functional.pad(batch.answers[:, :-1] - policy.first_numeral_id, (0, 1), value=end)
            update(optimizer, model, loss := -log_probs(model, prompts, answers).mean())
        print(f"SFT: loss {loss.item():.2f} after {SFT_STEPS} steps")

        # The old policy is the one that sampled: with one update a rollout it is the current one, and the ratio is 1.
        reference = copy.deepcopy(model).requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95))
        history = []
        for step in range(GRPO_STEPS):
            batch = draw(1)
            prompts = Prompts.of(policy, batch, GENERATIONS)
            answer_ids = sample(model, prompts)
            d = np.tile(np.maximum(cell_mean[batch.cells], 0.05 * cell_mean[city.cells].mean()), len(batch.shared))
            rewards = rewards_of(policy, answer_ids, batch.truth.reshape(-1, HORIZON), d)
            mask = written(answer_ids, end)
            new = log_probs(model, prompts, answer_ids)
            of_reference = log_probs(reference, prompts, answer_ids)
            update(optimizer, model, grpo_loss(new, new.detach(), of_reference, rewards, mask))
            history.append(rewards.mean().item())
            print(f"GRPO step {step + 1:2}: reward {history[-1]:.3f}")
        print(f"mean reward {np.mean(history[:4]):.3f} in the first four steps, {np.mean(history[-4:]):.3f} last")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
