"""The tasks that align a language model with the numerals: transcription, then vector arithmetic.

Vision-LLMs for Spatiotemporal Traffic Forecasting, Section IV.B.2, stages 1 and 2. A prompt or an answer is a
tuple of pieces: text, or an int64 array of numeral indices. Vectors of n values are written in one way only::

    numerals   the indices, side by side, nothing between them
    text       '114.000000,-82.100000'      one pair of quotes, commas, no spaces

A batch is a pure function of (seed, step): example number e = step · batch_size + i reads its values from a
random permutation of the *whole* vocabulary, aliases included, then from the next permutation.
Every way of reading (stage 1: numerals, text; stage 2: numeral operands, text operands) has a walk of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from stdist.errors import InputError
from stdist.numerals.codec import MAX_EXPONENT, MIN_EXPONENT, MIN_MANTISSA
from stdist.numerals.vocabulary import Indices, Vocabulary, decimal_parts, decimal_value

Piece = str | Indices
Direction = Literal["to_numeral", "to_text"]

_OPERATIONS = ("add", "subtract", "multiply")
_FORMATS = ("numeral->text", "text->numeral", "numeral->numeral")
ARITHMETIC_TASKS = tuple(f"{operation}:{form}" for operation in _OPERATIONS for form in _FORMATS)

_INSTRUCTION = {
    "add": "Add the two vectors",
    "subtract": "Subtract the second vector from the first",
    "multiply": "Multiply the two vectors element by element",
}
_SIGN = {"add": " + ", "subtract": " - ", "multiply": " ⊙ "}
_ANSWER_IN = {"numeral": " and answer in numerical tokens: ", "text": " and answer in string values: "}
_ARROW = " → "
# Sums of numbers many decades apart only repeat the larger one; partners stay within this many exponents.
_PARTNER_SPREAD = 2
# Random streams of a seed: the four walks, and the partners.
_TRANSCRIPTION_STREAMS: dict[Direction, int] = {"to_numeral": 0, "to_text": 1}
_OPERAND_STREAMS = {"numeral": 2, "text": 3}
_PARTNER_STREAM = 4


@dataclass(frozen=True, eq=False)
class Example:
    """One prompt with its only right answer; ``task``, as ``add:numeral->text``, groups examples."""

    task: str
    prompt: tuple[Piece, ...]
    answer: tuple[Piece, ...]


def transcription(vocabulary: Vocabulary, indices: npt.NDArray[np.integer], direction: Direction) -> list[Example]:
    """Stage 1: the same n values as text and as numerals; ``indices`` is [examples, n].

    ``to_text`` reads any numeral; ``to_numeral`` answers with the canonical one (1.14 is 114/0, not 1140/0).
    """
    indices = np.asarray(indices, np.int64)
    lists = _quoted(vocabulary, indices)
    if direction == "to_text":
        return [
            Example(
                direction,
                ("Transcribe the following numerical tokens to string numerical values: ", row, _ARROW),
                (text,),
            )
            for row, text in zip(indices, lists, strict=True)
        ]
    instruction = "Convert the following string-represented numerical values to numerical tokens: "
    canonical = vocabulary.encode(vocabulary.decode(indices))
    return [
        Example(direction, (instruction + text + _ARROW,), (row,)) for row, text in zip(canonical, lists, strict=True)
    ]


def transcription_batch(
    vocabulary: Vocabulary, seed: int, step: int, batch_size: int, values_per_example: int
) -> list[Example]:
    """Stage 1 batch: directions alternate, and every one has a walk of its own."""
    number = _example_numbers(seed, step, batch_size, values_per_example)
    turn, which = np.divmod(number, len(_TRANSCRIPTION_STREAMS))
    batch = np.empty(batch_size, object)
    for position, (direction, stream) in enumerate(_TRANSCRIPTION_STREAMS.items()):
        places = which == position
        indices = _walk(len(vocabulary), seed, stream, turn[places], values_per_example)
        batch[places] = transcription(vocabulary, indices, direction)
    return batch.tolist()


def arithmetic(
    vocabulary: Vocabulary, task: str, left: npt.NDArray[np.integer], right: npt.NDArray[np.integer]
) -> list[Example]:
    """Stage 2: ``task`` (one of ARITHMETIC_TASKS) on operand indices [examples, n]; answers are canonical.

    Results are exact decimals, rounded once by the codec. Raises InputError where one is out of range.
    """
    if task not in ARITHMETIC_TASKS:
        raise InputError(f"no arithmetic task {task!r}; tasks are {', '.join(ARITHMETIC_TASKS)}")
    operation, reads, writes = _parts(task)
    left, right = np.asarray(left, np.int64), np.asarray(right, np.int64)
    result = vocabulary.encode(_result(vocabulary, operation, left, right))
    instruction = _INSTRUCTION[operation] + _ANSWER_IN[writes]
    answers: Sequence[Piece] = _quoted(vocabulary, result) if writes == "text" else list(result)
    if reads == "numeral":
        prompts: list[tuple[Piece, ...]] = [
            (instruction, a, _SIGN[operation], b, _ARROW) for a, b in zip(left, right, strict=True)
        ]
    else:
        texts = zip(_quoted(vocabulary, left), _quoted(vocabulary, right), strict=True)
        prompts = [(f"{instruction}{a}{_SIGN[operation]}{b}{_ARROW}",) for a, b in texts]
    return [Example(task, prompt, (answer,)) for prompt, answer in zip(prompts, answers, strict=True)]


def arithmetic_batch(
    vocabulary: Vocabulary, seed: int, step: int, batch_size: int, values_per_example: int
) -> list[Example]:
    """Stage 2 batch: cycles through the nine tasks; numeral and text operands each walk the vocabulary.

    One operand comes from the walk, on either side in turn; the other is drawn to keep the result in range.
    """
    number = _example_numbers(seed, step, batch_size, values_per_example)
    cycle, which = np.divmod(number, len(ARITHMETIC_TASKS))
    rng = np.random.default_rng([seed, _PARTNER_STREAM, step])
    batch = np.empty(batch_size, object)
    for position, task in enumerate(ARITHMETIC_TASKS):
        places = which == position
        operation, reads, _ = _parts(task)
        readers = [t for t in ARITHMETIC_TASKS if f":{reads}->" in t]
        turn = cycle[places] * len(readers) + readers.index(task)
        walked = _walk(len(vocabulary), seed, _OPERAND_STREAMS[reads], turn, values_per_example)
        partner = _partner(vocabulary, operation, walked, rng)
        swap = (turn % 2 == 1)[:, None]
        left, right = np.where(swap, partner, walked), np.where(swap, walked, partner)
        batch[places] = arithmetic(vocabulary, task, left, right)
    return batch.tolist()


def relative_error(predicted: npt.ArrayLike, true: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """|predicted - true| / max(|true|, 1e-4), element by element: how far off a wrong answer is."""
    truth = np.asarray(true, np.float64)
    return np.abs(np.asarray(predicted, np.float64) - truth) / np.maximum(np.abs(truth), 1e-4)


def _result(
    vocabulary: Vocabulary, operation: str, left: npt.NDArray[np.integer], right: npt.NDArray[np.integer]
) -> npt.NDArray[np.float64]:
    """The float64 nearest to the exact decimal result; integer arithmetic throughout."""
    a, power_a = decimal_parts(*vocabulary.mantissa_exponent(left))
    b, power_b = decimal_parts(*vocabulary.mantissa_exponent(right))
    if operation == "multiply":
        return decimal_value(a * b, power_a + power_b)
    # In units of the finest numeral every operand is a whole number below 10^13.
    finest = MIN_EXPONENT - (vocabulary.mantissa_digits - 1)
    a, b = a * 10 ** (power_a - finest), b * 10 ** (power_b - finest)
    total = a + b if operation == "add" else a - b
    return decimal_value(total, np.full_like(total, finest))


def _partner(vocabulary: Vocabulary, operation: str, walked: Indices, rng: np.random.Generator) -> Indices:
    """A random second operand for each walked one, such that the result has a numeral."""
    mantissa, exponent = vocabulary.mantissa_exponent(walked)
    if operation == "multiply":
        # Norm is below 10 on both sides: exponents that add up to at most 4 keep the product below 10^6.
        lowest = np.maximum(MIN_EXPONENT, MIN_EXPONENT - exponent)
        highest = np.minimum(MAX_EXPONENT, MAX_EXPONENT - 1 - exponent)
    else:
        lowest = np.maximum(MIN_EXPONENT, exponent - _PARTNER_SPREAD)
        highest = np.minimum(MAX_EXPONENT, exponent + _PARTNER_SPREAD)
    size = rng.integers(MIN_MANTISSA, 10**vocabulary.mantissa_digits, walked.shape)
    sign = rng.choice([-1, 1], walked.shape)
    partner = vocabulary.indices(sign * size, rng.integers(lowest, highest + 1))
    if operation == "multiply":
        return partner
    # A sum too large becomes a difference, which never is.
    outside = np.abs(_result(vocabulary, operation, walked, partner)) >= vocabulary.limit
    mantissa, exponent = vocabulary.mantissa_exponent(partner)
    return np.where(outside, vocabulary.indices(-mantissa, exponent), partner)


def _walk(length: int, seed: int, stream: int, turn: npt.NDArray[np.integer], values: int) -> Indices:
    """Indices [len(turn), values]: turn t reads places t·values … of the stream's endless permutations."""
    place = turn[:, None] * values + np.arange(values)
    epoch, offset = np.divmod(place, length)
    walked = np.empty(place.shape, np.int64)
    for number in np.unique(epoch).tolist():
        inside = epoch == number
        walked[inside] = _permutation(length, seed, stream, number)[offset[inside]]
    return walked


@lru_cache(maxsize=8)
def _permutation(length: int, seed: int, stream: int, epoch: int) -> Indices:
    return np.random.default_rng([seed, stream, epoch]).permutation(length)


def _example_numbers(seed: int, step: int, batch_size: int, values_per_example: int) -> npt.NDArray[np.int64]:
    for name, value, least in (
        ("seed", seed, 0),
        ("step", step, 0),
        ("batch_size", batch_size, 1),
        ("values_per_example", values_per_example, 1),
    ):
        if value < least:
            raise InputError(f"{name} is {value}; it must be at least {least}")
    return np.arange(step * batch_size, (step + 1) * batch_size)


def _parts(task: str) -> tuple[str, str, str]:
    """Operation, format of the operands, format of the answer."""
    operation, form = task.split(":")
    reads, writes = form.split("->")
    return operation, reads, writes


def _quoted(vocabulary: Vocabulary, indices: npt.NDArray[np.integer]) -> list[str]:
    """One quoted, comma-separated list for each row of [rows, n]."""
    texts = vocabulary.texts(indices)
    n = indices.shape[1]
    return [f"'{','.join(texts[i : i + n])}'" for i in range(0, len(texts), n)]
