"""Readers of public raw formats, by the name the command line gives them."""

from collections.abc import Callable
from dataclasses import dataclass

from data_prep import frames_npz, synthetic, telecom_italia, wide_csv
from data_prep.common import PrepareSummary

__all__ = ["READERS", "PrepareSummary", "Reader"]


@dataclass(frozen=True)
class Reader:
    """``prepare(sources, out, **options)``; ``options``: the keywords that the command line may give."""

    prepare: Callable[..., PrepareSummary]
    options: frozenset[str]


_SPLIT = frozenset({"city", "train", "validation", "test"})
_GRID = frozenset({"channel", "cadence", "utc_offset", "row0", "col0", "id_width"})
_SHAPE = frozenset({"start", "height", "width"})

READERS: dict[str, Reader] = {
    "telecom-italia": Reader(telecom_italia.prepare, _SPLIT),
    "frames-npz": Reader(frames_npz.prepare, _SPLIT | _GRID),
    "wide-csv": Reader(wide_csv.prepare, _SPLIT | _GRID | _SHAPE),
    "synthetic": Reader(synthetic.prepare, _SPLIT | _SHAPE | {"channel", "cadence", "utc_offset", "days", "seed"}),
}
