"""What a reader makes of its sources before any value is read: a plan of independent parts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stdist.data.parts import Day, Part
from stdist.data.schema import GridSpec, NodeSpec
from stdist.data.spans import Split

__all__ = ["Day", "Part", "Plan"]


@dataclass(frozen=True, eq=False)
class Plan:
    """A preparation. Picklable.

    recipe: what made the store, JSON. sources: raw files (or folders that are one data set), whose names,
    sizes and digests the store keeps. split: the store's default split; where None,
    ``stdist.data.spans.default_split`` of the days that hold data. read: yields the days of one part; a
    top-level function, a ``functools.partial`` of one, or a method of a picklable object.
    """

    spec: GridSpec | NodeSpec
    recipe: dict[str, Any]
    sources: list[Path]
    split: Split | None
    parts: list[Part]
    read: Callable[[Part], Iterator[Day]]
