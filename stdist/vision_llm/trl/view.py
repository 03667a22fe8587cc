"""The policy as a plain transformers model, for as long as somebody else trains it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import linear

from stdist.vision_llm.policy.adapters import GRPO_ADAPTER, SFT_ADAPTER, adapter_names, add_lora, train_only
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.policy.numeral_embeddings import NumeralEmbeddings

REFERENCE = "ref"
"""TRL's name of the adapter that holds its reference model."""
NEVER = -1e30
"""Logit of a token that is no answer: finite, or its entropy would be no number."""


class TransformersView:
    """Inside ``with TransformersView(policy):`` the policy's ``backbone``, a ``Qwen2_5_VLForConditionalGeneration`` or
    that with LoRA, knows the numerals in its ``forward`` and ``generate``: its embedding and its head look up the
    policy's rows, which train with it. Nothing is copied. Behind it the policy is as it was, with what was learnt.

    Args:
        answers_only: the head writes numerals and the end token alone, which is the distribution that stdist samples
            from and scores in GRPO; otherwise any token (Eq. 16).
    """

    def __init__(self, policy: PolicyModel, answers_only: bool = False):
        language, head = policy.base_model.model.language_model, policy.base_model.lm_head
        self._policy, self._plain = policy, (language.embed_tokens, head)
        first, weight = policy.first_numeral_id, head.weight
        bias = None
        if answers_only:
            bias = torch.zeros(first + len(policy.vocabulary), dtype=weight.dtype, device=weight.device)
            bias[:first] = NEVER
            bias[policy.end_id] = 0
        self._knowing = (
            _Embedding(language.embed_tokens, policy.rows, self._rows, first),
            _Head(head, self._rows, first, bias),
        )

    def __enter__(self) -> "TransformersView":
        self._install(*self._knowing)
        return self

    def __exit__(self, *_: object) -> None:
        self._install(*self._plain)
        # A trainer of TRL leaves a forward of its own on the model.
        self._policy.base_model.__dict__.pop("forward", None)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside, the policy is as stdist knows it: for evaluations and checkpoints on the way."""
        self._install(*self._plain)
        try:
            yield
        finally:
            self._install(*self._knowing)

    def _install(self, embedding: nn.Module, head: nn.Module) -> None:
        base = self._policy.base_model
        base.model.language_model.embed_tokens, base.lm_head = embedding, head

    def _rows(self) -> NumeralEmbeddings:
        """The rows that belong to the adapter in use: TRL changes to its reference by the adapter's name."""
        policy, backbone = self._policy, self._policy.backbone
        if isinstance(backbone, PeftModel) and backbone.active_adapter == REFERENCE and policy.reference_rows:
            return policy.reference_rows
        return policy.rows


@contextmanager
def grpo_view(policy: PolicyModel) -> Iterator[TransformersView]:
    """The view on answers alone, for ``GRPOTrainer``; call ``begin_grpo(policy)`` before.

    TRL takes a copy of the adapter "default", where stdist keeps the fine-tuned one, for its reference. Where nothing
    was fine-tuned with LoRA, an adapter that changes nothing is there meanwhile.
    """
    added = [REFERENCE]
    if SFT_ADAPTER not in adapter_names(policy):
        added.append(SFT_ADAPTER)
        add_lora(policy, SFT_ADAPTER)
        policy.backbone.set_adapter(GRPO_ADAPTER)
    try:
        with TransformersView(policy, answers_only=True) as view:
            yield view
    finally:
        for name in set(added).intersection(adapter_names(policy)):
            policy.backbone.delete_adapter(name)
        policy.backbone.set_adapter(GRPO_ADAPTER)
        train_only(policy, "lora")


class _Embedding(nn.Module):
    """Embeddings of text and numeral ids."""

    def __init__(
        self, text: nn.Embedding, trained: NumeralEmbeddings, rows: Callable[[], NumeralEmbeddings], first: int
    ):
        super().__init__()
        self.text, self.trained = text, trained  # so that the model's parameters are all that trains
        self._rows, self._first = rows, first

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d"]:
        return self._rows().embed(ids, self.text, self._first)


class _Head(nn.Module):
    """Logits of text and numerals, as one head: TRL also reads its ``weight`` and ``bias``."""

    bias: Tensor | None

    def __init__(self, text: nn.Linear, rows: Callable[[], NumeralEmbeddings], first: int, bias: Tensor | None):
        super().__init__()
        self.text, self._rows, self._first = text, rows, first
        self.register_buffer("bias", bias, persistent=False)

    @property
    def weight(self) -> Float[Tensor, "tokens d"]:
        text = self.text.weight[: self._first]
        return torch.cat([text, self._rows().output.to(text.dtype)])

    def forward(self, hidden: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch tokens"]:
        text, numerals = self.text.weight[: self._first], self._rows().output.to(hidden.dtype)
        logits = torch.cat([linear(hidden, text), linear(hidden, numerals)], dim=-1)
        return logits if self.bias is None else logits + self.bias
