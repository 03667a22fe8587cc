"""The gradient of a prefix tree is that of one whole sequence per candidate, however it is cut into micro-batches."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from stdist.vision_llm.config import GRPOConfig
from stdist.vision_llm.kernels.token_losses import head_logits
from stdist.vision_llm.policy.adapters import adapter_names, add_lora, train_only
from stdist.vision_llm.policy.city_windows import PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.sampler import Completions
from stdist.vision_llm.stages.grpo import candidate_log_probs, candidate_tree, completion_log_probs
from stdist.vision_llm.stages.loss import LossInputs, grpo
from stdist.vision_llm.stages.sft import sft_loss, sft_tree
from stdist.vision_llm.tree import prefix_tree
from stdist.vision_llm.tree.prefix_tree import Tree, Visit

MakePolicy = Callable[..., PolicyModel]
Gradients = dict[str, Tensor]
ALL = 10**6
G, TEMPERATURE = 3, 0.8
NO_BLANKS = torch.zeros(4, dtype=torch.bool)


@pytest.fixture(scope="module")
def make_kind(make_policy: MakePolicy, base: Path) -> Callable[..., PolicyModel]:
    """A policy that trains in full, a LoRA adapter that already says something, or the same over four bits."""

    def make(kind: str, checkpointing: bool = False) -> PolicyModel:
        changes = {"base": str(base), "base_is_trained": False, "load_in_4bit": True} if kind == "nf4" else {}
        policy = make_policy(gradient_checkpointing=checkpointing, **changes).cpu()
        if kind == "lora":
            add_lora(policy)
        generator = torch.Generator().manual_seed(9)
        for name, parameter in policy.backbone.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        train_only(policy, "full" if kind == "full" else "lora")
        return policy

    return make


@dataclass
class Case:
    """Two windows of two cells. What fine-tuning and GRPO ask of them, in columns of the full or the answer logits."""

    batch: PolicyBatch
    completions: Completions
    reference: Tensor
    advantages: Tensor

    def tree_and_loss(self, policy: PolicyModel, algorithm: str) -> tuple[Tree, Visit]:
        if algorithm == "sft":
            return sft_tree(policy, self.batch, NO_BLANKS), sft_loss(policy, self.batch)

        def loss(rows: slice, states: Tensor) -> Tensor:
            log_probs = candidate_log_probs(policy, states, self.completions, rows, TEMPERATURE)
            return self.grpo_loss(log_probs, rows)

        return candidate_tree(policy, self.batch, self.completions), loss

    def grpo_loss(self, log_probs: Tensor, rows: slice) -> Tensor:
        inputs = LossInputs(
            trainer_log_probs=log_probs,
            rollout_log_probs=self.completions.log_probs[rows],
            reference_log_probs=self.reference[rows],
            advantages=self.advantages[rows],
            mask=self.completions.mask[rows],
            tokens=int(self.completions.mask.sum()),
            sequences=len(self.advantages),
            max_tokens=4,
        )
        return grpo(inputs, GRPOConfig(epsilon=0.2, beta=0.1))[0]


@pytest.fixture(scope="module")
def make_case(make_batch: Callable[..., PolicyBatch]) -> Callable[[PolicyModel], Case]:
    """Candidates of 1 to 4 tokens, the end included where there was room; old and reference log-probabilities lie
    around their own, some beyond the clip."""

    def make(policy: PolicyModel) -> Case:
        batch = make_batch(policy, cells=(1, 18))
        generator = torch.Generator().manual_seed(5)
        end = len(policy.vocabulary)
        lengths = torch.tensor([4, 0, 2, 1, 3, 4, 2, 4, 0, 3, 1, 2])  # numerals
        answer_ids = torch.randint(end, (12, 4), generator=generator)
        answer_ids = answer_ids.masked_fill(torch.arange(4) >= lengths[:, None], end)
        mask = torch.arange(4) <= lengths[:, None]
        completions = Completions(answer_ids, mask, torch.zeros(12, 4), torch.zeros(12, 4), lengths)
        tree = candidate_tree(policy, batch, completions)
        own = completion_log_probs(policy, tree, completions, TEMPERATURE, [ALL] * 3)
        completions.log_probs = (own + 0.3 * torch.randn(12, 4, generator=generator)) * mask
        reference = (own + 0.3 * torch.randn(12, 4, generator=generator)) * mask
        return Case(batch, completions, reference, torch.randn(12, generator=generator))

    return make


def gradients(policy: PolicyModel) -> Gradients:
    return {name: p.grad for name, p in policy.named_parameters() if p.requires_grad and p.grad is not None}


def per_sample_loss(
    policy: PolicyModel, case: Case, algorithm: str, logits_of: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """The definition: every candidate a sequence of its own. ``logits_of`` child and tail, in the order of ids."""
    if algorithm == "sft":
        losses = []
        for child, answers in enumerate(case.batch.answers):
            logits = logits_of(child, answers[:-1])[-len(answers) :]
            losses.append(torch.nn.functional.cross_entropy(logits, answers, reduction="none"))
        return torch.stack(losses).mean()
    first, end = policy.first_numeral_id, len(policy.vocabulary)
    sayable = torch.cat([torch.arange(first, first + end), torch.tensor([policy.end_id])])
    log_probs = []
    for candidate, answer_ids in enumerate(case.completions.answer_ids):
        tokens = int(case.completions.mask[candidate].sum())
        logits = logits_of(candidate // G, sayable[answer_ids[: tokens - 1]])[-tokens:, sayable]
        said = (logits / TEMPERATURE).log_softmax(-1).gather(1, answer_ids[:tokens, None])[:, 0]
        log_probs.append(torch.nn.functional.pad(said, (0, 4 - tokens)))
    return case.grpo_loss(torch.stack(log_probs), slice(0, 12))


@pytest.fixture(scope="module")
def per_sample(
    make_kind: Callable[..., PolicyModel],
    make_case: Callable[[PolicyModel], Case],
    plain_model: Callable[[PolicyModel], Qwen2_5_VLForConditionalGeneration],
    plain_inputs: Callable[..., dict[str, Tensor]],
) -> Callable[[str, str], tuple[float, Gradients]]:
    """Loss and gradients by transformers' own model, masks and M-RoPE, once for each kind and algorithm.

    A base in four bits cannot be resized: there its own layers read whole sequences, with transformers' attention.
    """

    @cache
    def compute(kind: str, algorithm: str) -> tuple[float, Gradients]:
        policy = make_kind(kind)
        case = make_case(policy)
        if kind == "nf4":
            loss = per_sample_loss(policy, case, algorithm, lambda *child: whole_sequence(policy, case.batch, *child))
            loss.backward()
            return loss.item(), gradients(policy)
        model = plain_model(policy)
        inputs = plain_inputs
        loss = per_sample_loss(
            policy, case, algorithm, lambda child, tail: model(**inputs(policy, case.batch, child, tail)).logits[0]
        )
        loss.backward()
        return loss.item(), as_the_policy_names_them(policy, model)

    def whole_sequence(policy: PolicyModel, batch: PolicyBatch, child: int, tail: Tensor) -> Tensor:
        inputs = plain_inputs(policy, batch, child, tail)
        ids, base = inputs["input_ids"], policy.base_model.model
        visual = base.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        embeddings = policy.embed(ids).masked_scatter((ids == policy.image_id)[..., None], visual)
        positions, _ = base.get_rope_index(
            ids, mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
        )
        hidden = base.language_model(inputs_embeds=embeddings, position_ids=positions, use_cache=False)
        return head_logits(hidden.last_hidden_state[0], policy.full_head)

    return compute


def as_the_policy_names_them(policy: PolicyModel, model: Qwen2_5_VLForConditionalGeneration) -> Gradients:
    """Transformers' one embedding and one head, taken apart into text rows and numeral rows."""
    first, theirs = policy.first_numeral_id, dict(model.named_parameters())
    matrices = {"input": "model.language_model.embed_tokens.weight", "output": "lm_head.weight"}
    found = {}
    prefix = "backbone.base_model.model." if adapter_names(policy) else "backbone."
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and name.startswith("rows."):
            found[name] = theirs[matrices[name.removeprefix("rows.")]].grad[first:]
        elif parameter.requires_grad:
            gradient = theirs[name.removeprefix(prefix)].grad
            found[name] = gradient[:first] if name.removeprefix(prefix) in matrices.values() else gradient
    return found


def assert_same_gradients(found: Gradients, expected: Gradients) -> None:
    """Norm of the difference over norm, for each parameter."""
    assert found.keys() == expected.keys() and len(found) > 2
    errors = {name: ((found[name] - e).norm() / e.norm()).item() for name, e in expected.items()}
    assert all(error < 1e-5 for error in errors.values()), errors


def decoder_calls(policy: PolicyModel) -> list[int]:
    """Fills with the tokens of every pass through the first decoder layer's MLP, recomputation included."""
    calls: list[int] = []
    mlp = policy.base_model.model.language_model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].shape[:-1].numel()))
    return calls


CASES = [
    *[("full", False, size, algorithm) for size in (1, 3, ALL) for algorithm in ("sft", "grpo")],
    ("full", True, 3, "sft"),
    ("full", True, ALL, "grpo"),
    ("lora", False, 3, "grpo"),
    ("lora", True, 1, "sft"),
    ("nf4", False, ALL, "sft"),
    ("nf4", True, 3, "grpo"),
]


@pytest.mark.parametrize(("kind", "checkpointing", "size", "algorithm"), CASES)
def test_gradients_equal_those_of_one_sequence_per_candidate(
    make_kind: Callable[..., PolicyModel],
    make_case: Callable[[PolicyModel], Case],
    per_sample: Callable[[str, str], tuple[float, Gradients]],
    kind: str,
    checkpointing: bool,
    size: int,
    algorithm: str,
) -> None:
    policy = make_kind(kind, checkpointing)
    case = make_case(policy)
    tree, loss = case.tree_and_loss(policy, algorithm)
    calls = decoder_calls(policy)
    backwards: list[int] = []

    def backward(scalar: Tensor) -> None:
        backwards.append(1)
        scalar.backward()

    total = prefix_tree.backward(policy, tree, loss, backward, [size] * (1 + len(tree.levels)))
    expected_loss, expected = per_sample(kind, algorithm)
    assert total == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(gradients(policy), expected)
    assert sum(calls) == tree.tokens * (2 if checkpointing else 1), "every token once, and once more where recomputed"
    # Where three are allowed the two windows go together, and pairs of cells and triples of candidates stay whole.
    parts = {("sft", 1): 2 + 4, ("sft", 3): 1 + 2, ("sft", ALL): 1 + 1}
    parts |= {("grpo", 1): 2 + 4 + 12, ("grpo", 3): 1 + 2 + 4, ("grpo", ALL): 1 + 1 + 1}
    assert len(backwards) == parts[algorithm, size]
