"""Readers of public raw formats, by the name the command line gives them."""

from collections.abc import Callable
from dataclasses import dataclass

from data_prep import wide_csv
from data_prep.common import PrepareSummary

SPLIT = frozenset({"train", "validation", "test"})
GRID = frozenset({"channel", "utc_offset", "row0", "col0", "id_width"})


@dataclass(frozen=True)
class Reader:
    """``prepare(sources, out, **options)``; ``options``: the keywords it takes; ``about``: one line for help."""

    prepare: Callable[..., PrepareSummary]
    options: frozenset[str]
    about: str


READERS: dict[str, Reader] = {
    "wide-csv": Reader(
        wide_csv.prepare,
        SPLIT | GRID | {"city", "start", "cadence", "height", "width"},
        "CSV without header: a row per frame, a column per cell",
    ),
}
