"""Stages 1 and 2: numerical alignment (Vision-LLMs for Spatiotemporal Traffic Forecasting, Section IV.B.2).

Stage 1 transcribes numbers between text and numerals, both ways; stage 2 adds, subtracts and multiplies vectors in
three formats. Loss on the answers only. Departure: a preset has no pre-training, so its stage 1 may train the backbone
too (``alignment.trainable: full``); with a pre-trained base only the numeral rows train, as in the paper.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stdist.numerals.alignment_tasks import (
    Example,
    Piece,
    arithmetic_batch,
    relative_error,
    transcription_batch,
)
from stdist.training.inference import inference
from stdist.training.loop import Stage
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import AlignmentConfig
from stdist.vision_llm.kernels.token_losses import argmax_tokens, token_log_probs
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.policy.prompts import END

HEADLINES = {"alignment": ("exact_match",), "arithmetic": ("loss", "exact_match", "median_relative_error")}
TASKS = {"alignment": 2, "arithmetic": 9}
BATCHES = {"alignment": transcription_batch, "arithmetic": arithmetic_batch}
T = TypeVar("T")
_EVALUATION_SEED = 7_000_001  # added to the run's seed


class AlignmentStage(Stage):
    """``name`` is ``alignment`` (transcription) or ``arithmetic``; see :class:`stdist.training.loop.Stage`."""

    monitor: str | None = None

    def __init__(
        self, name: str, policy: PolicyModel, config: AlignmentConfig, seed: int, group: ProcessGroup = ProcessGroup()
    ):
        self.name, self.policy, self.config, self.seed, self.group = name, policy, config, seed, group
        self.headline = HEADLINES[name]
        self._batch = BATCHES[name]
        self._parts = config.gradient_accumulation_steps
        self._share = group.local_slice(config.train_batch_size, f"{name}.train_batch_size")

    def step(self, step: int, backward: Callable[[Tensor], None]) -> dict[str, float]:
        config = self.config
        examples = self._batch(
            self.policy.vocabulary,
            self.seed,
            step,
            config.train_batch_size,
            config.values_per_example,
        )
        total = tokens = 0.0
        for part in np.split(np.arange(config.train_batch_size)[self._share], self._parts):
            ids, is_target = tokenise(self.policy, [examples[i] for i in part])
            hidden, targets = _answers(self.policy, ids, is_target)
            loss = example_loss(hidden, self.policy.full_head, targets, is_target)
            loss = loss / self._parts
            backward(loss)
            total, tokens = total + loss.item(), tokens + ids.numel()
        return {"loss": total, "tokens": tokens}

    def halve_memory(self) -> bool:
        examples = (self._share.stop - self._share.start) // self._parts
        if examples % 2:
            return False
        self._parts *= 2
        return True

    def describe_batch(self, step: int) -> str:
        return f"examples {self._share.start} to {self._share.stop - 1} of step {step + 1} of seed {self.seed}"

    def evaluate(self) -> dict[str, float]:
        """Exact matches and, where the answer is numerals, relative errors, on permutations of their own.

        Not unseen numbers: training covers the whole vocabulary, that is its purpose, and so does this draw from it.
        An example is exact when every answer token is the most likely one after the true tokens before it, which is
        when greedy decoding generates exactly this answer.
        """
        config, vocabulary = self.config, self.policy.vocabulary
        total = config.eval_examples * TASKS[self.name]
        examples = self._batch(vocabulary, self.seed + _EVALUATION_SEED, 0, total, config.values_per_example)
        exact: dict[str, list[bool]] = defaultdict(list)
        errors: dict[str, list[float]] = defaultdict(list)
        loss = 0.0
        size = config.train_batch_size
        for first in self.group.local_items(range(0, total, size)):
            chunk = examples[first : first + size]
            ids, is_target = tokenise(self.policy, chunk)
            right = torch.zeros_like(is_target[:, 1:])
            best = torch.full_like(ids[:, 1:], -1)
            with inference(self.policy):
                hidden, targets = _answers(self.policy, ids, is_target)
                head = self.policy.full_head
                loss += example_loss(hidden, head, targets, is_target).item() * len(chunk) / total
                right[is_target[:, 1:]] = argmax_tokens(hidden, head) == targets
                best[is_target[:, 1:]] = argmax_tokens(hidden, [self.policy.rows.output])
            all_right = (right | ~is_target[:, 1:]).all(1)
            numeral = self.policy.first_numeral_id
            for i, example in enumerate(chunk):
                exact[example.task].append(bool(all_right[i]))
                if isinstance(example.answer[0], np.ndarray):
                    indices = best[i][ids[i, 1:] >= numeral]
                    predicted = vocabulary.decode(indices[indices >= 0].cpu().numpy())
                    errors[example.task].extend(
                        relative_error(predicted, vocabulary.decode(example.answer[0])).tolist()
                    )
        losses, all_exact, all_errors = zip(*self.group.all_gather_object((loss, exact, errors)), strict=True)
        loss, exact, errors = sum(losses), _joined(all_exact), _joined(all_errors)
        metrics = {f"exact_match/{task}": float(np.mean(hits)) for task, hits in exact.items()}
        metrics["loss"] = loss
        metrics["exact_match"] = float(np.mean([hit for hits in exact.values() for hit in hits]))
        if errors:
            metrics["median_relative_error"] = float(np.median([e for values in errors.values() for e in values]))
        return metrics


def _joined(parts: Sequence[dict[str, list[T]]]) -> dict[str, list[T]]:
    """Lists of the same name one behind the other."""
    joined: dict[str, list[T]] = defaultdict(list)
    for part in parts:
        for name, values in part.items():
            joined[name] += values
    return joined


def tokenise(
    policy: PolicyModel, examples: list[Example]
) -> tuple[Int[Tensor, "examples tokens"], Bool[Tensor, "examples tokens"]]:
    """Token ids of ``user: prompt, assistant: answer, end``, padded right, and which of them are answer or end."""
    opening = policy.prompts.text_ids("<|im_start|>user\n")
    answer = policy.prompts.text_ids(f"{END}\n<|im_start|>assistant\n")
    texts = [piece for e in examples for piece in (*e.prompt, *e.answer) if isinstance(piece, str)]
    encoded = iter(policy.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])

    def ids_of(pieces: tuple[Piece, ...]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            ids += next(encoded) if isinstance(piece, str) else (piece + policy.first_numeral_id).tolist()
        return ids

    prompts_answers = [(opening + ids_of(e.prompt) + answer, [*ids_of(e.answer), policy.end_id]) for e in examples]
    longest = max(len(prompt) + len(reply) for prompt, reply in prompts_answers)
    ids = torch.full((len(examples), longest), policy.end_id)
    is_target = torch.zeros(len(examples), longest, dtype=torch.bool)
    for i, (prompt, reply) in enumerate(prompts_answers):
        ids[i, : len(prompt) + len(reply)] = torch.tensor(prompt + reply)
        is_target[i, len(prompt) : len(prompt) + len(reply)] = True
    return ids.to(policy.device), is_target.to(policy.device)


def example_loss(
    hidden: Float[Tensor, "positions d"],
    head: Sequence[Float[Tensor, "_ d"]],
    targets: Int[Tensor, " positions"],
    is_target: Bool[Tensor, "examples tokens"],
) -> Float[Tensor, ""]:
    """−log P of an example's answer tokens, averaged over its tokens, then over examples; positions example by example.

    Every example weighs the same, or a text of ten digits would drown the one token of a numeral.
    """
    count = is_target.sum(1)
    weight = (1 / count).repeat_interleave(count) / len(count)
    return -(token_log_probs(hidden, head, targets) * weight).sum()


def _answers(policy: PolicyModel, ids: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states that predict each target token, and those tokens. The token at t is predicted at t − 1."""
    hidden = policy.hidden(ids[:, :-1])
    predicted = is_target[:, 1:]
    return hidden[predicted], ids[:, 1:][predicted]
