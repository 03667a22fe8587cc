"""A checkpoint's tokenizer is transformers' own, byte for byte, and is read without its numerals."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stdist.numerals import Vocabulary
from stdist.vision_llm.policy import tokenizer_files
from stdist.vision_llm.policy.presets import build_tokenizer
from stdist.vision_llm.policy.tokenizer_files import load_text_tokenizer, save_full_tokenizer

TWO = Vocabulary(mantissa_digits=2)
TEXT = "City milan, channel internet. Now: Monday, hour 07<|im_end|>\nrow 4 col 17"


def full_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(TWO.tokens())
    return tokenizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_full_tokenizer(build_tokenizer(), TWO, tmp_path / "ours")
    return tmp_path / "ours"


def test_the_files_are_those_that_transformers_writes(saved: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    full_tokenizer().save_pretrained(theirs)
    names = sorted(file.name for file in theirs.iterdir())
    assert names == sorted(file.name for file in saved.iterdir()) and "tokenizer.json" in names
    for name in names:
        assert (saved / name).read_bytes() == (theirs / name).read_bytes(), name


def test_transformers_opens_it_with_every_numeral(saved: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved)
    first = len(build_tokenizer())
    assert tokenizer.convert_tokens_to_ids(TWO.tokens()) == list(range(first, first + len(TWO)))
    ids = tokenizer(f"{TEXT}{TWO.token(5)}{TWO.token(1800)}")["input_ids"]
    assert ids == [*build_tokenizer()(TEXT)["input_ids"], first + 5, first + 1800]


def test_stdist_reads_the_text_alone_and_saves_the_same_again(saved: Path, tmp_path: Path) -> None:
    tokenizer = load_text_tokenizer(saved, TWO)
    assert len(tokenizer) == len(build_tokenizer()) and tokenizer.name_or_path == str(saved)
    assert tokenizer(TEXT)["input_ids"] == build_tokenizer()(TEXT)["input_ids"]
    save_full_tokenizer(tokenizer, TWO, tmp_path / "again")
    text = (tmp_path / "again" / "tokenizer.json").read_text()
    assert json.loads(text) == json.loads((saved / "tokenizer.json").read_text())


def test_numerals_that_others_follow_are_read_and_stay(tmp_path: Path) -> None:
    """As where a user added tokens of their own behind them: ids are what they are in the files."""
    tokenizer = full_tokenizer()
    tokenizer.add_tokens(["<|behind|>"])
    tokenizer.save_pretrained(tmp_path)
    loaded = load_text_tokenizer(tmp_path, TWO)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    save_full_tokenizer(loaded, TWO, tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").get_vocab() == tokenizer.get_vocab()


def test_no_object_is_made_of_a_numeral(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What took half a minute at four digits; a time would say it less surely."""
    sizes = []
    kind = type(build_tokenizer())
    add = kind.add_tokens
    monkeypatch.setattr(
        kind, "add_tokens", lambda self, tokens, *a, **k: sizes.append(len(tokens)) or add(self, tokens)
    )
    read = AutoTokenizer.from_pretrained

    def counted(path: Path, **options: object) -> PreTrainedTokenizerBase:
        tokenizer = read(path, **options)
        sizes.append(len(tokenizer))
        return tokenizer

    monkeypatch.setattr(tokenizer_files.AutoTokenizer, "from_pretrained", counted)
    save_full_tokenizer(build_tokenizer(), TWO, tmp_path)
    load_text_tokenizer(tmp_path, TWO)
    assert max(sizes) == len(build_tokenizer())
