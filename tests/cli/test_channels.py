"""Forecasts of another channel and city: what the policy is told of it, and the baselines beside a zero-shot figure."""

import numpy as np
import polars as pl
import pytest

from data_prep import READERS
from stdist.data import open_store


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """A store whose only channel is one that the run has never seen."""
    path = tmp_path_factory.mktemp("calls") / "calls.zarr"
    READERS["synthetic"].prepare([], path, channel="calls", height=4, width=3, days=9, cadence=60, seed=5)
    return path


def test_another_channel_has_its_own_t_max_and_baselines_beside_it(stdist, finished_run, calls, tmp_path):
    """Two places of a box of four: persistence by hand, over the points that were asked for alone."""
    out = tmp_path / "calls.parquet"
    command = ["forecast", finished_run.run_dir, calls, "--out", out, "--places", "1,5", "--channel", "calls"]
    made = stdist(*command)
    assert made.code == 0 and "t_max of the frames: " in made.err and "of this data's training days" in made.err
    scored = stdist("evaluate", out, calls, "--json").json
    assert scored["contract"]["channel"] == "calls" and scored["contract"]["cells"] == 2
    store, table = open_store(calls), pl.read_parquet(out)
    values = store.values("calls", 0, len(store.times)).reshape(len(store.times), -1)
    observed = store.observed("calls", 0, len(store.times)).reshape(values.shape)
    origins = table["origin"].unique().sort().to_numpy().astype("datetime64[ns]")
    at = np.searchsorted(store.times, origins)
    column = [store.cell_ids.ravel().tolist().index(place) for place in (1, 5)]
    errors, truths = [], []
    for step in range(1, scored["contract"]["K"] + 1):
        truth, seen = values[at + step][:, column], observed[at + step][:, column]
        errors.append((truth - values[at][:, column])[seen])
        truths.append(truth[seen])
    by_hand = np.sqrt(np.mean(np.concatenate(errors) ** 2)) / np.mean(np.concatenate(truths))
    assert scored["baselines"]["persistence"]["pooled"]["nrmse"] == pytest.approx(by_hand, rel=1e-5)
    said = stdist("evaluate", out, calls).out
    assert "baselines fitted on " in said and f"persistence {by_hand:.4g}"[:16] in said


def test_baselines_are_not_scored_on_days_they_are_fitted_on(stdist, finished_run, calls, tmp_path):
    """The forecasts are, since nothing of another city was fitted on them: frames keep the policy's own t_max."""
    days = open_store(calls).default_split.named("train")
    command = ["forecast", finished_run.run_dir, calls, "--out", tmp_path / "f.parquet", "--channel", "calls"]
    made = stdist(*command, "--split", f"{days.last_day}:{days.last_day}")
    assert made.code == 0 and "t_max of the frames: " not in made.err
    scored = stdist("evaluate", tmp_path / "f.parquet", calls)
    assert scored.code == 0 and "no baselines beside it: leak: " in scored.out


def test_a_channel_that_is_not_there(refused, finished_run, city, tmp_path):
    line = refused("forecast", finished_run.run_dir, city, "--out", tmp_path / "f.csv", "--channel", "sms")
    assert "sms" in line and "internet" in line


def test_a_model_of_nodes_knows_one_channel(refused, world):
    """Its scale and rows are that channel's."""
    line = refused("forecast", "runs/n", "z.zarr", "--out", "f.csv", "--channel", "other")
    assert line.startswith("--channel other: ") and line.endswith("train a run on the other channel")
