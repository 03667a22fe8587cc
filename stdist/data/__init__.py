"""Grid stores: cities' traffic on a grid, opened, written, imputed and cut into windows."""

from stdist.data.schema import GridSpec
from stdist.data.spans import DaySpan, Region, Split
from stdist.data.statistics import Statistics
from stdist.data.store import GridStore, open_store
from stdist.data.windows import WindowBatch, Windows
from stdist.data.writer import GridWriter

__all__ = [
    "DaySpan",
    "GridSpec",
    "GridStore",
    "GridWriter",
    "Region",
    "Split",
    "Statistics",
    "WindowBatch",
    "Windows",
    "open_store",
]
