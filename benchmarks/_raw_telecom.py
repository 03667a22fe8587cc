"""Raw text of the Telecom Italia challenge, in the genuine format, of a synthetic city: for tests and the ingest
benchmark."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from data_prep.telecom_rows import CHANNELS, SLOT_MS, SLOTS_PER_DAY, day_start_ms
from stdist.data.synthetic import SyntheticCity, generate

# Mean ratio to the internet activity, roughly as in the public data.
RATIOS = {"sms_in": 0.06, "sms_out": 0.04, "call_in": 0.05, "call_out": 0.06, "internet": 1.0}
COUNTRIES = np.array([39, 0, *range(30, 39), *range(40, 50), 1, 7, 20, 51, 55, 60, 81, 86, 90, 91, 212, 213, 216])
MEAN_FOREIGN, SHARE_SEEN = 3.9, 0.2
"""Foreign codes drawn for a (square, slot), and how many of a code's activities are not blank: a file then has 3.6
rows a pair and 70 bytes a row, half of its activities blank, as the genuine ones."""
ROWS_AT_ONCE = 10
"""Grid rows held in memory while writing."""


def write_raw(city: SyntheticCity, folder: Path, cell_ids: np.ndarray) -> list[Path]:
    """Writes a city of 10-minute slots as raw text files, one a day, and return their paths.

    cell_ids: int64 [H, W], squares of Milan. Channel internet is the generator's own, exactly; the others
    follow it with noise (``activities``).
    """
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


def write_day(
    folder: Path, day: np.datetime64, values: Mapping[str, np.ndarray], cell_ids: np.ndarray, seed: int = 0
) -> Path:
    """Write one local day as a raw file and return its path.

    values: per channel of ``CHANNELS`` [144, H, W], float32, NaN = missing in all channels alike (such pairs
    get no row). cell_ids: int64 [H, W]. Each value is split over country codes whose sum is the value again.
    """
    path = folder / f"sms-call-internet-mi-{day}.txt"
    rng = np.random.default_rng([seed, int(day.astype(int))])
    with path.open("wb") as file:
        for first in range(0, len(cell_ids), ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            # [cells, slots, channels]: the files are sorted by square, then slot, then country.
            block = np.stack([values[name][:, rows] for name in CHANNELS], axis=-1)
            block = block.reshape(SLOTS_PER_DAY, -1, len(CHANNELS)).swapaxes(0, 1)
            table = _rows(rng, block, cell_ids[rows].reshape(-1), day_start_ms(day))
            table.write_csv(file, separator="\t", include_header=False, float_scientific=False)
    return path


def _rows(rng: np.random.Generator, values: np.ndarray, ids: np.ndarray, start_ms: int) -> pl.DataFrame:
    """Raw rows of values float [cells, 144, 5]; country 39 takes what the others leave."""
    cell, slot = np.nonzero(~np.isnan(values).any(axis=-1))
    totals = values[cell, slot].astype(np.float64)
    foreign = np.minimum(rng.poisson(MEAN_FOREIGN, len(totals)), len(COUNTRIES) - 1)
    pair = np.repeat(np.arange(len(totals)), foreign)
    rank = np.arange(len(pair)) - np.repeat(np.cumsum(foreign) - foreign, foreign)
    share = rng.random((len(pair), len(CHANNELS))) * (rng.random((len(pair), len(CHANNELS))) < SHARE_SEEN)
    parts = totals[pair] * share * 0.2 / foreign[pair, None]
    home = totals.copy()
    np.subtract.at(home, pair, parts)

    seen = (parts > 0).any(axis=1)
    every_pair = np.concatenate((np.arange(len(totals)), pair[seen]))
    country = COUNTRIES[np.concatenate((np.zeros(len(totals), np.int64), rank[seen] + 1))]
    activity = np.concatenate((home, parts[seen]))
    order = np.lexsort((country, every_pair))
    every_pair, activity = every_pair[order], activity[order]
    columns = {
        "cell": ids[cell[every_pair]],
        "stamp": start_ms + slot[every_pair] * SLOT_MS,
        "country": country[order],
        **{name: activity[:, i] for i, name in enumerate(CHANNELS)},
    }
    blank_zeros = [pl.when(pl.col(name) > 0).then(pl.col(name)).alias(name) for name in CHANNELS]
    return pl.DataFrame(columns).with_columns(blank_zeros)
