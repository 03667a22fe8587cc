"""Calendar spans and grid regions: the two ways a user says which part of a store is meant."""

import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np

from stdist.dates import parse_day
from stdist.errors import InputError

MILAN_FIRST_DAY = np.datetime64("2013-11-01", "D")
MILAN_LAST_DAY = np.datetime64("2014-01-01", "D")


@dataclass(frozen=True)
class DaySpan:
    """Local calendar days ``first_day`` … ``last_day``, both inside the span; of these, where ``steps`` is given, only
    as many time steps, from the first day's midnight on: the rest of the last day is outside."""

    first_day: np.datetime64
    last_day: np.datetime64
    steps: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "first_day", parse_day(self.first_day))
        object.__setattr__(self, "last_day", parse_day(self.last_day))
        if self.last_day < self.first_day:
            raise InputError(f"span {self} ends before it starts; write the earlier day first")

    @classmethod
    def parse(cls, value: "DaySpan | str | Sequence[Any]") -> "DaySpan":
        """Reads ``["2013-11-01", "2013-11-20"]`` or ``"2013-11-01:2013-11-20"``."""
        if isinstance(value, DaySpan):
            return value
        parts = value.split(":") if isinstance(value, str) else list(value)
        if len(parts) != 2:
            raise InputError(f"span {value!r} needs two days; write it as 2013-11-01:2013-11-20")
        return cls(parse_day(parts[0]), parse_day(parts[1]))

    def __contains__(self, day: np.datetime64) -> bool:
        return bool(self.first_day <= day <= self.last_day)

    def __len__(self) -> int:
        return int((self.last_day - self.first_day).astype(int)) + 1

    def __str__(self) -> str:
        part = f" (its first {self.steps} time steps)" if self.steps is not None else ""
        return f"{self.first_day}:{self.last_day}{part}"


@dataclass(frozen=True)
class Split:
    """Training, validation and test spans; a store with few days may lack the last two."""

    train: DaySpan | None
    validation: DaySpan | None = None
    test: DaySpan | None = None

    def __post_init__(self) -> None:
        named = [(f.name, getattr(self, f.name)) for f in fields(self)]
        spans = [(name, span) for name, span in named if span is not None]
        for i, (name, span) in enumerate(spans):
            for other_name, other in spans[i + 1 :]:
                if span.first_day <= other.last_day and other.first_day <= span.last_day:
                    raise InputError(f"{name} {span} and {other_name} {other} share days; make them disjoint")

    @classmethod
    def parse(cls, train: Any = None, validation: Any = None, test: Any = None) -> "Split":
        """Reads three spans as ``DaySpan.parse`` does; None where there is none."""
        return cls(*(None if span is None else DaySpan.parse(span) for span in (train, validation, test)))

    def named(self, name: str) -> DaySpan:
        """The span called ``train``, ``validation`` or ``test``; InputError where there is none."""
        if name not in {f.name for f in fields(self)}:
            raise InputError(f"{name!r} is no part of a split; choose train, validation or test")
        span = getattr(self, name)
        if span is None:
            raise InputError(f"the split has no {name} span (too few days, or none was given); give its days")
        return span

    def as_attribute(self) -> dict[str, list[str] | None]:
        """JSON form, as the store's attributes keep it."""
        spans = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: None if s is None else [str(s.first_day), str(s.last_day)] for name, s in spans.items()}


def default_split(days: np.ndarray) -> Split:
    """The split of a store whose present local days are ``days`` (sorted datetime64[D]).

    The spans of "Vision-LLMs for Spatiotemporal Traffic Forecasting" where the data covers them
    (docs/decisions.md, 12), else chronological 4 : 1 : 1 by days that hold data.
    """
    if days[0] <= MILAN_FIRST_DAY and days[-1] >= MILAN_LAST_DAY:
        return Split.parse("2013-11-01:2013-12-18", "2013-12-19:2013-12-25", f"2013-12-26:{MILAN_LAST_DAY}")
    held = len(days) // 6
    if held == 0:
        return Split(DaySpan(days[0], days[-1]))
    return Split(
        DaySpan(days[0], days[-2 * held - 1]),
        DaySpan(days[-2 * held], days[-held - 1]),
        DaySpan(days[-held], days[-1]),
    )


class _Box:
    """Half-open ranges of a store's axes of space, one pair of edges an axis, counted from 0 in the store's arrays."""

    name: ClassVar[str]
    form: ClassVar[str]
    example: ClassVar[str]

    def __post_init__(self) -> None:
        if not all(0 <= start < stop for start, stop in self._pairs):
            raise InputError(f"{self.name} {self} is empty or negative; write it as {self.example} (end excluded)")

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Reads ``form`` or the edges as integers."""
        if isinstance(value, cls):
            return value
        if (edges := _edges(value, len(fields(cls)))) is None:  # type: ignore[arg-type]
            raise InputError(f"{cls.name} {value!r} is not {cls.form}; write it as {cls.example} (end excluded)")
        return cls(*edges)

    @property
    def _pairs(self) -> list[tuple[int, int]]:
        edges = astuple(self)  # type: ignore[call-overload]
        return list(zip(edges[::2], edges[1::2], strict=True))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self._pairs)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(start, stop) for start, stop in self._pairs)

    def __str__(self) -> str:
        return ",".join(f"{start}:{stop}" for start, stop in self._pairs)


@dataclass(frozen=True)
class Region(_Box):
    """Rows ``r0`` … ``r1 - 1`` and columns ``c0`` … ``c1 - 1`` of a grid.

    The paper's central region, rows and columns 45 … 55 counted from 1, is ``44:55,44:55``
    (docs/decisions.md, 10).
    """

    r0: int
    r1: int
    c0: int
    c1: int

    name, form, example = "region", "r0:r1,c0:c1", "44:55,44:55"

    def within(self, shape: tuple[int, ...]) -> "Region":
        """Itself, or InputError where it leaves a grid of ``shape`` (H, W), or is asked of nodes (N,)."""
        if len(shape) != 2:
            raise InputError(f"region {self} is of a grid, the store has {shape[0]} nodes; write a range, as 0:100")
        if self.r1 > shape[0] or self.c1 > shape[1]:
            raise InputError(f"region {self} leaves the grid of {shape[0]} rows x {shape[1]} columns; stay inside it")
        return self


@dataclass(frozen=True)
class NodeRange(_Box):
    """Nodes ``n0`` … ``n1 - 1``: what a region is to a grid."""

    n0: int
    n1: int

    name, form, example = "node range", "n0:n1", "0:100"

    def within(self, shape: tuple[int, ...]) -> "NodeRange":
        """Itself, or InputError where it leaves ``shape`` (N,), or is asked of a grid (H, W)."""
        if len(shape) != 1:
            grid = " x ".join(map(str, shape))
            raise InputError(f"node range {self} is of nodes, the store is a grid of {grid}; write r0:r1,c0:c1")
        if self.n1 > shape[0]:
            raise InputError(f"node range {self} leaves the {shape[0]} nodes; stay inside them")
        return self


AnyRegion = Region | NodeRange


def parse_region(value: "AnyRegion | str | Sequence[int]") -> AnyRegion:
    """A ``Region`` of ``"r0:r1,c0:c1"`` or four integers, a ``NodeRange`` of ``"n0:n1"`` or two."""
    if isinstance(value, NodeRange) or (not isinstance(value, Region) and _edges(value, 2)):
        return NodeRange.parse(value)
    return Region.parse(value)


def _edges(value: str | Sequence[int], count: int) -> list[int] | None:
    """The ``count`` integers of ``a:b,c:d`` or of a sequence; None where there are others."""
    if isinstance(value, str):
        pairs = re.fullmatch(r"\s*" + r"\s*,\s*".join([r"(\d+):(\d+)"] * (count // 2)) + r"\s*", value)
        value = [int(edge) for edge in pairs.groups()] if pairs else []
    return [int(edge) for edge in value] if len(value) == count else None


def all_cells(shape: tuple[int, ...]) -> AnyRegion:
    """The region of all of a grid (H, W) or of all nodes (N,)."""
    return NodeRange(0, shape[0]) if len(shape) == 1 else Region(0, shape[0], 0, shape[1])
