"""Every count and every baseline on three real data sets, against numpy that shares no code with this package."""

import csv
import itertools

import numpy as np
import pytest

from stdist.data import GridWriter as Writer
from stdist.data import NodeSpec, Split, open_store
from stdist.evaluation import score_baselines

S, K = 12, 12
NAMES = ["persistence", "same time yesterday", "same time last week", "mean by weekday and slot", "ridge"]


def milan(folder):
    values = np.loadtxt(folder / "milan_block_5x5" / "milan_grid_data.csv", delimiter=",")
    return values, "2013-11-01", 10, (20, 5, 5)


def zones(folder):
    with np.load(folder / "nyc_zones" / next(p.name for p in (folder / "nyc_zones").glob("*.npz"))) as archive:
        return archive["arr_0"][: 60 * 24, :20, 0].astype(float), "2019-01-01", 60, (40, 10, 10)


def metr(folder):
    with open(folder / "metr_la_week" / "los_speed.csv") as file:
        rows = [row for row in csv.reader(file)][1:]
    return np.array(rows, float)[:, :30], "2012-03-01", 5, (4, 1, 2)


@pytest.mark.parametrize("read", [milan, zones, metr])
def test_every_count_and_baseline(real_data, tmp_path, read):
    """With holes made into it, so that what is observed and what is imputed differ."""
    values, first, cadence, days = read(real_data)
    values = values.astype(np.float32)
    slots, (train, validation, test) = 1440 // cadence, days
    rng = np.random.default_rng(5)
    observed = (rng.random(values.shape) > 0.004) & np.isfinite(values)
    observed[: train * slots, 1] = False
    store = write(tmp_path / "s.zarr", np.where(observed, values, np.nan), first, cadence, days)
    scores = score_baselines(store, "train", store.windows("test", S, K, channel="flow"))

    filled = imputed(values, observed)
    origins = np.arange((train + validation) * slots - 1, (train + validation + test) * slots - K)
    targets = origins[:, None] + np.arange(1, K + 1)
    truth, counted = values[targets].astype(float), observed[targets]
    week = (np.arange(len(values)) + slots * ((np.datetime64(first) - np.datetime64("1970-01-05")).astype(int) % 7)) % (
        7 * slots
    )
    made = {
        "persistence": np.repeat(filled[origins][:, None], K, 1),
        "same time yesterday": filled[targets - slots],
        "same time last week": np.where(
            (targets >= 7 * slots)[..., None], filled[np.maximum(targets - 7 * slots, 0)], np.nan
        ),
        "mean by weekday and slot": weekly(values, observed, week, train * slots)[week[targets]],
        "ridge": ridge(values, observed, filled, week, slots, train * slots, origins),
    }
    assert list(scores) == NAMES
    for name, forecast in made.items():
        missing = np.isnan(forecast)
        error = (np.where(missing, made["persistence"], forecast) - truth)[counted]
        pooled, positive = scores[name]["pooled"], np.abs(truth[counted]) > 5e-5
        assert pooled["points"] == counted.sum()
        assert scores[name]["fallbacks"] == (missing & counted).sum(), name
        expected = {
            "mae": np.abs(error).mean(),
            "rmse": np.sqrt((error**2).mean()),
            "mape": np.abs(error[positive] / truth[counted][positive]).mean(),
            "nrmse": np.sqrt((error**2).mean()) / truth[counted].mean(),
        }
        assert {key: pooled[key] for key in expected} == pytest.approx(expected, rel=1e-4), name
    assert store.coverage["flow"]["missing"] == (~observed).sum()
    assert store.coverage["flow"]["true_zeros"] == (observed & (values == 0)).sum()
    assert store.unseen["flow"] == {"never_observed": 0, "never_in_training": 1}


def write(path, values, first, cadence, days):
    first, total, slots = np.datetime64(first), sum(days), 1440 // cadence
    spec = NodeSpec("real", ("flow",), first, first + total - 1, np.arange(values.shape[1]), cadence)
    edges = np.cumsum([0, *days])
    split = Split.parse(*([str(first + a), str(first + b - 1)] for a, b in itertools.pairwise(edges)))
    with Writer(path, spec, {"made by": "a test"}) as writer:
        for day in range(total):
            writer.write_day(day, {"flow": values[day * slots : (day + 1) * slots].astype(np.float32)})
        return open_store(writer.finalise(split))


def imputed(values, observed):
    """Straight lines between what is observed, the nearest value at the ends."""
    filled, t = values.astype(float).copy(), np.arange(len(values))
    for node in range(values.shape[1]):
        seen = observed[:, node]
        filled[:, node] = np.interp(t, t[seen], values[seen, node])
    return filled


def weekly(values, observed, week, fitted):
    """[slots of a week, N], NaN where training observed nothing."""
    profile = np.full((week.max() + 1, values.shape[1]), np.nan)
    for slot in np.unique(week[:fitted]):
        like = np.flatnonzero(week[:fitted] == slot)
        for node in range(values.shape[1]):
            if (known := like[observed[like, node]]).size:
                profile[slot, node] = values[known, node].astype(float).mean()
    return profile


def ridge(values, observed, filled, week, slots, fitted, origins):
    """[origins, K, N] by least squares with a row of penalty a weight, NaN where no training window is complete."""
    columns = [np.ones(len(week))]
    for period in (slots, 7 * slots):
        if fitted >= 2 * period:
            for h in range(1, 7):
                columns += [np.sin(2 * np.pi * h * week / period), np.cos(2 * np.pi * h * week / period)]
    calendar = np.stack(columns, 1)
    made = np.full((len(origins), K, values.shape[1]), np.nan)
    starts = np.arange(S - 1, fitted - K)
    for node in range(values.shape[1]):
        around = starts[:, None] + np.arange(1 - S, K + 1)
        complete = observed[around, node].all(1)
        if not complete.any():
            continue
        windows = values[around[complete], node].astype(float)
        mean, deviation = windows[:, :S].mean(), windows[:, :S].std() or 1.0  # a zone without any traffic
        x = np.hstack([(windows[:, :S] - mean) / deviation, calendar[starts[complete]]])
        y = (windows[:, S:] - mean) / deviation
        size = x.shape[1]
        weights = np.linalg.lstsq(np.vstack([x, np.eye(size)]), np.vstack([y, np.zeros((size, K))]), rcond=None)[0]
        lags = filled[origins[:, None] + np.arange(1 - S, 1), node]
        made[:, :, node] = np.hstack([(lags - mean) / deviation, calendar[origins]]) @ weights * deviation + mean
    return made
