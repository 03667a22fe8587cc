"""Readers of public raw formats, by the name the command line gives them."""

from collections.abc import Callable
from dataclasses import dataclass

from data_prep import frames_npz, synthetic, telecom_italia, wide_csv
from data_prep.common import PrepareSummary, Progress

__all__ = ["READERS", "PrepareSummary", "Progress", "Reader"]


@dataclass(frozen=True)
class Reader:
    """``prepare(sources, out, **options)``; ``options``: the keywords it takes; ``about``: a line of help."""

    prepare: Callable[..., PrepareSummary]
    options: frozenset[str]
    about: str


_SPLIT = frozenset({"city", "train", "validation", "test"})
_GRID = frozenset({"channel", "cadence", "utc_offset", "row0", "col0", "id_width"})
_SHAPE = frozenset({"start", "height", "width"})

READERS: dict[str, Reader] = {
    "telecom-italia": Reader(
        telecom_italia.prepare, _SPLIT, "day files of the Telecom Italia challenge, Milan, or their folder"
    ),
    "frames-npz": Reader(
        frames_npz.prepare, _SPLIT | _GRID, "npz with 'time' (T,) in local time and channels (T, H, W)"
    ),
    "wide-csv": Reader(wide_csv.prepare, _SPLIT | _GRID | _SHAPE, "CSV without header: a row a frame, a column a cell"),
    "synthetic": Reader(
        synthetic.prepare,
        _SPLIT | _SHAPE | {"channel", "cadence", "utc_offset", "days", "seed"},
        "a generated city; no source files",
    ),
}
