"""The synthetic city of ``stdist.data.synthetic`` as a store, or as raw Telecom Italia text files."""

from pathlib import Path

import numpy as np

from data_prep.common import PrepareSummary, finish, grid_spec, parse_split, parse_start
from data_prep.telecom_text import CHANNELS, SLOTS_PER_DAY, write_day
from stdist.data import GridWriter
from stdist.data.synthetic import SyntheticCity, generate
from stdist.errors import InputError
from stdist.progress import Progress

# Mean ratio to the internet activity, roughly as in the public data.
RATIOS = {"sms_in": 0.06, "sms_out": 0.04, "call_in": 0.05, "call_out": 0.06, "internet": 1.0}


def prepare(
    sources: list[Path],
    out: Path,
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
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    progress: Progress | None = None,
) -> PrepareSummary:
    """Write the grid store ``out`` of a generated city; there are no sources (InputError where some are
    given).

    start: first local day. days, height, width, seed, cadence (minutes): those of ``SyntheticCity``.
    """
    if sources:
        raise InputError(f"synthetic reads no file, {sources[0]} given; leave it out")
    first = parse_start(start).astype("datetime64[D]")
    source = SyntheticCity(height, width, str(first), days, cadence, seed, city)
    spec = grid_spec(
        city,
        [channel],
        (first, first + np.timedelta64(days - 1, "D")),
        source.shape,
        cadence=cadence,
        utc_offset=utc_offset,
    )
    split = parse_split(train, validation, test, spec)
    recipe = {"reader": "synthetic", "seed": seed}
    with GridWriter(out, spec, recipe) as writer:
        for day, values in generate(source):
            present = ~np.isnan(values).all(axis=(1, 2))
            writer.write_day(day, {channel: values}, present)
            if progress:
                progress(day + 1, days)
        return finish(writer, split)


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
