"""The synthetic city of ``stdist.data.synthetic`` as a store."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.common import GridPlace
from data_prep.preparation import Plan
from data_prep.reader import reader
from stdist.data import Day, Part
from stdist.data.synthetic import SyntheticCity, generate
from stdist.dates import parse_local_time
from stdist.errors import InputError


@reader("synthetic")
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
    if seed < 0:
        raise InputError(f"--seed {seed} is negative; give 0 or more")
    first = parse_local_time(start, "--start").astype("datetime64[D]")
    source = SyntheticCity(height, width, str(first), days, cadence, seed, city)
    ends = first + np.array([0, days - 1])
    spec = GridPlace().spec(
        city, [channel], ends, source.shape, cadence=cadence, utc_offset=utc_offset, units="activity"
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
