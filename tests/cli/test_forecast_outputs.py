"""Forecasts as people ask for them: places by their ids, tables of text, the first steps, the steps behind the end."""

import numpy as np
import polars as pl
import pytest
import xarray

from stdist.data import GridSpec, GridWriter, open_store

PLACES = {2, 4}
"""Ids on the diagonal of the run's region: the box around them holds two cells more."""


@pytest.fixture
def forecast(stdist, finished_run, city, tmp_path):
    def run(name: str, *options: object):
        result = stdist("forecast", finished_run.run_dir, city, "--out", tmp_path / name, *options)
        assert result.code == 0, result.err
        return result, tmp_path / name

    return run


def test_places_of_a_split_are_those_of_the_region_and_scored_alone(forecast, stdist, city, tmp_path):
    _, whole = forecast("whole.parquet", "--region", "0:2,0:2")
    _, path = forecast("some.parquet", "--places", " 4,2,4")
    expected, some = pl.read_parquet(whole), pl.read_parquet(path)
    assert set(some["cell"]) == PLACES
    expected = expected.filter(pl.col("cell").is_in(PLACES))
    assert some.drop("forecast").equals(expected.drop("forecast"))
    np.testing.assert_allclose(some["forecast"], expected["forecast"], rtol=1e-5)
    scored = stdist("evaluate", path, city, "--json").json
    assert scored["contract"]["places"] == [2, 4] and scored["contract"]["cells"] == 2
    assert scored["contract"]["points"] == len(some)
    _, part = forecast("part.zarr", "--places", "2,4")
    assert stdist("evaluate", part, city, "--json").json["pooled"] == pytest.approx(scored["pooled"], rel=1e-5)
    with xarray.open_zarr(part) as made:
        assert made["forecast"].isnull().any("step").any("origin").values.tolist() == [[True, False], [False, True]]


def test_all_places_are_the_whole_grid(forecast):
    _, path = forecast("all.parquet", "--places", "all", "--next")
    assert sorted(set(pl.read_parquet(path)["cell"])) == list(range(1, 10))


def test_a_table_of_text_says_both_times_and_scores_nothing(forecast, stdist, city):
    """The store's clock is one hour ahead of UTC; its last frame is 23:00 of the eighth day."""
    result, path = forecast("next.csv", "--next", "--places", "2", "--json")
    assert path.read_text().splitlines()[0] == "origin,target,target_local,cell,step,forecast"
    lines = [line.rsplit(",", 1)[0] for line in path.read_text().splitlines()[1:]]
    assert lines == [
        "2013-11-08T22:00:00Z,2013-11-08T23:00:00Z,2013-11-09T00:00:00,2,1",
        "2013-11-08T22:00:00Z,2013-11-09T00:00:00Z,2013-11-09T01:00:00,2,2",
    ]
    assert result.json["origin"] == "2013-11-08T23:00" and result.json["frames_absent_behind_it"] == 0
    again = stdist("evaluate", path, city)
    assert again.code == 2 and "carries no contract" in again.err


def test_a_table_of_text_is_never_replaced(refused, stdist, finished_run, city, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("mine\n")
    line = refused("forecast", finished_run.run_dir, city, "--next", "--out", path)
    assert "mine.csv is there already" in line and "it stays as it is" in line


def test_the_first_steps_are_the_first_of_all(forecast, stdist, city):
    _, whole = forecast("whole.zarr")
    _, path = forecast("first.zarr", "--horizon", "1")
    with xarray.open_zarr(whole) as every, xarray.open_zarr(path) as first:
        np.testing.assert_array_equal(first["forecast"], every["forecast"][:, :1])
        assert first["target"].dims == ("origin", "step")
        assert (first["target_local"] - first["target"] == np.timedelta64(1, "h")).all()
    per_step = [stdist("evaluate", file, city, "--json").json["per_horizon"] for file in (whole, path)]
    assert [step["step"] for step in per_step[1]] == [1]
    assert per_step[1][0] == pytest.approx(per_step[0][0])


def test_a_store_that_ends_in_a_gap_is_forecast_behind_its_last_frame(finished_run, stdist, city, tmp_path):
    """The last day ends at 17:00, and two values of its last three frames were not measured."""
    whole = open_store(city)
    values = whole.values("internet", 0, 8 * 24).copy()
    present = np.ones(8 * 24, bool)
    present[7 * 24 + 18 :] = False
    values[7 * 24 + 16, 0, :2] = np.nan
    spec = GridSpec(
        whole.city, ("internet",), whole.days.first_day, whole.days.last_day, whole.cell_ids, 60, 60, whole.units
    )
    with GridWriter(tmp_path / "cut.zarr", spec, {"made by": "a test"}) as writer:
        for day in range(8):
            slots = slice(day * 24, (day + 1) * 24)
            writer.write_day(day, {"internet": values[slots]}, present[slots])
        writer.finalise(whole.default_split)
    out = tmp_path / "next.parquet"
    result = stdist("forecast", finished_run.run_dir, tmp_path / "cut.zarr", "--next", "--out", out)
    assert result.out == (
        f"{out}; behind 2013-11-08T17:00 local time; 6 frames of the store behind it are absent; 2 values of the "
        "history were missing and are imputed, as in training\n"
    )
    assert str(pl.read_parquet(out)["target_local"].min()) == "2013-11-08 18:00:00"
