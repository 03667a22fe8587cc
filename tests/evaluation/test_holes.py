"""Baselines, counts and notes on data with holes, against numpy that knows nothing of this package's way to them."""

import numpy as np
import pytest

from stdist.data import DaySpan, GridStore, NodeSpec, Split, open_store
from stdist.data import GridWriter as Writer
from stdist.data.check import check_store
from stdist.data.imputation import interpolate
from stdist.errors import InputError
from stdist.evaluation import score_baselines
from stdist.evaluation.unseen import unseen
from stdist.runs.dataset import require_observed

DAYS, SLOTS, N, S, K = 24, 24, 6, 3, 2
TRAIN = slice(0, 16 * SLOTS)
TEST = slice(20 * SLOTS, 24 * SLOTS)
LATE, NEVER = 3, 4
"""Nodes: never observed in training, never at all."""
NAMES = ["persistence", "same time yesterday", "same time last week", "mean by weekday and slot", "ridge"]


def write(path, values) -> GridStore:
    first = np.datetime64("2024-03-04")  # a Monday
    spec = NodeSpec("holes", ("flow",), first, first + DAYS - 1, np.arange(100, 100 + N), 60, 0, "vehicles")
    with Writer(path, spec, {"made by": "a test"}) as writer:
        for day in range(DAYS):
            writer.write_day(day, {"flow": values[day * SLOTS : (day + 1) * SLOTS].astype(np.float32)})
        split = Split.parse("2024-03-04:2024-03-19", "2024-03-20:2024-03-23", "2024-03-24:2024-03-27")
        return open_store(writer.finalise(split))


@pytest.fixture(scope="module")
def measured():
    """NaN where nothing is observed: 7 % at random, a lost day in training, two nodes that training does not know."""
    rng = np.random.default_rng(3)
    t = np.arange(DAYS * SLOTS)
    wave = 50 + 30 * np.sin(2 * np.pi * t / SLOTS) + 10 * np.cos(2 * np.pi * t / (7 * SLOTS))
    values = wave[:, None] * rng.uniform(0.5, 2, N) + rng.normal(0, 3, (len(t), N))
    values[rng.random(values.shape) < 0.07] = np.nan
    values[5 * SLOTS : 6 * SLOTS, 1] = np.nan
    values[: 18 * SLOTS, LATE] = np.nan
    values[:, NEVER] = np.nan
    return values.astype(np.float32).astype(float)


@pytest.fixture(scope="module")
def store(tmp_path_factory, measured):
    return write(tmp_path_factory.mktemp("holes") / "holes.zarr", measured)


def naive(measured: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every baseline's forecasts [origins, K, N] and where these are persistence's, all in loops."""
    seen = ~np.isnan(measured)
    filled = interpolate(np.nan_to_num(measured).astype(np.float32), seen).astype(float)
    origins = range(TEST.start - 1, TEST.stop - K)
    made = {name: (np.zeros((len(origins), K, N)), np.zeros((len(origins), K, N), bool)) for name in NAMES}
    week = 7 * SLOTS

    def calendar(t):
        angles = [2 * np.pi * h * (t % period) / period for period in (SLOTS, week) for h in range(1, 7)]
        return [1.0, *(f(a) for a in angles for f in (np.sin, np.cos))]

    for node in range(N):
        x, y = [], []
        for o in range(TRAIN.start + S - 1, TRAIN.stop - K):
            window = measured[o - S + 1 : o + K + 1, node]
            if not np.isnan(window).any():
                x.append([*window[:S], *calendar(o)])
                y.append(window[S:])
        weights = None
        if x:
            x, y = np.array(x), np.array(y)
            mean, deviation = x[:, :S].mean(), x[:, :S].std()
            x[:, :S] = (x[:, :S] - mean) / deviation
            weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ ((y - mean) / deviation))
        for i, o in enumerate(origins):
            last = filled[o, node]
            lags = filled[o - S + 1 : o + 1, node]
            ridge = None
            if weights is not None:
                ridge = np.array([*((lags - mean) / deviation), *calendar(o)]) @ weights * deviation + mean
            for k in range(K):
                t = o + 1 + k
                like = [measured[u, node] for u in range(TRAIN.stop) if u % week == t % week and seen[u, node]]
                values = {
                    "persistence": last,
                    "same time yesterday": filled[t - SLOTS, node],
                    "same time last week": filled[t - week, node],
                    "mean by weekday and slot": np.mean(like) if like else None,
                    "ridge": None if ridge is None else ridge[k],
                }
                for name, value in values.items():
                    made[name][0][i, k, node] = last if value is None else value
                    made[name][1][i, k, node] = value is None
    return made


def test_every_baseline_is_fitted_on_what_was_observed(store, measured):
    """Every figure and count of ``score_baselines``, by loops."""
    scores = score_baselines(store, "train", store.windows("test", S, K, channel="flow"))
    origins = np.arange(TEST.start - 1, TEST.stop - K)
    truth = measured[origins[:, None] + np.arange(1, K + 1)]
    counted = ~np.isnan(truth)
    assert list(scores) == NAMES
    for name, (made, fallback) in naive(measured).items():
        error = (made - truth)[counted]
        pooled = scores[name]["pooled"]
        assert pooled["points"] == counted.sum()
        assert pooled["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5), name
        assert pooled["rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5), name
        assert pooled["nrmse"] == pytest.approx(np.sqrt((error**2).mean()) / truth[counted].mean(), rel=1e-5), name
        assert scores[name]["fallbacks"] == (fallback & counted).sum(), name
    # One node is not in training: all its observed points, and no point that is not scored, are persistence's.
    assert scores["ridge"]["fallbacks"] == counted[:, :, LATE].sum() < truth[:, :, LATE].size


def test_places_that_training_does_not_know_are_named(store):
    windows = store.windows("test", S, K, channel="flow")
    found = unseen(windows, store.default_split.named("train"))
    assert (found.scored, found.never) == (["103"], ["104"])
    assert found.notes() == [
        "1 node scored but never observed in training, where fitted baselines are persistence: 103",
        "1 node never observed at all, and so not scored: 104",
    ]
    assert store.unseen == {"flow": {"never_observed": 1, "never_in_training": 1}}
    warnings = {f.what: f.where for f in check_store(store.path).findings if f.severity == "warning"}
    assert warnings["cells scored but never observed in training (1)"] == "flow, cells 103"
    assert warnings["cells never observed (1)"] == "flow, cells 104"


def test_places_are_named_tile_by_tile(store, monkeypatch):
    monkeypatch.setattr("stdist.evaluation.unseen.FRAMES_IN_MEMORY", 1)
    found = unseen(store.windows("test", S, K, channel="flow"), store.default_split.named("train"))
    assert (found.scored, found.never) == (["103"], ["104"])


@pytest.mark.parametrize("region", ["4:5", "3:5"], ids=["never", "not in training"])
def test_spans_without_an_observed_target_are_refused(store, region):
    windows = store.windows("train", S, K, channel="flow", region=store.region(region))
    with pytest.raises(InputError, match=r"no target of the 380 train windows, 2024-03-04:2024-03-19, was"):
        require_observed(windows)
    if region == "3:5":
        require_observed(store.windows("test", S, K, channel="flow", region=store.region(region)))


def test_an_observed_history_is_no_observed_target(tmp_path, measured):
    """The day before the span is observed, and of the span itself the first frame alone, which is no target."""
    values = measured.copy()
    values[20 * SLOTS :] = np.nan
    values[20 * SLOTS] = 7
    store = write(tmp_path / "blackout.zarr", values)
    inside = store.windows(DaySpan.parse("2024-03-24:2024-03-27"), S, K, channel="flow")
    with pytest.raises(InputError, match="no target of"):
        require_observed(inside)
    reaching_back = store.windows("test", S, K, channel="flow")
    require_observed(reaching_back)
    with pytest.raises(InputError, match=r"no target of the 2 that are scored of the 95 test windows"):
        require_observed(reaching_back, np.array([1, 94]))
    with pytest.raises(InputError, match="was observed above zero in channel flow"):
        values[20 * SLOTS] = 0
        require_observed(
            write(tmp_path / "zero.zarr", values).windows("test", S, K, channel="flow"), np.array([0]), positive=True
        )
