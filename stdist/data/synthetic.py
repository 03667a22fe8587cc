"""A believable city, seeded: for demonstrations, tests and throughput runs at any size and span.

    value = level(cell) · rhythm(land use, weekday, slot) · exp(noise(cell, t)) · events, with missing spells

Level is log-normal around a centre; rhythm mixes residential, business and leisure land use; noise has a part
that neighbours share for hours, one of a cell's own, and one that is new in every slot; events travel over
neighbouring cells. Sizes are calibrated on the public Telecom Italia grid of Milan: quantiles of its cell
totals, correlation of neighbours, and on its central cells the errors of persistence and of "same time
yesterday", so that persistence, seasonal and learned forecasts all have something to do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stdist.data.parts import Tile
from stdist.data.schema import MINUTES_PER_DAY
from stdist.errors import InputError

# Hour, height and width in hours of the bumps over a floor: working days, then Saturday and Sunday.
RHYTHMS: dict[str, tuple[float, list[tuple[float, float, float]], list[tuple[float, float, float]]]] = {
    "residential": (
        0.45,
        [(8, 0.35, 1.5), (13, 0.4, 2.5), (21, 0.9, 3.0)],
        [(11, 0.6, 3.0), (20.5, 0.85, 3.5)],
    ),
    "business": (
        0.35,
        [(10.5, 1.1, 2.6), (15.5, 1.1, 2.8), (20, 0.35, 3.0)],
        [(12, 0.45, 4.0), (19, 0.4, 4.0)],
    ),
    "leisure": (0.40, [(12.5, 0.5, 2.0), (19.5, 1.0, 3.0), (23, 0.4, 2.0)], [(16, 1.0, 3.5), (22, 0.9, 3.0)]),
}
WEEKEND_LEAN = 0.5
"""Share of its own rhythm that a free day takes; the rest is the working day's."""
SHARED_HOURS, OWN_HOURS = 14.0, 1.5
"""Correlation times of the noise that neighbours share and of a cell's own."""
SHARED_STD, OWN_STD, SLOT_STD = 0.12, 0.10, 0.12
"""Standard deviations of the log-noise; the last two are of a cell of median level and fall slowly with it.
"""
EVENTS_PER_DAY = 1.5
ABSENT_FRAMES_PER_DAY = 0.1
"""Chance that a day lacks one to three time steps."""


@dataclass(frozen=True)
class SyntheticCity:
    """H x W cells, ``days`` local days from ``first_day``; the same fields give the same values.

    missing_share: expected share of values lost in spells of about four slots of one cell.
    """

    height: int = 20
    width: int = 20
    first_day: str = "2013-11-01"
    days: int = 30
    cadence_minutes: int = 10
    seed: int = 0
    name: str = "synthetic"
    missing_share: float = 0.002

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.days) < 1:
            raise InputError(f"a city of {self.height} x {self.width} cells and {self.days} days is empty")
        if self.cadence_minutes < 1 or MINUTES_PER_DAY % self.cadence_minutes:
            raise InputError(f"cadence {self.cadence_minutes} min does not divide a day; give whole minutes")

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def slots_per_day(self) -> int:
        return MINUTES_PER_DAY // self.cadence_minutes

    @cached_property
    def level(self) -> np.ndarray:
        """Mean traffic per cell, float64 [H, W]: a centre, suburbs, and a long tail."""
        rng = np.random.default_rng([self.seed, 1])
        row, col = np.mgrid[: self.height, : self.width]
        distance = np.hypot(row / self.height - 0.48, col / self.width - 0.55)
        tail = 0.6 * _field(rng, self.shape, 6) + 0.4 * _field(rng, self.shape, 2)
        return np.exp(2.9 + 2.6 * np.exp(-((distance / 0.18) ** 2)) + tail)

    @cached_property
    def land_use(self) -> np.ndarray:
        """Shares of residential, business and leisure use, float64 [3, H, W]."""
        rng = np.random.default_rng([self.seed, 2])
        lean = np.stack([_field(rng, self.shape, 5) for _ in RHYTHMS])
        shares = np.exp(1.2 * lean)
        return shares / shares.sum(axis=0)

    def rhythm(self, day: int) -> np.ndarray:
        """Relative traffic of each land use in the slots of a day, float64 [3, slots]; near 1 on average."""
        weekend = np.is_busday(np.datetime64(self.first_day, "D") + np.timedelta64(day, "D")) == 0
        hours = np.arange(self.slots_per_day) * self.cadence_minutes / 60
        lean = WEEKEND_LEAN if weekend else 0.0
        curves = []
        for floor, working, free in RHYTHMS.values():
            curve = np.full(self.slots_per_day, floor)
            for share, bumps in ((1 - lean, working), (lean, free)):
                for hour, bump, width in bumps:
                    away = (hours - hour + 12) % 24 - 12
                    curve += share * bump * np.exp(-0.5 * (away / width) ** 2)
            curves.append(curve)
        return np.stack(curves)


def generate(city: SyntheticCity, tile: Tile | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (day index, float32 [slots, H, W]); NaN is a missing value, 0 a measured zero.

    tile: yield these cells alone, with memory for a day of them. The tiles of a city fit together (neighbours'
    noise, events and absent steps are common to them) but are not the city that is generated as a whole: what
    a cell does alone is drawn tile by tile.
    """
    shared_shape = tuple(max(1, -(-side // 6)) for side in city.shape)
    cells = tile or (slice(0, city.height), slice(0, city.width))
    shape = tuple(side.stop - side.start for side in cells)
    common, alone = _streams(city, tile, 3, 6)
    shared, own = common.standard_normal(shared_shape), alone.standard_normal(shape)
    calm = (city.level[cells] / 30.0) ** -0.07
    rows, cols = (_spread(n, side)[at] for n, side, at in zip(shared_shape, city.shape, cells, strict=True))
    for day in range(city.days):
        common, alone = _streams(city, tile, 4, 7, day)
        shared_path = _autoregress(common, shared, SHARED_HOURS, city)
        own_path = _autoregress(alone, own, OWN_HOURS, city)
        shared, own = shared_path[-1], own_path[-1]
        log_noise = SHARED_STD * (rows @ shared_path @ cols.T)
        log_noise += calm * (OWN_STD * own_path + SLOT_STD * alone.standard_normal(own_path.shape))
        base = np.einsum("us,uhw->shw", city.rhythm(day), city.land_use[:, *cells]) * city.level[cells]
        values = base * np.exp(log_noise) * _events(common, city, cells)
        # Like the real data's rounding: next to nothing is nothing.
        values[values < 0.05] = 0
        values[_missing(alone, common, city, shape)] = np.nan
        yield day, values.astype(np.float32)


def _streams(
    city: SyntheticCity, tile: Tile | None, whole: int, tiled: int, *rest: int
) -> tuple[np.random.Generator, np.random.Generator]:
    """Random numbers that all cells share, and those of the cells alone: one stream where there are no tiles."""
    if tile is None:
        both = np.random.default_rng([city.seed, whole, *rest])
        return both, both
    place = [side.start for side in tile]
    common, alone = ([city.seed, tiled, *rest, *which] for which in ([0], [1, *place]))
    return np.random.default_rng(common), np.random.default_rng(alone)


def _autoregress(rng: np.random.Generator, last: np.ndarray, hours: float, city: SyntheticCity) -> np.ndarray:
    """One day of unit-variance AR(1) noise that goes on from ``last``, [slots, …]."""
    keep = np.exp(-city.cadence_minutes / 60 / hours)
    path = np.sqrt(1 - keep**2) * rng.standard_normal((city.slots_per_day, *last.shape))
    for step in path:
        step += keep * last
        last = step
    return path


def _spread(coarse: int, fine: int) -> np.ndarray:
    """Linear interpolation of ``coarse`` knots onto ``fine`` cells, rows scaled to keep unit variance."""
    at = np.linspace(0, coarse - 1, fine)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(coarse)))
    return weights / np.sqrt((weights**2).sum(axis=1, keepdims=True))


def _field(rng: np.random.Generator, shape: tuple[int, int], scale: int) -> np.ndarray:
    """Smooth Gaussian field of unit variance whose knots lie ``scale`` cells apart, [H, W]."""
    knots = tuple(max(2, -(-side // scale) + 1) for side in shape)
    rows, cols = (_spread(n, side) for n, side in zip(knots, shape, strict=True))
    return rows @ rng.standard_normal(knots) @ cols.T


def _events(rng: np.random.Generator, city: SyntheticCity, cells: Tile) -> np.ndarray:
    """Factor on the traffic of ``cells``, [slots, h, w]: crowds that rise, travel over neighbouring cells and fade."""
    row, col = np.mgrid[cells]
    factor = np.ones((city.slots_per_day, *row.shape))
    per_hour = 60 / city.cadence_minutes
    for _ in range(rng.poisson(EVENTS_PER_DAY)):
        middle, lasts = rng.uniform(9, 23) * per_hour, rng.uniform(0.5, 1.5) * per_hour
        start, pace = rng.uniform(0, city.shape), rng.normal(0, 2.0 / per_hour, 2)
        height, radius = rng.uniform(0.3, 1.2), rng.uniform(0.8, 2.0)
        first, last = int(max(0, middle - 3 * lasts)), int(min(city.slots_per_day, middle + 3 * lasts))
        t = np.arange(first, last)[:, None, None] - middle
        square = (row - start[0] - pace[0] * t) ** 2 + (col - start[1] - pace[1] * t) ** 2
        factor[first:last] += height * np.exp(-0.5 * (t / lasts) ** 2 - 0.5 * square / radius**2)
    return factor


def _missing(
    alone: np.random.Generator, common: np.random.Generator, city: SyntheticCity, shape: tuple[int, ...]
) -> np.ndarray:
    """Lost values, bool [slots, *shape]: spells of one cell, and now and then all cells of a time step."""
    lost = np.zeros((city.slots_per_day, *shape), bool)
    spells = alone.poisson(lost.size * city.missing_share / 4)
    slot, row, col = (alone.integers(0, side, spells) for side in lost.shape)
    length = alone.geometric(1 / 4, spells)
    for ahead in range(int(length.max(initial=0))):
        reaches = (length > ahead) & (slot + ahead < city.slots_per_day)
        lost[slot[reaches] + ahead, row[reaches], col[reaches]] = True
    if city.missing_share and common.random() < ABSENT_FRAMES_PER_DAY:
        first = common.integers(0, city.slots_per_day)
        lost[first : first + common.integers(1, 4)] = True
    return lost
