"""Numerals: numbers as single tokens, their codec, and the tasks that align a language model with them."""

from stdist.numerals.alignment_tasks import (
    ARITHMETIC_TASKS,
    Example,
    Piece,
    arithmetic,
    arithmetic_batch,
    relative_error,
    transcription,
    transcription_batch,
)
from stdist.numerals.vocabulary import Vocabulary

__all__ = [
    "ARITHMETIC_TASKS",
    "Example",
    "Piece",
    "Vocabulary",
    "arithmetic",
    "arithmetic_batch",
    "relative_error",
    "transcription",
    "transcription_batch",
]
