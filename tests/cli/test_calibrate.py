"""A calibrated run from end to end: quantiles of forecasts, their scores, and every way a calibration does not fit."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import xarray
import yaml

from stdist.data import Day, open_store
from stdist.data.append import StoreAppender
from stdist.evaluation.conformal import ConformalQuantiles
from stdist.evaluation.levels import LEVELS
from stdist.files import read_sealed, write_sealed

COLUMNS = ["q2.5", "q5", "q10", "q25", "q50", "q75", "q90", "q95", "q97.5"]


@pytest.fixture(scope="session")
def calibrated_once(finished_run, city, tmp_path_factory) -> Path:
    from stdist.runs import recipes
    from stdist.runs.calibration import FORECASTS
    from stdist.runs.forecast_request import ForecastRequest

    run = Path(shutil.copytree(finished_run.run_dir, tmp_path_factory.mktemp("calibrated") / "tiny"))
    recipes.calibrate(ForecastRequest(run, city, None, "validation", run / FORECASTS), lambda line: None)
    return run


@pytest.fixture
def run(calibrated_once, tmp_path) -> Path:
    return Path(shutil.copytree(calibrated_once, tmp_path / "tiny"))


def read(path: Path) -> dict[str, np.ndarray]:
    with xarray.open_zarr(path) as made:
        return {name: made[name].values for name in made.variables}


def test_quantiles_are_those_of_the_validation_days_residuals(stdist, run, city, tmp_path):
    """The residuals read and the ranks applied once more, from a forecast without quantiles."""
    past, plain, out = tmp_path / "past.zarr", tmp_path / "plain.zarr", tmp_path / "out.zarr"
    for path, options in ((past, ["--split", "validation"]), (plain, [])):
        assert stdist("forecast", run, city, "--out", path, "--no-quantiles", *options).code == 0
    made = stdist("forecast", run, city, "--out", out, "--json")
    assert made.json["levels"] == list(LEVELS)
    store, old, new = open_store(city), read(past), read(out)
    frames = np.searchsorted(store.times, old["origin"])[:, None] + 1 + np.arange(2)
    truth, seen = (
        array[frames][:, :, :2, :2] for array in (store.values("internet", 0, 192), store.observed("internet"))
    )
    fit = ConformalQuantiles.fit(*(array.reshape(-1, 2, 4) for array in (old["forecast"], truth, seen)))
    expected = fit.quantiles(new["point"].reshape(-1, 2, 4), np.arange(4))
    np.testing.assert_allclose(new["forecast"].reshape(expected.shape), expected, rtol=1e-5)
    np.testing.assert_array_equal(new["point"], read(plain)["forecast"])
    assert (np.diff(new["forecast"], axis=0) >= 0).all()
    assert sorted(path.name for path in (run / "forecasts").iterdir()) == ["test.zarr", "written.json"]


def test_the_report_and_evaluate_say_the_same(stdist, run, city, tmp_path):
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    out = tmp_path / "f.parquet"
    assert stdist("forecast", run, city, "--out", out).code == 0
    scored = stdist("evaluate", out, city, "--json").json["quantiles"]
    own = metrics["quantiles"]["model"]
    assert own["pooled"]["points"] == scored["pooled"]["points"] == metrics["model"]["pooled"]["points"]
    assert own["pooled"]["crps"] == pytest.approx(scored["pooled"]["crps"], rel=1e-5)
    assert own["per_hour"][13]["intervals"]["95 %"] == pytest.approx(scored["per_hour"][13]["intervals"]["95 %"])
    assert list(metrics["quantiles"])[1:] == [
        "same time last week, its residuals by step",
        "ridge, Gaussian residuals by step",
    ]
    assert "NaN" not in json.dumps(metrics)
    page = (run / "report" / "index.html").read_text()
    assert "How sure it is" in page and "by 9 quantiles: twice their mean pinball loss" in page
    assert "80 % interval: coverage " in stdist("evaluate", out, city).out


def test_what_comes_next_has_the_quantiles_of_that_origin(stdist, run, city, tmp_path):
    """The last test window by its own last frame, and R = 3, whose level is 3 / 4."""
    past, again = tmp_path / "past.parquet", tmp_path / "next.parquet"
    assert stdist("forecast", run, city, "--out", past).code == 0
    origin = "2013-11-08T21:00"
    options = ["--origin", origin, "--cost-ratio", "3", "--quantiles"]
    assert stdist("forecast", run, city, "--out", again, *options).code == 0
    expected, table = pl.read_parquet(past), pl.read_parquet(again)
    expected = expected.filter(pl.col("origin") == expected["origin"].max())
    assert table.columns == [*expected.columns, "forecast_for_cost"] and expected.columns[-9:] == COLUMNS
    np.testing.assert_allclose(table.select("forecast", *COLUMNS), expected.select("forecast", *COLUMNS), rtol=1e-5)
    assert table["forecast_for_cost"].to_list() == table["q75"].to_list()
    with_cost = tmp_path / "next.zarr"
    assert stdist("forecast", run, city, "--out", with_cost, *options).code == 0
    arrays = read(with_cost)
    np.testing.assert_array_equal(arrays["forecast_for_cost"], arrays["forecast"][LEVELS.index(0.75)])
    scored = stdist("evaluate", with_cost, city, "--json").json
    assert scored["contract"]["windows"] == 1 and scored["contract"]["points"] == 2 * 4, "its truth has come"


def test_what_was_forecast_before_its_truth_came_is_the_split_forecast_of_that_origin(stdist, run, city, tmp_path):
    """--next from the store that ends there, and the first window of the day that was appended since."""
    store = Path(shutil.copytree(city, tmp_path / "grown.zarr"))
    ahead, later = tmp_path / "next.zarr", tmp_path / "later.zarr"
    assert stdist("forecast", run, store, "--next", "--out", ahead).code == 0
    with StoreAppender(store) as appender:
        old = appender.old
        appender.begin(old.days.last_day + 1)
        shape = old.slots_per_day, *old.shape
        day = {channel: np.full(shape, 7, np.float32) for channel in old.channels}
        appender.add(Day(len(old.days), day, np.ones(shape[0], bool)))
        assert appender.finish().new_days == ["2013-11-09"]
    assert stdist("forecast", run, store, "--split", "2013-11-09:2013-11-09", "--out", later).code == 0
    first, then = read(ahead), read(later)
    assert first["origin"][0] == then["origin"][0] and first["forecast"].shape[:2] == (len(LEVELS), 1)
    np.testing.assert_allclose(first["forecast"], then["forecast"][:, :1], rtol=1e-5)
    np.testing.assert_allclose(first["point"], then["point"][:1], rtol=1e-5)
    watched = stdist("watch", run, store, "--json", "--out", tmp_path / "places.csv")
    assert watched.json["span"] == "2013-11-09" and watched.json["scores"]["points"] == 23 * 2 * 4, watched
    assert watched.json["drift"] == [] and watched.json["usual_coverage"] == {}, "one day tells no range"
    table = pl.read_csv(tmp_path / "places.csv").sort("cell")
    where = [(row, column, old.cell_ids[row, column]) for row in range(2) for column in range(2)]
    assert table.select("row", "col", "cell").rows() == where and set(table["values"]) == {24}


def test_a_policy_that_answers_in_one_pass_has_its_own_distribution_corrected(stdist, run, city, tmp_path):
    """Its quantiles differ from window to window in more than the point forecast; its point forecasts stay."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["forecast"]["decoding"] = "direct"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    before, after = tmp_path / "before.zarr", tmp_path / "after.zarr"
    assert "of another training or decoding" in stdist("forecast", run, city, "--out", before).err
    assert stdist("forecast", run, city, "--out", before, "--no-quantiles").code == 0
    result = stdist("calibrate", run, city, "--json")
    assert result.code == 0, result.err
    assert stdist("forecast", run, city, "--out", after).code == 0
    scored = stdist("evaluate", after, city, "--json").json["quantiles"]["pooled"]
    assert scored["crps"] == pytest.approx(result.json["test"]["model"]["crps"], rel=1e-5)
    made = read(after)
    np.testing.assert_array_equal(made["point"], read(before)["forecast"])
    assert (np.diff(made["forecast"], axis=0) >= 0).all()
    assert read_sealed(run / "calibration.json")["corrects_own"] is True
    assert sorted(path.name for path in (run / "forecasts").iterdir()) == ["test.zarr", "written.json"]


def test_the_days_calibrated_on_are_not_scored(stdist, run, city, tmp_path):
    out = tmp_path / "f.parquet"
    assert stdist("forecast", run, city, "--split", "validation", "--out", out).code == 0
    refused = stdist("evaluate", out, city)
    assert refused.code == 2 and "leak: calibration fitted on 2013-11-07:2013-11-07" in refused.err
    assert (
        stdist("forecast", run, city, "--split", "validation", "--out", tmp_path / "p.zarr", "--no-quantiles").code == 0
    )
    assert stdist("evaluate", tmp_path / "p.zarr", city).code == 0


def test_a_calibration_that_does_not_fit(refused, run, city, tmp_path):
    def line(*options: object, code: int = 2) -> str:
        return refused("forecast", run, city, "--out", tmp_path / "f.csv", *options, code=code)

    assert "knows 4 places, 5 of these 9 are none of them, first 3; `stdist calibrate --region`" in line(
        "--places", "all"
    )
    assert "--cost-ratio 50 asks for the quantile 0.9804" in line("--cost-ratio", "50")
    path = run / "calibration.json"
    content = read_sealed(path)
    for name, value, said in (("K", 3, "is of K 3, these forecasts of 2"), ("channel", "sms_in", "of channel sms_in")):
        write_sealed(path, content | {"contract": content["contract"] | {name: value}})
        assert said in line() and "--no-quantiles" in line()
    write_sealed(path, content | {"model": "0" * 64})
    assert "is of another training or decoding than the run has now" in line()
    path.write_text(path.read_text().replace("0", "1", 1))
    assert "calibration.json is damaged" in line(code=4)
    path.unlink()
    assert "has no calibration to make quantiles with; run `stdist calibrate` first" in line("--quantiles")
    assert "--cost-ratio needs quantiles" in line("--cost-ratio", "3")


def test_days_that_cannot_be_calibrated_on(refused, run, city):
    assert "leak: " in refused("calibrate", run, city, "--split", "2013-11-05:2013-11-06")
    assert "no tset days" in refused("calibrate", run, city, "--split", "tset")


def test_calibrated_on_the_test_days_it_does_not_score_them(stdist, run, city):
    result = stdist("calibrate", run, city, "--split", "test", "--json")
    assert result.code == 0 and result.json["days"] == 1 and "test" not in result.json
    assert "their intervals are not scored" in result.err
