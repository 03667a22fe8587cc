"""The raw text format of the Telecom Italia Big Data Challenge, and a writer of genuine-looking files.

Tab-separated, no header, eight columns: square id, start of the slot (epoch milliseconds, UTC), country code,
then sms-in, sms-out, call-in, call-out, internet. An empty field is no activity of that kind. A (square,
slot) has one row per country code (0 = unknown; 3.6 on average, at most 36), and none without any activity.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

CHANNELS = ("sms_in", "sms_out", "call_in", "call_out", "internet")
SLOT_MS = 600_000
SLOTS_PER_DAY = 144
UTC_OFFSET_MINUTES = 60
"""Central European Time throughout; a file starts at local midnight."""

COUNTRIES = np.array([39, 0, *range(30, 39), *range(40, 50), 1, 7, 20, 51, 55, 60, 81, 86, 90, 91, 212, 213, 216])
MEAN_FOREIGN, SHARE_SEEN = 3.9, 0.2
"""Foreign codes drawn for a (square, slot), and how many of a code's activities are not blank: a file then has 3.6
rows a pair and 70 bytes a row, half of its activities blank, as the genuine ones."""
ROWS_AT_ONCE = 10
"""Grid rows held in memory while writing."""


def day_start_ms(day: np.datetime64) -> int:
    """Epoch milliseconds, UTC, of local midnight."""
    minutes = int(day.astype("datetime64[m]").astype(np.int64)) - UTC_OFFSET_MINUTES
    return minutes * 60_000


def file_name(day: np.datetime64) -> str:
    return f"sms-call-internet-mi-{day}.txt"


def write_day(
    folder: Path, day: np.datetime64, values: Mapping[str, np.ndarray], cell_ids: np.ndarray, seed: int = 0
) -> Path:
    """Write one local day as a raw file and return its path.

    values: per channel of ``CHANNELS`` [144, H, W], float32, NaN = missing in all channels alike (such pairs
    get no row). cell_ids: int64 [H, W]. Each value is split over country codes whose sum is the value again.
    """
    path = folder / file_name(day)
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
