"""Alignment tasks (Vision-LLMs for Spatiotemporal Traffic Forecasting, Section IV.B.2, stages 1 and 2)."""

import operator
from collections import Counter
from collections.abc import Callable
from decimal import Decimal

import numpy as np
import pytest

from stdist.errors import InputError
from stdist.numerals import (
    ARITHMETIC_TASKS,
    Example,
    Vocabulary,
    arithmetic,
    arithmetic_batch,
    relative_error,
    transcription,
    transcription_batch,
)

PAPER = Vocabulary()
SMALL = Vocabulary(2)
OPERATORS = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul}


def ids(*tokens: str) -> np.ndarray:
    mantissas, exponents = np.array([token.split("/") for token in tokens], np.int64).T
    return PAPER.indices(mantissas, exponents)


def quoted(text: str) -> list[str]:
    return text.split("'")[1].split(",")


def same(a: Example, b: Example) -> bool:
    pieces = zip(a.prompt + a.answer, b.prompt + b.answer, strict=True)
    return a.task == b.task and all(np.array_equal(x, y) for x, y in pieces)


def operands(example: Example, vocabulary: Vocabulary) -> tuple[list[str], list[str]]:
    """Both operand vectors as texts, read from the prompt."""
    if len(example.prompt) == 1:
        _, left, _, right, _ = str(example.prompt[0]).split("'")
        return left.split(","), right.split(",")
    _, a, _, b, _ = example.prompt
    return vocabulary.texts(a), vocabulary.texts(b)


def test_transcription_by_hand() -> None:
    """The paper's two examples, two values at once; an alias is read, never answered."""
    indices = np.stack([ids("-821/1", "1140/2")])
    (to_numeral,) = transcription(PAPER, indices, "to_numeral")
    (prompt,) = to_numeral.prompt
    assert prompt == (
        "Convert the following string-represented numerical values to numerical tokens: '-82.100000,114.000000' → "
    )
    (answer,) = to_numeral.answer
    np.testing.assert_array_equal(answer, ids("-821/1", "114/2"))

    (to_text,) = transcription(PAPER, indices, "to_text")
    before, numerals, after = to_text.prompt
    assert (before, after) == (
        "Transcribe the following numerical tokens to string numerical values: ",
        " → ",
    )
    np.testing.assert_array_equal(numerals, indices[0])
    assert to_text.answer == ("'-82.100000,114.000000'",)


@pytest.mark.parametrize(("vocabulary", "batch_size"), [(SMALL, 10), (PAPER, 2000)])
def test_transcription_covers_the_vocabulary_once_per_epoch(vocabulary: Vocabulary, batch_size: int) -> None:
    n = 7
    per_step = batch_size // 2 * n  # values of each direction
    steps = -(-len(vocabulary) // per_step)
    read: list[int] = []
    written: list[str] = []
    for step in range(steps):
        batch = transcription_batch(vocabulary, 3, step, batch_size, n)
        assert [example.task for example in batch] == ["to_numeral", "to_text"] * (batch_size // 2)
        read += [i for example in batch[1::2] for i in np.asarray(example.prompt[1]).tolist()]
        written += [text for example in batch[::2] for text in quoted(str(example.prompt[0]))]
    epoch = len(vocabulary)
    assert sorted(read[:epoch]) == list(range(epoch))
    assert sorted(written[:epoch]) == sorted(vocabulary.texts(np.arange(epoch)))
    assert read[:epoch] != sorted(read[:epoch])
    # what is left over belongs to the next permutation
    assert len(set(read[epoch:])) == len(read[epoch:])


def test_transcription_answers_agree_with_prompts() -> None:
    for example in transcription_batch(PAPER, 0, 5, 64, 4):
        if example.task == "to_text":
            assert quoted(str(example.answer[0])) == PAPER.texts(example.prompt[1])
        else:
            (answer,) = example.answer
            np.testing.assert_array_equal(PAPER.encode(PAPER.decode(answer)), answer)
            assert PAPER.texts(answer) == quoted(str(example.prompt[0]))


@pytest.mark.parametrize(
    ("task", "left", "right", "result"),
    [
        ("add:numeral->numeral", "114/0", "-821/1", "-8096/1"),  # 1.14 - 82.1 = -80.96
        ("subtract:numeral->numeral", "10/0", "10/0", "0/0"),
        ("multiply:numeral->numeral", "1500/0", "67/-2", "1005/-1"),  # 1.5 · 0.067 = 0.1005
        ("multiply:numeral->numeral", "9999/2", "9999/2", "9998/5"),  # 999800.01
        ("multiply:numeral->numeral", "10/-4", "50/-1", "10/-4"),  # 5e-5, up to the smallest
        ("multiply:numeral->numeral", "10/-4", "49/-1", "0/0"),
        ("add:numeral->numeral", "10/0", "5500/-3", "1006/0"),  # 1.0055, a decimal half
        ("add:numeral->numeral", "9999/5", "10/-4", "9999/5"),
    ],
)
def test_arithmetic_by_hand(task: str, left: str, right: str, result: str) -> None:
    (example,) = arithmetic(PAPER, task, ids(left)[None], ids(right)[None])
    (answer,) = example.answer
    assert PAPER.tokens()[int(np.asarray(answer)[0])] == f"<|FP{result}|>"


def test_arithmetic_prompts_by_hand() -> None:
    left, right = np.stack([ids("114/0", "20/0")]), np.stack([ids("10/0", "30/0")])
    (read_text,) = arithmetic(PAPER, "multiply:text->numeral", left, right)
    assert read_text.prompt == (
        "Multiply the two vectors element by element and answer in numerical tokens: "
        "'1.140000,2.000000' ⊙ '1.000000,3.000000' → ",
    )
    np.testing.assert_array_equal(read_text.answer[0], ids("114/0", "60/0"))
    (write_text,) = arithmetic(PAPER, "subtract:numeral->text", left, right)
    assert write_text.prompt[::2] == (
        "Subtract the second vector from the first and answer in string values: ",
        " - ",
        " → ",
    )
    np.testing.assert_array_equal(write_text.prompt[1], left[0])
    np.testing.assert_array_equal(write_text.prompt[3], right[0])
    assert write_text.answer == ("'0.140000,-1.000000'",)


@pytest.mark.parametrize("digits", [2, 3, 4])
def test_arithmetic_answers_equal_decimal_arithmetic(digits: int, reference: Callable[[float, int], str]) -> None:
    vocabulary = Vocabulary(digits)
    index = {token: i for i, token in enumerate(vocabulary.tokens())}
    tasks: Counter[str] = Counter()
    zeros = 0
    for step in range(4):
        for example in arithmetic_batch(vocabulary, 11, step, 450, 4):
            tasks[example.task] += 1
            operation, _, writes = example.task.replace(":", " ").replace("->", " ").split()
            compute = OPERATORS[operation]
            exact = [compute(Decimal(a), Decimal(b)) for a, b in zip(*operands(example, vocabulary), strict=True)]
            expected = [index[reference(float(value), digits)] for value in exact]
            (answer,) = example.answer
            if writes == "text":
                assert quoted(str(answer)) == vocabulary.texts(expected)
            else:
                np.testing.assert_array_equal(answer, expected)
            zeros += expected.count(0)
    assert set(tasks) == set(ARITHMETIC_TASKS) and set(tasks.values()) == {200}
    assert zeros < 0.02 * 4 * 450 * 4, "products that vanish teach nothing"


def test_exact_decimal_results_are_rounded_once() -> None:
    """Sums whose exact decimal is half-way go to even whatever side the float64 of the sum lies on."""
    m = np.arange(1000, 2000)
    left = PAPER.indices(m, 0)[None]
    right = PAPER.indices(np.full_like(m, 50), -4)[None]  # + 0.0005
    (example,) = arithmetic(PAPER, "add:numeral->numeral", left, right)
    even = (m + m % 2) * 10**-3
    np.testing.assert_allclose(PAPER.decode(example.answer[0]), even, rtol=1e-12)


def test_arithmetic_reads_the_whole_vocabulary() -> None:
    """Operands in numerals and operands in text each cover the 2-digit vocabulary in one epoch."""
    n = 4
    examples = [e for step in range(-(-len(SMALL) // (n * 3))) for e in arithmetic_batch(SMALL, 5, step, 9, n)]
    for reads, per_cycle in (("numeral", 6), ("text", 3)):
        needed = -(-len(SMALL) // n)
        chosen = [e for e in examples if f":{reads}->" in e.task][:needed]
        assert len(chosen) == needed and len(examples) // 9 * per_cycle >= needed
        sides = [operands(e, SMALL) for e in chosen]
        walked = [text for turn, pair in enumerate(sides) for text in pair[turn % 2]]
        assert sorted(walked[: len(SMALL)]) == sorted(SMALL.texts(np.arange(len(SMALL))))


@pytest.mark.parametrize("make", [transcription_batch, arithmetic_batch])
def test_batches_depend_on_seed_and_step_alone(make: Callable[..., list[Example]]) -> None:
    first = make(PAPER, 1, 40, 32, 3)
    make(PAPER, 9, 2, 16, 5)
    again = make(PAPER, 1, 40, 32, 3)
    assert len(first) == 32 and all(same(a, b) for a, b in zip(first, again, strict=True))
    other_step, other_seed = make(PAPER, 1, 41, 32, 3), make(PAPER, 2, 40, 32, 3)
    assert not any(same(a, b) for a, b in zip(first, other_step, strict=True))
    assert not any(same(a, b) for a, b in zip(first, other_seed, strict=True))


def test_odd_batches_continue_the_cycle() -> None:
    tasks = [e.task for step in range(9) for e in arithmetic_batch(SMALL, 0, step, 5, 1)]
    assert tasks == list(ARITHMETIC_TASKS) * 5
    directions = [e.task for step in range(4) for e in transcription_batch(SMALL, 0, step, 3, 1)]
    assert directions == ["to_numeral", "to_text"] * 6
    assert len(arithmetic_batch(SMALL, 0, 0, 1, 1)) == 1


def test_bad_requests_are_named() -> None:
    with pytest.raises(InputError, match="values_per_example is 0"):
        transcription_batch(SMALL, 0, 0, 4, 0)
    with pytest.raises(InputError, match="seed is -1"):
        arithmetic_batch(SMALL, -1, 0, 4, 1)
    with pytest.raises(InputError, match="divide"):
        arithmetic(SMALL, "divide:text->text", np.array([[1]]), np.array([[1]]))
    with pytest.raises(InputError, match="no numeral"):
        arithmetic(PAPER, "add:numeral->text", ids("9999/5")[None], ids("9999/5")[None])


def test_relative_error_by_hand() -> None:
    np.testing.assert_allclose(relative_error([110.0, 0.0, 5e-5, -1.0], [100.0, 0.0, 0.0, 1.0]), [0.1, 0, 0.5, 2])


def test_answers_in_text_parse() -> None:
    for example in arithmetic_batch(PAPER, 0, 0, 45, 4):
        if example.task.endswith("->text"):
            values = [float(text) for text in quoted(str(example.answer[0]))]
            assert PAPER.texts(PAPER.encode(values)) == quoted(str(example.answer[0]))
