"""Grid stores: cities' traffic on a grid, opened, written, imputed and cut into windows."""

from stdist.data.parts import Day, Part
from stdist.data.schema import GridSpec, NodeSpec
from stdist.data.spans import DaySpan, NodeRange, Region, Split
from stdist.data.statistics import Statistics
from stdist.data.store import GridStore, open_store
from stdist.data.windows import WindowBatch, Windows
from stdist.data.writer import GridWriter

__all__ = [
    "Day",
    "DaySpan",
    "GridSpec",
    "GridStore",
    "GridWriter",
    "NodeRange",
    "NodeSpec",
    "Part",
    "Region",
    "Split",
    "Statistics",
    "WindowBatch",
    "Windows",
    "open_store",
]
