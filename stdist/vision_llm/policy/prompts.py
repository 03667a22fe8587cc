"""Prompts as token ids: shared part first, one cell's part last (docs/decisions.md, prompt order).

``shared``: system text, S frames, and the instruction every cell of a window has in common (city, channel, cadence,
time). ``cells``: coordinates and history of a cell, as single-token numerals, so that every cell's prompt of a run has
the same number of tokens. The answer is K numerals and the end token.
"""

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from stdist.numerals import Vocabulary
from stdist.vision_llm.policy.spec import Setting

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
IMAGE = "<|image_pad|>"
END = "<|im_end|>"
BLANK = "<|vision_pad|>"  # a token of Qwen's that no prompt uses: stands for a value not given


class PromptEncoder:
    """Turns windows and cells into token ids.

    Args:
        tokenizer: the text tokenizer.
        vocabulary: the numerals; numeral ``i`` has token id ``first_numeral_id + i``.
        setting: names and shape of the task.
        tokens_per_frame: visual tokens of one frame, 0 for a policy without frames.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        first_numeral_id: int,
        setting: Setting,
        tokens_per_frame: int,
    ):
        self.tokenizer, self.vocabulary, self.first_numeral_id = tokenizer, vocabulary, first_numeral_id
        self.end_id = self.token_id(END)
        frame = f"<|vision_start|>{IMAGE * tokens_per_frame}<|vision_end|>"
        frames = frame * setting.history if tokens_per_frame else ""
        self._opening = self.text_ids(
            f"<|im_start|>system\nYou forecast city traffic.{END}\n<|im_start|>user\n{frames}"
        ) + self._plain_ids(f"City {setting.city}, channel {setting.channel}, {setting.cadence} minutes apart. Now:")
        self._weekdays = [self.text_ids(f" {day}, hour ") for day in WEEKDAYS]
        self._next = self.text_ids(f". Values of one cell, next {setting.horizon}.\n")
        self._row, self._col = self.text_ids("row "), self.text_ids(" col ")
        self._history = self.text_ids(" history ")
        self._answer = self.text_ids(f"{END}\n<|im_start|>assistant\n")

    def token_id(self, token: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(token))  # type: ignore[arg-type]

    def text_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _plain_ids(self, text: str) -> list[int]:
        """Ids of text that others wrote: where it spells one of the tokenizer's own tokens, that is text too."""
        ids, own = self.text_ids(text), set(self.tokenizer.get_added_vocab().values())
        # What looks like a token is cut in any case: a checkpoint's tokenizer knows the numerals, a base's does not.
        if "<|" not in text and own.isdisjoint(ids):
            return ids
        return [id for character in text for id in self.text_ids(character)]

    def numeral_ids(self, values: np.ndarray) -> Int[np.ndarray, "..."]:
        return self.vocabulary.encode(values) + self.first_numeral_id

    def shared(self, origin: np.datetime64) -> list[int]:
        """Ids every cell of a window shares. ``origin`` is the local time of the last history frame."""
        day = origin.astype("datetime64[D]")
        hour = (origin - day) / np.timedelta64(1, "h")
        weekday = (day.astype(int) + 3) % 7  # 1970-01-01 was a Thursday
        return [*self._opening, *self._weekdays[weekday], int(self.numeral_ids(np.array(hour))), *self._next]

    def cells(
        self, rows: Int[np.ndarray, "cells"], cols: Int[np.ndarray, "cells"], history: np.ndarray
    ) -> Int[np.ndarray, "cells tokens"]:
        """Ids of each cell's own part. ``rows`` and ``cols`` count from 0; ``history`` is ``[cells, S]`` in units."""

        def constant(ids: list[int]) -> np.ndarray:
            return np.broadcast_to(np.array(ids, dtype=np.int64), (len(rows), len(ids)))

        return np.concatenate(
            [
                constant(self._row),
                self.numeral_ids(rows.astype(np.float64))[:, None],
                constant(self._col),
                self.numeral_ids(cols.astype(np.float64))[:, None],
                constant(self._history),
                self.numeral_ids(history),
                constant(self._answer),
            ],
            axis=1,
        )

    def answers(self, target: np.ndarray) -> Int[np.ndarray, "cells tokens"]:
        """Ids of the ground truth: ``target`` is ``[cells, K]`` in units; K numerals, then the end token."""
        end = np.full((len(target), 1), self.end_id, dtype=np.int64)
        return np.concatenate([self.numeral_ids(target), end], axis=1)
