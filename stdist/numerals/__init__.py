"""Numerals: numbers as single tokens, their codec, and the tasks that align a language model with them."""

from stdist.numerals.vocabulary import Vocabulary, parse_text

__all__ = ["Vocabulary", "parse_text"]
