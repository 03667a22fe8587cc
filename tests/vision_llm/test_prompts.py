"""What the policy reads: shared part first, one cell's part last (docs/decisions.md, prompt order)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from stdist.data import DaySpan, GridSpec, GridStore, GridWriter, Region, Split, open_store
from stdist.errors import InputError
from stdist.vision_llm.policy.city_windows import CityWindows, PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.policy.prompts import END, IMAGE, WEEKDAYS, PromptEncoder
from stdist.vision_llm.policy.tokenizer_files import save_full_tokenizer

MONDAY = np.datetime64("2013-11-04T00:00")


def test_shared_part_holds_every_frame_and_the_time(policy: PolicyModel) -> None:
    ids = np.array(policy.prompts.shared(MONDAY + np.timedelta64(14, "h")))
    assert (ids == policy.image_id).sum() == 4 * policy.encoder.geometry.tokens
    numerals = ids[ids >= policy.first_numeral_id] - policy.first_numeral_id
    assert policy.vocabulary.decode(numerals).tolist() == [14.0]
    text = policy.tokenizer.decode([i for i in ids if i < policy.first_numeral_id and i != policy.image_id])
    assert text.count("<|vision_start|><|vision_end|>") == 4
    for word in ("You forecast city traffic", "toy", "internet", "60 minutes", " Monday", "next 3"):
        assert word in text


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>", "<|FP10/0|>"])
@pytest.mark.parametrize("where", ["city", "channel"])
def test_a_name_that_spells_a_token_is_text(policy: PolicyModel, tmp_path: Path, token: str, where: str) -> None:
    """Also to the tokenizer of a checkpoint, which knows the numerals."""
    setting = policy.spec.setting.model_copy(update={where: f"Am {token} See"})
    save_full_tokenizer(policy.tokenizer, policy.vocabulary, tmp_path)
    origin = np.datetime64("2013-11-04T08:00")
    prompts = []
    for tokenizer in (policy.tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        encoder = PromptEncoder(tokenizer, policy.vocabulary, policy.first_numeral_id, setting, 2)
        ids = encoder.shared(origin)
        assert ids.count(encoder.token_id(IMAGE)) == 2 * setting.history and ids.count(encoder.token_id(END)) == 1
        assert f"Am {token} See" in tokenizer.decode(ids)
        prompts.append(ids)
    assert prompts[0] == prompts[1]


def test_a_plain_name_is_encoded_with_the_words_around_it(policy: PolicyModel) -> None:
    """Checkpoints were trained on these very ids."""
    text = "City toy, channel internet, 60 minutes apart. Now:"
    ids = policy.prompts.shared(np.datetime64("2013-11-04T08:00"))
    system = f"<|im_start|>system\nYou forecast city traffic.{END}\n<|im_start|>user\n"
    expected = policy.prompts.text_ids(text)
    assert any(ids[i : i + len(expected)] == expected for i in range(len(ids)))
    blind = PromptEncoder(policy.tokenizer, policy.vocabulary, policy.first_numeral_id, policy.spec.setting, 0)
    together = policy.prompts.text_ids(system + text)
    assert blind.shared(np.datetime64("2013-11-04T08:00"))[: len(together)] == together


def test_every_weekday_and_hour_takes_the_same_number_of_tokens(policy: PolicyModel) -> None:
    """2013-11-04 was a Monday; half hours round to the numeral that two digits allow."""
    lengths = set()
    for day, name in enumerate(WEEKDAYS):
        for hour in range(24):
            ids = policy.prompts.shared(MONDAY + np.timedelta64(day * 24 + hour, "h"))
            text = policy.tokenizer.decode([i for i in ids if i < policy.first_numeral_id])
            assert [other for other in WEEKDAYS if other in text] == [name]
            (numeral,) = [i - policy.first_numeral_id for i in ids if i >= policy.first_numeral_id]
            assert policy.vocabulary.decode(numeral) == hour
            lengths.add(len(ids))
    assert len(lengths) == 1


def test_cell_part_holds_coordinates_then_history(policy: PolicyModel) -> None:
    history = np.array([[0.0, 1.5, 27.0, 310.0], [8.0, 0.0, 0.0, 99.0]])
    ids = policy.prompts.cells(np.array([0, 45]), np.array([12, 3]), history)
    for row, expected in zip(ids, ([0, 12, *history[0]], [45, 3, *history[1]]), strict=True):
        numerals = row[row >= policy.first_numeral_id] - policy.first_numeral_id
        assert policy.vocabulary.decode(numerals).tolist() == expected
    text = policy.tokenizer.decode(ids[0][ids[0] < policy.first_numeral_id])
    assert text.index("row") < text.index("col") < text.index("history") < text.index("assistant")


def test_answers_are_k_numerals_and_the_end(policy: PolicyModel) -> None:
    target = np.array([[1.0, 2.5, 0.0], [310.0, 4.4e4, 12.0]])
    ids = policy.prompts.answers(target)
    assert ids.shape == (2, 4)
    assert (ids[:, -1] == policy.end_id).all()
    assert np.array_equal(policy.vocabulary.decode(ids[:, :-1] - policy.first_numeral_id), target)


def test_a_batch_says_what_the_store_says(policy: PolicyModel, batch: PolicyBatch, store: GridStore) -> None:
    """Windows 0 and 31, cells 1, 10 and 18 of a 5×4 grid: row-major, prompts window by window."""
    values = store.values("internet", 0, 144)
    first, vocabulary = policy.first_numeral_id, policy.vocabulary
    origins = store.windows("train", 4, 3, channel="internet").origins[[0, 31]]
    for w, origin in enumerate(origins):
        assert np.array_equal(batch.grids[w].numpy(), values[origin - 3 : origin + 1])
        shared = batch.shared[w]
        hour = vocabulary.decode(shared[shared >= first].numpy() - first)
        assert hour == store.local_times[origin].astype("datetime64[h]").astype(int) % 24
        for c, cell in enumerate((1, 10, 18)):
            prompt, answer = batch.prompts[3 * w + c], batch.answers[3 * w + c]
            series = values[:, cell // 4, cell % 4]
            read = vocabulary.decode(prompt[prompt >= first].numpy() - first)
            rounded = vocabulary.decode(vocabulary.encode(series))
            assert read.tolist() == [cell // 4, cell % 4, *rounded[origin - 3 : origin + 1]]
            assert vocabulary.decode(answer[:3].numpy() - first).tolist() == rounded[origin + 1 : origin + 4].tolist()
            assert batch.truth[w, c].tolist() == series[origin + 1 : origin + 4].tolist()


def test_values_out_of_range_are_clamped_and_counted_or_refused(policy: PolicyModel, tmp_path: Path) -> None:
    """Two-digit numerals end at 9.9e5; one history value and one target of the only window lie beyond."""
    day = np.datetime64("2013-11-04")
    values = np.full((4, 1, 1), 7.0, np.float32)
    values[1], values[3] = 5e6, 2e6
    ids = {"cell_ids": np.array([[1]]), "rows": np.array([41]), "cols": np.array([7])}
    spec = GridSpec("spiky", ("internet",), day, day, cadence_minutes=360, **ids)
    with GridWriter(tmp_path / "spiky.zarr", spec, {}) as writer:
        writer.write_day(0, {"internet": values})
        writer.finalise(Split(DaySpan(day, day)))
    windows = open_store(tmp_path / "spiky.zarr").windows("train", 2, 2, channel="internet")
    city = CityWindows(policy, windows, clamp=True)
    read = city.batch(np.array([0]), np.array([0]))
    numerals = read.prompts[0][read.prompts[0] >= policy.first_numeral_id] - policy.first_numeral_id
    written = policy.vocabulary.decode(numerals.numpy()).tolist()
    assert written == [41.0, 7.0, 7.0, 990_000.0], "the data's own row and column, then the history"
    assert read.truth[0, 0].tolist() == [7.0, 990_000.0] and read.grids[0, :, 0, 0].tolist() == [7.0, 990_000.0]
    with pytest.raises(InputError, match="has no numeral"):
        CityWindows(policy, windows).batch(np.array([0]), np.array([0]))


def test_cells_are_those_of_the_region(policy: PolicyModel, store: GridStore) -> None:
    """Cell 3 of the region is row 2, column 2 of the grid."""
    windows = store.windows("train", 4, 3, channel="internet", region=Region(1, 4, 1, 3))
    city = CityWindows(policy, windows)
    assert city.cells.tolist() == list(range(6))
    read = city.batch(np.array([2]), np.array([3]))
    numerals = read.prompts[0][read.prompts[0] >= policy.first_numeral_id] - policy.first_numeral_id
    assert policy.vocabulary.decode(numerals.numpy())[:2].tolist() == [2, 2]
    assert torch.equal(read.grids[0, :, 2, 2], torch.from_numpy(windows.read([2]).history[0, :, 2, 2]))
    assert read.truth[0, 0].tolist() == windows.read([2]).target[0, :, 1, 1].tolist()
