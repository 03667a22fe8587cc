"""Stages 1 and 2 (Vision-LLMs for Spatiotemporal Traffic Forecasting, Section IV.B.2)."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from stdist.numerals.alignment_tasks import Example, arithmetic_batch, transcription_batch
from stdist.training.engine import ParameterGroup, TorchEngine, cosine_schedule
from stdist.vision_llm.config import AlignmentConfig
from stdist.vision_llm.kernels.token_losses import head_logits
from stdist.vision_llm.policy.adapters import train_only
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.stages.alignment import AlignmentStage, example_loss, tokenise

SMALL = AlignmentConfig(trainable="full", train_batch_size=8, values_per_example=2, eval_examples=3)


def spelled(policy: PolicyModel, ids: list[int]) -> list[str | float]:
    """Text as strings, numerals as values."""
    pieces: list[str | float] = []
    for token in ids:
        if token >= policy.first_numeral_id:
            pieces.append(float(policy.vocabulary.decode(token - policy.first_numeral_id)))
        elif pieces and isinstance(pieces[-1], str):
            pieces[-1] += policy.tokenizer.decode([token])
        else:
            pieces.append(policy.tokenizer.decode([token]))
    return pieces


def test_tokenise_by_hand(policy: PolicyModel) -> None:
    """``user: prompt, assistant: answer, end``; answers and end are targets, nothing else, padding least of all."""
    v = policy.vocabulary
    examples = [
        Example("to_text", ("Write ", v.encode([12.0, -3.5]), " as text: "), ("'12.0,-3.5'",)),
        Example("to_numeral", ("Numerals: '7.0' ",), (v.encode([7.0]),)),
    ]
    ids, is_target = tokenise(policy, examples)
    assert ids.shape == is_target.shape
    opening, reply = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    first, second = (
        spelled(policy, row[: int(t.nonzero().max()) + 1]) for row, t in zip(ids.tolist(), is_target, strict=True)
    )
    assert first == [f"{opening}Write ", 12.0, -3.5, f" as text: {reply}'12.0,-3.5'<|im_end|>"]
    assert second == [f"{opening}Numerals: '7.0' {reply}", 7.0, "<|im_end|>"]
    assert spelled(policy, ids[0][is_target[0]].tolist()) == ["'12.0,-3.5'<|im_end|>"]
    assert spelled(policy, ids[1][is_target[1]].tolist()) == [7.0, "<|im_end|>"]


@pytest.mark.parametrize("make", [transcription_batch, arithmetic_batch])
def test_targets_are_the_answers_of_real_batches(policy: PolicyModel, make: Callable[..., list[Example]]) -> None:
    examples = make(policy.vocabulary, 0, 0, 18, 3)
    ids, is_target = tokenise(policy, examples)
    for example, row, targets in zip(examples, ids, is_target, strict=True):
        answer = spelled(policy, row[targets].tolist())
        (expected,) = example.answer
        if isinstance(expected, str):
            assert answer == [f"{expected}<|im_end|>"]
        else:
            assert answer == [*policy.vocabulary.decode(expected), "<|im_end|>"]
        assert targets.nonzero().diff(dim=0).eq(1).all(), "the answer is one stretch"


def test_padding_on_the_right_changes_nothing(policy: PolicyModel) -> None:
    examples = transcription_batch(policy.vocabulary, 0, 0, 6, 3)
    ids, is_target = tokenise(policy, examples)
    together = policy.hidden(ids)
    for row, example in enumerate(examples):
        alone, targets = tokenise(policy, [example])
        assert torch.equal(targets[0].nonzero(), is_target[row].nonzero())
        assert torch.allclose(policy.hidden(alone)[0], together[row, : alone.shape[1]], atol=1e-4)


@pytest.fixture(scope="module")
def half_taught(make_policy: Callable[..., PolicyModel]) -> PolicyModel:
    """Knows four examples of stage 1 by heart and no other: some of its answers are exact."""
    policy = make_policy()
    train_only(policy, "full")
    ids, is_target = tokenise(policy, evaluation_examples(policy)[:4])
    engine = TorchEngine([ParameterGroup(dict(policy.named_parameters()), 3e-3, 0.0)], cosine_schedule(0, 40), 1.0)
    for _ in range(40):
        logits = head_logits(policy.hidden(ids[:, :-1])[is_target[:, 1:]], policy.full_head)
        engine.backward(torch.nn.functional.cross_entropy(logits, ids[:, 1:][is_target[:, 1:]]))
        engine.step()
    return policy.eval()


def evaluation_examples(policy: PolicyModel) -> list[Example]:
    return transcription_batch(policy.vocabulary, 4 + 7_000_001, 0, 6, 2)


def generated(policy: PolicyModel, example: Example, limit: int) -> list[int]:
    """Greedy generation over everything the model can say, one whole forward a token."""
    ids, is_target = tokenise(policy, [example])
    start = int(is_target[0].nonzero().min())
    text = ids[0, :start].tolist()
    for _ in range(limit):
        hidden = policy.hidden(torch.tensor([text]))
        text.append(int(head_logits(hidden[:, -1], policy.full_head).argmax(-1)))
        if text[-1] == policy.end_id:
            break
    return text[start:]


def test_exact_match_is_what_greedy_generation_writes(half_taught: PolicyModel) -> None:
    metrics = AlignmentStage("alignment", half_taught, SMALL, seed=4).evaluate()
    hits: dict[str, list[bool]] = {"to_numeral": [], "to_text": []}
    for example in evaluation_examples(half_taught):
        ids, is_target = tokenise(half_taught, [example])
        answer = ids[0][is_target[0]].tolist()
        hits[example.task].append(generated(half_taught, example, len(answer)) == answer)
    everything = hits["to_numeral"] + hits["to_text"]
    assert 0 < sum(everything) < 6, "some are right and some are wrong, or nothing is proved"
    assert metrics["exact_match"] == pytest.approx(np.mean(everything))
    for task, task_hits in hits.items():
        assert metrics[f"exact_match/{task}"] == pytest.approx(np.mean(task_hits))


def test_relative_error_is_that_of_the_likeliest_numeral(half_taught: PolicyModel) -> None:
    """Teacher-forced, over numerals alone, on numeral answers alone."""
    errors = []
    for example in evaluation_examples(half_taught):
        (answer,) = example.answer
        if isinstance(answer, str):
            continue
        ids, is_target = tokenise(half_taught, [example])
        positions = is_target[0].nonzero().flatten()[:-1] - 1  # without the end
        best = head_logits(half_taught.hidden(ids)[0, positions], half_taught.answer_head)[:, :-1].argmax(-1)
        predicted, true = (half_taught.vocabulary.decode(x) for x in (best.numpy(), answer))
        errors += (np.abs(predicted - true) / np.maximum(np.abs(true), 1e-4)).tolist()
    assert len(errors) == 3 * 2
    metrics = AlignmentStage("alignment", half_taught, SMALL, seed=4).evaluate()
    assert metrics["median_relative_error"] == pytest.approx(np.median(errors))


def test_arithmetic_reports_every_task_and_its_errors(policy: PolicyModel) -> None:
    metrics = AlignmentStage("arithmetic", policy, SMALL, seed=0).evaluate()
    tasks = {name for name in metrics if name.startswith("exact_match/")}
    assert len(tasks) == 9 and "exact_match/multiply:text->numeral" in tasks
    assert np.isfinite(metrics["median_relative_error"]) and 0 <= metrics["exact_match"] <= 1


def mean_over_examples(policy: PolicyModel, examples: list[Example]) -> float:
    """Each example by itself, through transformers' kind of labels: the mean over its answer and end."""
    losses = []
    for example in examples:
        ids, is_target = tokenise(policy, [example])
        labels = ids.masked_fill(~is_target, -100)
        logits = head_logits(policy.hidden(ids), policy.full_head)
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]).item())
    return float(np.mean(losses))


def test_every_example_weighs_the_same_by_hand() -> None:
    """Two tokens of −log P = log 2 and log 8 in one example, one of log 4 in the other."""
    p = torch.tensor([0.5, 0.125, 0.25])
    logits = torch.stack([p, 1 - p], dim=1).log()
    is_target = torch.tensor([[False, True, True], [False, True, False]])
    loss = example_loss(logits, torch.eye(2).split(1), torch.zeros(3, dtype=torch.long), is_target)
    assert loss.item() == pytest.approx(((1 + 3) / 2 + 2) / 2 * np.log(2))


@pytest.mark.parametrize("name", ["alignment", "arithmetic"])
def test_step_is_the_mean_loss_over_examples(make_policy: Callable[..., PolicyModel], name: str) -> None:
    policy = make_policy()
    train_only(policy, "rows")
    stage = AlignmentStage(name, policy, SMALL, seed=2)
    scalars = stage.step(5, torch.Tensor.backward)
    make = {"alignment": transcription_batch, "arithmetic": arithmetic_batch}[name]
    with torch.no_grad():
        expected = mean_over_examples(policy, make(policy.vocabulary, 2, 5, 8, 2))
    assert scalars["loss"] == pytest.approx(expected, rel=1e-5)
    assert policy.rows.input.grad.abs().sum() > 0 and policy.rows.output.grad.abs().sum() > 0
    assert all(p.grad is None for p in policy.backbone.parameters())


def test_evaluation_reports_the_loss_that_training_minimises(half_taught: PolicyModel) -> None:
    """Whatever the batches: six examples, four at a time."""
    four = SMALL.model_copy(update={"train_batch_size": 4})
    metrics = AlignmentStage("alignment", half_taught, four, seed=4).evaluate()
    with torch.no_grad():
        assert metrics["loss"] == pytest.approx(
            mean_over_examples(half_taught, evaluation_examples(half_taught)), rel=1e-4
        )
