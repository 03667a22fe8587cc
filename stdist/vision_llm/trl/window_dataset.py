"""Windows × cells as a data set of TRL's: prompts with frames, true answers, and what their reward needs."""

import uuid
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from trl.data_utils import prepare_multimodal_messages

from stdist.data import Windows
from stdist.errors import InputError
from stdist.vision_llm.policy.city_windows import CityWindows, PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.policy.prompts import END
from stdist.vision_llm.stages.reward import normalizers
from stdist.vision_llm.trl.processor import PolicyProcessor


def window_dataset(
    policy: PolicyModel, windows: Windows, cell_mean: np.ndarray, cells: np.ndarray | None = None
) -> Dataset:
    """Every window's ``cells``, all if None, cell by cell, read from the store when they are asked for.

    Columns: ``prompt`` and ``completion``, messages whose numerals are text; ``images``, the S frames, float32
    ``[H, W]`` in units, of a policy that sees them; ``truth``, K values in units; ``normalizer``, d of Eq. 19, the
    cell's mean; ``blank``, see :class:`AnswerCollator`. Raises InputError for a name of a city or channel that TRL
    cannot be told in text.

    Args:
        cell_mean: ``[H·W of the region]`` mean of each cell over the training span, in units.
        cells: numbers of cells in the windows' region, row by row.
    """
    city = CityWindows(policy, windows)
    chosen = city.cells if cells is None else cells

    def batch(number: int) -> PolicyBatch:
        return city.batch(np.array([number]), chosen)

    def normalizer(batch: PolicyBatch) -> Tensor:
        truth = torch.from_numpy(batch.truth).flatten(0, 1).float()
        mean = torch.from_numpy(cell_mean[batch.cells]).float()
        return normalizers("cell_mean", truth, mean, float(cell_mean[city.cells].mean()))

    return rows_of(policy, batch, range(len(windows)), normalizer)


def rows_of(
    policy: PolicyModel,
    batch_of: Callable[[int], PolicyBatch],
    numbers: range,
    normalizer: Callable[[PolicyBatch], Tensor] | None = None,
    blanks: Callable[[int, PolicyBatch], np.ndarray] | None = None,
) -> Dataset:
    """The sequences of the batches ``numbers``, all of one shape, in their order; see :func:`window_dataset`."""
    rows = _Rows(policy, batch_of, normalizer, blanks)
    each = len(batch_of(numbers[0]).prompts)
    keys = [(number, sequence) for number in numbers for sequence in range(each)]
    return Dataset.from_dict({"batch": [n for n, _ in keys], "sequence": [i for _, i in keys]}).with_transform(rows)


class _Rows:
    """Rows by their batch and their sequence in it."""

    def __init__(
        self,
        policy: PolicyModel,
        batch_of: Callable[[int], PolicyBatch],
        normalizer: Callable[[PolicyBatch], Tensor] | None,
        blanks: Callable[[int, PolicyBatch], np.ndarray] | None,
    ):
        self._processor, self._sees = PolicyProcessor(policy), policy.encoder is not None
        self._normalizer, self._blanks, self._name = normalizer, blanks, uuid.uuid4().hex

        @lru_cache(maxsize=1)  # rows are asked for in their order
        def columns(number: int) -> dict[str, list[Any]]:
            return self._columns(number, batch_of(number))

        self._of_batch = columns

    def __call__(self, keys: dict[str, list[int]]) -> dict[str, list[Any]]:
        rows = [
            {name: column[i] for name, column in self._of_batch(number).items()}
            for number, i in zip(keys["batch"], keys["sequence"], strict=True)
        ]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        # datasets tells what is made of a data set apart by the pickle of its transform, here a policy's weights.
        return str, (self._name,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Rows":
        return self

    def _columns(self, number: int, batch: PolicyBatch) -> dict[str, list[Any]]:
        per_window = len(batch.prompts) // len(batch.shared)
        shared = batch.shared.repeat_interleave(per_window, 0).cpu()
        ids = torch.cat([shared, batch.prompts.cpu()], dim=1).tolist()
        columns = {
            "prompt": [self._messages(row) for row in ids],
            "completion": [
                [{"role": "assistant", "content": self._processor.decode(row[:-1])}] for row in batch.answers.tolist()
            ],
            "truth": batch.truth.reshape(len(ids), -1).tolist(),
        }
        if self._sees:
            columns["images"] = [list(grids) for grids in batch.grids.cpu().numpy() for _ in range(per_window)]
        if self._normalizer:
            columns["normalizer"] = self._normalizer(batch).tolist()
        columns["blank"] = (self._blanks(number, batch) if self._blanks else np.zeros(len(ids), bool)).tolist()
        return columns

    def _messages(self, ids: list[int]) -> list[dict[str, str]]:
        """A prompt's messages; its frames go into the first one of the user's, in front of the text."""
        text = self._processor.decode(ids)
        if self._processor.encode(text) != ids:
            raise InputError(
                "the name of the city or channel spells a token of the policy's; TRL reads text: rename it"
            )
        system, user = text.removeprefix("<|im_start|>system\n").split(f"{END}\n<|im_start|>user\n")
        user = user.removesuffix(f"{END}\n<|im_start|>assistant\n").rpartition("<|vision_end|>")[2]
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]


class AnswerCollator:
    """Rows of :func:`window_dataset` as a batch of ``SFTTrainer``: losses on K numerals and the end token alone
    (Eq. 16). A row that is ``blank`` reads blanks in place of its previous values, ``sft.blank_share``."""

    def __init__(self, policy: PolicyModel):
        self._processor, self._end, self._blank = PolicyProcessor(policy), policy.end_id, policy.blank_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = [prepare_multimodal_messages(row["prompt"], images=row.get("images")) for row in rows]
        read = self._processor.apply_chat_template(prompts, tokenize=True)
        answers = torch.tensor([[*self._processor.encode(row["completion"][0]["content"]), self._end] for row in rows])
        prompt = torch.tensor(read["input_ids"])
        previous = answers.clone()
        previous[torch.tensor([row["blank"] for row in rows])] = self._blank
        ids = torch.cat([prompt, previous], dim=1)
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.cat([torch.full_like(prompt, -100), answers], dim=1),
        }
        if "pixel_values" in read:
            kinds = torch.tensor(read["mm_token_type_ids"])
            batch |= {key: read[key] for key in ("pixel_values", "image_grid_thw")}
            batch["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(answers)], dim=1)
        return batch
