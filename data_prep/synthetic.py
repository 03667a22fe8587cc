"""The synthetic city of ``stdist.data.synthetic`` as a store, or as raw Telecom Italia text files."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.common import grid_spec, parse_start, with_spans
from data_prep.plan import Day, Part, Plan
from data_prep.telecom_text import CHANNELS, SLOTS_PER_DAY, write_day
from stdist.data.synthetic import SyntheticCity, generate
from stdist.errors import InputError

# Mean ratio to the internet activity, roughly as in the public data.
RATIOS = {"sms_in": 0.06, "sms_out": 0.04, "call_in": 0.05, "call_out": 0.06, "internet": 1.0}


@with_spans
def plan(
    sources: list[Path],
    *,
    city: str = "synthetic",
    channel: str = "internet",
    start: str = "2013-11-01",
    cadence: int = 10,
    utc_offset: int = 60,
    height: int = 20,
    width: int = 20,
    days: int = 30,
    seed: int = 0,
) -> Plan:
    """Plan of a generated city, a part for every tile; there are no sources (InputError where some are given).

    start: first local day. days: how many to generate. seed: the same seed is the same city.
    """
    if sources:
        raise InputError(f"synthetic reads no file, {sources[0]} given; leave it out")
    first = parse_start(start).astype("datetime64[D]")
    source = SyntheticCity(height, width, str(first), days, cadence, seed, city)
    spec = grid_spec(
        city,
        [channel],
        first + np.array([0, days - 1]),
        source.shape,
        cadence=cadence,
        utc_offset=utc_offset,
    )
    tiles = spec.tiles()
    parts = [Part(f"tile-{index}", tuple(range(days)), len(tiles) > 1, (tile,)) for index, tile in enumerate(tiles)]
    return Plan(spec, {"reader": "synthetic", "seed": seed}, [], None, parts, partial(_read, source, channel))


def _read(source: SyntheticCity, channel: str, part: Part) -> Iterator[Day]:
    """payload: whether the city has more tiles than this one."""
    assert part.tiles is not None
    (tile,) = part.tiles
    for day, values in generate(source, tile if part.payload else None):
        yield Day(day, {channel: values}, ~np.isnan(values).all(axis=(1, 2)), tile)


def write_raw(city: SyntheticCity, folder: Path, cell_ids: np.ndarray) -> list[Path]:
    """Write a city as raw text files, one a day, and return their paths.

    cell_ids: int64 [H, W], squares of Milan. Channel internet is the generator's own, exactly; the others
    follow it with noise (``activities``).
    """
    if city.slots_per_day != SLOTS_PER_DAY:
        raise InputError(f"the raw format has 10-minute slots, the city {city.cadence_minutes} min; choose 10")
    folder.mkdir(parents=True, exist_ok=True)
    first = np.datetime64(city.first_day, "D")
    return [
        write_day(folder, first + day, activities(city, day, values), cell_ids, city.seed)
        for day, values in generate(city)
    ]


def activities(city: SyntheticCity, day: int, internet: np.ndarray) -> dict[str, np.ndarray]:
    """All five channels of one day, float32 [144, H, W] each, missing where ``internet`` is NaN."""
    rng = np.random.default_rng([city.seed, 5, day])
    others = {name: RATIOS[name] * np.exp(rng.normal(0, 0.3, internet.shape)) for name in CHANNELS[:-1]}
    return {**{name: (internet * r).astype(np.float32) for name, r in others.items()}, "internet": internet}
