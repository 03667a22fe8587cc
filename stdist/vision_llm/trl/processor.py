"""The policy's prompts and frames behind transformers' interface of a processor."""

import copy
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin

from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.policy.prompts import END, IMAGE

NUMERAL = re.compile(r"<\|FP(-?\d+)/(-?\d+)\|>")
FRAME = f"<|vision_start|>{IMAGE}<|vision_end|>"
Message = dict[str, Any]
"""``role`` and ``content``: text, or TRL's parts, ``{"type": "text", "text": …}`` and ``{"type": "image", "image": …}``
with a frame, float32 ``[H, W]`` in units."""


class PolicyProcessor(ProcessorMixin):
    """Messages to token ids and pixel values, and back; made for TRL's trainers, as their ``processing_class``.

    An image is a frame of traffic, which Eq. 8–11 turn into pixels as in stdist's own training: an image file has 8
    bits, traffic does not. Numerals are text in messages, ``<|FP114/0|>``, and one token each.
    """

    def __init__(self, policy: PolicyModel):
        # Not transformers' own: it looks for classes that it knows by their names.
        self._policy = policy
        self.tokenizer = copy.deepcopy(policy.tokenizer)
        self.tokenizer.eos_token = END
        self.chat_template = None
        self._pads = IMAGE * (policy.encoder.geometry.tokens if policy.encoder else 1)

    def apply_chat_template(self, conversation: Sequence[Any], tokenize: bool = False, **_: object) -> Any:  # type: ignore[override]
        """One conversation or many as text, in Qwen's template; with ``tokenize``, as ``__call__`` does."""
        many = not isinstance(conversation[0], dict)
        conversations: Sequence[Sequence[Message]] = conversation if many else [conversation]
        texts = [_render(messages) for messages in conversations]
        if not tokenize:
            return texts if many else texts[0]
        frames = [[part["image"] for part in _parts(messages) if part["type"] == "image"] for messages in conversations]
        return self(text=texts, images=frames if any(frames) else None)

    def __call__(
        self,
        text: str | list[str],
        images: list[list[np.ndarray]] | None = None,
        return_tensors: str | None = None,
        **_: object,
    ) -> dict[str, Any]:
        """Token ids of texts of equal length, lists or, with ``return_tensors``, tensors; and the frames of each, [S]
        of ``[H, W]``, as Qwen2.5-VL's ``pixel_values`` and ``image_grid_thw``."""
        ids = [self.encode(one) for one in ([text] if isinstance(text, str) else text)]
        fields = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
        if images is not None:
            fields["mm_token_type_ids"] = [[int(id == self._policy.image_id) for id in row] for row in ids]
        inputs: dict[str, Any] = {k: torch.tensor(v) for k, v in fields.items()} if return_tensors else dict(fields)
        if images is not None:
            assert self._policy.encoder, "this policy sees no frames"
            patches, thw = self._policy.encoder(torch.from_numpy(np.stack([np.stack(frames) for frames in images])))
            inputs |= {"pixel_values": patches, "image_grid_thw": thw}
        return inputs

    def encode(self, text: str) -> list[int]:
        """Token ids of text with numerals."""
        policy, ids, at = self._policy, [], 0
        text = text.replace(FRAME, FRAME.replace(IMAGE, self._pads))
        for numeral in NUMERAL.finditer(text):
            ids += policy.prompts.text_ids(text[at : numeral.start()])
            ids.append(policy.first_numeral_id + int(policy.vocabulary.indices(*map(int, numeral.groups()))))
            at = numeral.end()
        return ids + policy.prompts.text_ids(text[at:])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **_: object) -> str:
        """The text that ``encode`` reads."""
        first, text = self._policy.first_numeral_id, ""
        for numerals, run in groupby(map(int, ids), lambda id: id >= first):
            if numerals:
                text += "".join(self._policy.vocabulary.token(id - first) for id in run)
            else:
                text += self.tokenizer.decode(list(run), skip_special_tokens=skip_special_tokens)
        return text.replace(self._pads, IMAGE)

    def batch_decode(self, ids: Sequence[Sequence[int]], **options: Any) -> list[str]:
        return [self.decode(row, **options) for row in ids]


def _parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]


def _render(messages: Sequence[Message]) -> str:
    """Qwen's template: without a line's end behind the last answer, which no forecast has either."""
    texts = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(FRAME if part["type"] == "image" else part["text"] for part in content)
        texts.append(f"<|im_start|>{message['role']}\n{content}{END}")
    if messages[-1]["role"] != "assistant":
        texts.append("<|im_start|>assistant\n")
    return "\n".join(texts)
