"""Files to a run that watches its city: prepare, train, calibrate, append a day, watch."""

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import xarray
import yaml

from stdist import cli, memory
from stdist.files import read_sealed, write_sealed
from stdist.runs import watch, watch_file
from stdist.runs.recipes import load_config

from .conftest import URBAN, files_below

SLOTS, KNOWN, PLACES = 24, 24, 12
FIRST = np.datetime64("2024-03-04T00:00")
LAST_DAY = "2024-03-27"
Change = Callable[[np.ndarray], None]


def values_of(days: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    curve = 60 + 40 * np.sin(2 * np.pi * np.arange(days * SLOTS) / SLOTS)
    return curve[:, None] * rng.uniform(0.5, 2, PLACES) * rng.uniform(0.9, 1.1, (days * SLOTS, PLACES))


def write_days(path: Path, first: int, days: int, change: Change = lambda values: None) -> Path:
    """A wide table of some days; ``change`` takes their values [T, P]. NaN is an empty field."""
    values = values_of(KNOWN + 5)[first * SLOTS : (first + days) * SLOTS].copy()
    change(values)
    stamps = FIRST + np.timedelta64(1, "h") * (first * SLOTS + np.arange(len(values)))
    rows = [
        ",".join([str(stamp), *("" if np.isnan(v) else f"{v:.3f}" for v in row)])
        for stamp, row in zip(stamps, values, strict=True)
    ]
    path.write_text("\n".join(["time," + ",".join(f"s{i}" for i in range(PLACES)), *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def watched_once(tmp_path_factory) -> Path:
    """A folder with city.zarr, of 24 days, and runs/n, calibrated on the last 7 of them."""
    folder = tmp_path_factory.mktemp("watched")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_days(Path("first.csv"), 0, KNOWN)
        split = ["--train", "2024-03-04:2024-03-18", "--validation", "2024-03-19:2024-03-20"]
        split += ["--test", "2024-03-21:2024-03-27"]
        tree = URBAN | {"data": URBAN["data"] | {"store": "city.zarr"}}
        tree["training"] = URBAN["training"] | {"max_epochs": 8, "patience": 8, "learning_rate": 0.01}
        Path("c.yaml").write_text(yaml.safe_dump(tree))
        commands = (
            ["prepare", "table", "first.csv", "--out", "city.zarr", "--channel", "flow", *split],
            ["train", "c.yaml"],
            ["calibrate", "runs/n", "city.zarr", "--split", "2024-03-21:2024-03-27"],
        )
        for command in commands:
            patch.setattr(sys, "argv", ["stdist", *command])
            cli.main()
    return folder


@pytest.fixture
def append(watched_once, tmp_path, monkeypatch, stdist) -> Callable[..., None]:
    shutil.copytree(watched_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def append(first: int, days: int = 1, change: Change = lambda values: None, *options: str) -> None:
        result = stdist("append", "city.zarr", write_days(Path("more.csv"), first, days, change), *options)
        assert result.code == 0, result.err

    return append


def test_a_clean_day_is_nothing_unusual_and_looked_at_once(append, stdist):
    result = stdist("watch", "runs/n", "city.zarr")
    assert result.code == 0 and "nothing new: the run is calibrated on" in result.out
    assert not Path("runs/n/watch.json").exists()
    append(KNOWN)
    result = stdist("watch", "runs/n", "city.zarr", "--json")
    assert result.code == 0 and not result.json["news"] and result.json["span"] == "2024-03-28", result
    assert result.json["days"][0]["coverage"]["95 %"] > 0.85 and result.json["scores"]["points"] == 23 * 2 * PLACES
    before = files_below(Path())
    result = stdist("watch", "runs/n", "city.zarr")
    assert (result.code, result.out) == (
        0,
        "nothing new: 2024-03-28:2024-03-28 was watched before, and has no other values since\n",
    )
    assert files_below(Path()) == before
    assert sorted(path.name for path in Path("runs/n/forecasts").iterdir()) == ["test.zarr", "written.json"]


def test_its_scores_are_those_of_evaluate(append, stdist):
    append(KNOWN)
    watched = stdist("watch", "runs/n", "city.zarr", "--json").json
    assert stdist("forecast", "runs/n", "city.zarr", "--split", "2024-03-28:2024-03-28", "--out", "f.zarr").code == 0
    scored = stdist("evaluate", "f.zarr", "city.zarr", "--json").json
    quantiles = scored["quantiles"]["pooled"]
    covered = {name: each["coverage"] for name, each in quantiles["intervals"].items()}
    assert watched["scores"].pop("coverage") == pytest.approx(covered)
    errors = {name: scored["pooled"][name] for name in ("mae", "rmse")} | {"crps": quantiles["crps"]}
    expected = {"days": 1, "points": scored["contract"]["points"], **errors}
    assert watched["scores"] == pytest.approx(expected, rel=1e-5)


def test_a_planted_place_and_a_dead_sensor_are_named_once(append, stdist):
    def change(values: np.ndarray) -> None:
        values[:, 3] *= 4
        values[:, 7] = np.nan

    append(KNOWN, 1, change)
    result = stdist("watch", "runs/n", "city.zarr")
    lines = result.out.splitlines()
    assert result.code == 6 and "1 unusual places, 1 that stopped" in lines[0], result
    assert lines[1].startswith("s3: ") and "of 24 values outside the 95 % interval, 1." in lines[1]
    assert "expected, above, 2024-03-28T0" in lines[1] and lines[2] == "stopped reporting: s7"
    append(KNOWN + 1, 1, lambda values: values.__setitem__((slice(5, None), slice(None)), np.nan))
    assert stdist("watch", "runs/n", "city.zarr").out.startswith("nothing new"), "5 observed frames are no day"
    entry = stdist("watch", "runs/n", "city.zarr", "--again", "--json")
    (place,) = entry.json["unusual"]
    assert entry.code == 6 and entry.json["silent"] == ["s7"] and (place["place"], place["below"]) == ("s3", 0)
    # Corrected values of the same day: looked at anew, and what was said is not said again.

    def correct(values: np.ndarray) -> None:
        change(values)
        values[:, 5] = 1

    append(KNOWN, 1, correct, "--corrections")
    result = stdist("watch", "runs/n", "city.zarr", "--json")
    assert result.code == 6 and [each["place"] for each in result.json["unusual"]] == ["s5"]
    assert result.json["silent"] == [], "s7 still is, and that was said"


@pytest.mark.parametrize("name", ["scores.parquet", "scores.csv"])
def test_the_scores_of_all_places_are_those_of_the_forecasts(append, stdist, name):
    """Counted once more from the forecasts' table. K = 2: every second window has each value once."""

    def change(values: np.ndarray) -> None:
        values[:, 3] *= 4
        values[:, 7] = np.nan
        values[5, 2] = np.nan

    append(KNOWN, 1, change)
    said = stdist("watch", "runs/n", "city.zarr", "--out", name, "--json").json["unusual"]
    read = pl.read_parquet if name.endswith("parquet") else pl.read_csv
    table = {row.pop("cell"): row for row in read(name).iter_rows(named=True)}
    assert sorted(table) == sorted(f"s{i}" for i in range(PLACES)) and {len(row) for row in table.values()} == {10}
    assert [cell for cell, row in table.items() if row["unusual"]] == [entry["place"] for entry in said] == ["s3"]
    assert table["s3"]["chance"] == pytest.approx(said[0]["chance"]) and table["s0"]["chance"] > 0.01
    assert table["s3"]["above"] == said[0]["above"] / 24 and table["s3"]["below"] == 0
    silent = table.pop("s7")
    assert (silent.pop("silent"), silent.pop("unusual"), silent.pop("values")) == (True, False, 0)
    assert set(silent.values()) == {None} and not any(row["silent"] for row in table.values())

    assert stdist("forecast", "runs/n", "city.zarr", "--split", "2024-03-28:2024-03-28", "--out", "f.zarr").code == 0
    with xarray.open_zarr("f.zarr") as made:
        point, low, high = made["point"].values, made["forecast"][2].values, made["forecast"][6].values
    values = values_of(KNOWN + 5)[KNOWN * SLOTS : (KNOWN + 1) * SLOTS].copy()
    change(values)
    truth = np.stack([values[:-1], values[1:]], 1)  # [windows, K, places] of the windows within the day
    point, low, high = (array[-23:] for array in (point, low, high))
    for number in (0, 2, 3):
        row, seen = table[f"s{number}"], ~np.isnan(truth[..., number])
        errors = (truth - point)[..., number][seen]
        assert (row["mae"], row["mean_error"]) == pytest.approx((np.abs(errors).mean(), errors.mean()), rel=1e-4)
        once = seen.copy()
        once[1::2] = False
        inside = ((low <= truth) & (truth <= high))[..., number][once].mean()
        assert (row["values"], row["coverage_80"]) == (once.sum(), pytest.approx(inside))
        assert row["coverage_95"] == pytest.approx(1 - row["above"] - row["below"])


def test_a_table_of_scores_is_whole_and_replaces_nothing_else(append, stdist, refused, monkeypatch):
    append(KNOWN)
    for name, content in (("x.csv", "cell,values\n1,2\n"), ("x.parquet", "no Parquet"), ("y.csv", "\xff")):
        Path(name).write_text(content, encoding="latin-1")
        assert "holds no scores of places that `stdist watch` wrote" in refused(
            "watch", "runs/n", "city.zarr", "--out", name
        )
    Path("link.csv").symlink_to("new.csv")
    assert "link.csv holds no scores" in refused("watch", "runs/n", "city.zarr", "--out", "link.csv")
    assert "are a file of .parquet or .csv, not '.txt'" in refused("watch", "runs/n", "city.zarr", "--out", "x.txt")
    assert "lies inside the run folder" in refused("watch", "runs/n", "city.zarr", "--out", "runs/n/x.csv")
    result = stdist("watch", "runs/n", "city.zarr", "--out", "day.csv")
    assert result.code == 0, result
    before = Path("day.csv").read_bytes()
    assert "--again writes day.csv" in stdist("watch", "runs/n", "city.zarr", "--out", "day.csv").out
    append(KNOWN + 1)
    with monkeypatch.context() as patch:
        patch.setattr(watch, "write_table", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert stdist("watch", "runs/n", "city.zarr", "--out", "day.csv").code == 5
    assert Path("day.csv").read_bytes() == before
    result = stdist("watch", "runs/n", "city.zarr", "--out", "day.csv")
    assert result.code == 0 and result.out.startswith("2024-03-29, in brackets"), "what was not written is not noted"
    assert Path("day.csv").read_bytes() != before


def test_the_advice_names_the_places_that_were_calibrated_on(append, stdist):
    assert stdist("calibrate", "runs/n", "city.zarr", "--newest", "7", "--region", "2:8").code == 0
    append(KNOWN, 1, lambda values: values.__imul__(3))
    commands = stdist("watch", "runs/n", "city.zarr", "--json").json["commands"]
    assert commands["calibrate"] == "stdist calibrate runs/n city.zarr --newest 7 --region 2:8"


def test_a_drift_is_said_once_with_commands_that_run(append, stdist):
    append(KNOWN, 1, lambda values: values.__imul__(3))
    result = stdist("watch", "runs/n", "city.zarr", "--json")
    assert result.code == 6 and result.json["drift"] == ["2024-03-28"], result
    commands = result.json["commands"]
    assert commands["calibrate"] == "stdist calibrate runs/n city.zarr --newest 7"
    assert "same time yesterday" not in result.json["better"] and "persistence" in result.json["better"]
    _, _, path, *changes = shlex.split(commands["train"])
    split = load_config(Path(path), changes).data.split
    assert split is not None and [str(day) for day in (*split.train, *split.validation, *split.test)] == [
        "2024-03-04",
        "2024-03-20",
        "2024-03-21",
        "2024-03-24",
        "2024-03-25",
        "2024-03-28",
    ]
    append(KNOWN + 1, 1, lambda values: values.__imul__(3))
    result = stdist("watch", "runs/n", "city.zarr")
    assert "the drift that was said goes on: 2024-03-29" in result.out and "stdist calibrate" not in result.out
    append(KNOWN + 2, 2)  # the second of them with no history of the drift
    assert not stdist("watch", "runs/n", "city.zarr", "--json").json["drifting"]
    append(KNOWN + 4, 1, lambda values: values.__imul__(3))
    assert stdist("watch", "runs/n", "city.zarr", "--json").json["drift"] == ["2024-04-01"], "another one"
    assert stdist(*shlex.split(commands["calibrate"])[1:]).code == 0
    assert read_sealed(Path("runs/n/calibration.json"))["fitted"]["first_day"] == "2024-03-26"


def test_every_night_a_day_is_appended_watched_and_calibrated_on(append, stdist):
    """A day that came by halves is watched and calibrated on once it is whole, and every day is watched once."""
    nights = [
        (KNOWN, {}, "2024-03-28", "2024-03-22"),
        (KNOWN + 1, {"change": lambda values: values.__setitem__((slice(12, None), slice(None)), np.nan)}, None, None),
        (KNOWN + 1, {}, "2024-03-29", "2024-03-23"),
        (KNOWN + 3, {}, "2024-03-31", "2024-03-24"),  # a day is left out: the seventh whole one is a day earlier
    ]
    for first, change, watched, calibrated in nights:
        append(first, 1, **change)
        result = stdist("watch", "runs/n", "city.zarr", "--json")
        assert result.code == 0 and result.json.get("span") == watched, result
        result = stdist("calibrate", "runs/n", "city.zarr", "--newest", "7", "--json")
        assert result.code == 0 and result.json["days"] == 7, result
        fitted = read_sealed(Path("runs/n/calibration.json"))["fitted"]
        if calibrated:
            assert (fitted["first_day"], fitted["last_day"]) == (calibrated, watched)
        again = stdist("watch", "runs/n", "city.zarr")
        assert (again.code, again.out.startswith("nothing new: the run is calibrated on")) == (0, True)
    append(KNOWN + 2)
    assert "nothing new" in stdist("watch", "runs/n", "city.zarr").out, "it lies among the days calibrated on"


def test_newest_days_that_cannot_be_calibrated_on(append, refused):
    append(KNOWN)

    def line(*options: str) -> str:
        return refused("calibrate", "runs/n", "city.zarr", *options)

    assert "--split and --newest both say which days; give one of them" in line("--split", "test", "--newest", "7")
    assert (
        "--newest 26: city.zarr has 25 whole days, 2024-03-04 to 2024-03-28; append more, or ask for --newest 25"
        in (line("--newest", "26"))
    )
    assert "fitted on 2024-03-04:2024-03-18 of this data, which shares days with 2024-03-18:2024-03-28; 10 whole" in (
        line("--newest", "11")
    )
    assert "10 whole days are newer, ask for --newest 10 or fewer" in line("--newest", "25")
    assert "greater than or equal to 1" in line("--newest", "0")


def test_killed_it_says_it_twice_rather_than_never(append, stdist, monkeypatch, capsys):
    append(KNOWN, 1, lambda values: values.__setitem__((slice(None), 3), 999))
    before = files_below(Path("runs/n"))

    class Killed(BaseException):
        pass

    def killed(*arguments: object) -> None:
        raise Killed

    kills = ((watch, "compare", ""), (watch, "write_said", "s3: "), (watch_file, "write_sealed", "s3: "))
    for module, name, said in kills:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, killed)
            with pytest.raises(Killed):
                stdist("watch", "runs/n", "city.zarr")
        out = capsys.readouterr().out
        assert said in out and bool(said) == bool(out)
        left = {name for name in files_below(Path("runs/n")) if name not in before}
        assert all(name.startswith("forecasts/watch.zarr") for name in left)
    result = stdist("watch", "runs/n", "city.zarr")
    assert result.code == 6 and "s3: " in result.out
    assert set(files_below(Path("runs/n"))) - set(before) == {"watch.json"}


def test_what_cannot_be_watched_is_one_line(append, refused, stdist):
    append(KNOWN)
    run, path = Path("runs/n"), Path("runs/n/calibration.json")

    def line(*options: str, code: int = 2) -> str:
        return refused("watch", run, "city.zarr", *options, code=code)

    assert "--days 0: give 1 or more" in line("--days", "0")
    assert "No such option" in line("--region", "0:2")
    assert "none.zarr is not a grid store" in refused("watch", run, "none.zarr")
    assert "c.yaml is no run folder" in refused("watch", "c.yaml", "city.zarr")
    content = read_sealed(path)
    write_sealed(path, content | {"reference": None})
    assert "does not say how its days were scored" in line() and "run `stdist calibrate` again" in line()
    write_sealed(path, content | {"model": "0" * 64})
    assert "of another training or decoding" in line()
    write_sealed(path, content | {"fitted": content["fitted"] | {"data": "0" * 64}})
    result = stdist("watch", run, "city.zarr", "--days", str(10**30))
    assert result.code == 2 and "leak: " in result.err, "the model's own days are among them"
    write_sealed(path, content)
    assert stdist("watch", run, "city.zarr", "--days", str(10**30)).code == 0
    (run / "watch.json").write_text("{}")
    assert "watch.json is damaged; remove it" in line(code=4)
    path.unlink()
    assert "has no calibration to make quantiles with; run `stdist calibrate` first" in line()


def test_more_than_memory_holds_is_refused_before_it_is_forecast(append, refused, stdist, monkeypatch):
    needed = 47 * 2 * PLACES * 75
    monkeypatch.setattr(memory, "available", lambda: needed - 1)
    line = refused("calibrate", "runs/n", "city.zarr")
    assert line.startswith("calibrating on 47 windows of 2 steps and 12 places takes") and "by --region" in line
    monkeypatch.setattr(memory, "available", lambda: needed)
    result = stdist("calibrate", "runs/n", "city.zarr")
    assert result.code == 0 and "more than memory holds; their intervals are not scored" in result.err, result
    monkeypatch.setattr(memory, "available", lambda: 23 * 2 * PLACES * 250 - 1)
    assert refused("watch", "runs/n", "city.zarr").startswith("watching 2024-03-27:2024-03-27 takes")


def test_a_calibration_keeps_what_its_days_scored(append):
    kept = read_sealed(Path("runs/n/calibration.json"))["reference"]
    assert [day["day"] for day in kept["days"]] == [f"2024-03-{day}" for day in range(21, 28)]
    assert kept["points"] == [7 * SLOTS] * PLACES and json.dumps(kept)
    outside = sum(kept["outside"]) / sum(kept["points"])
    assert 0.02 < outside < 0.1


def test_what_was_forecast_before_its_truth_came_is_the_split_forecast_of_that_origin(append, stdist):
    """--next from the store that ends there, and the first window of the day that was appended since."""
    assert stdist("forecast", "runs/n", "city.zarr", "--next", "--out", "next.parquet").code == 0
    append(KNOWN)
    assert stdist("forecast", "runs/n", "city.zarr", "--split", "2024-03-28:2024-03-28", "--out", "f.parquet").code == 0
    ahead, later = pl.read_parquet("next.parquet"), pl.read_parquet("f.parquet")
    later = later.filter(pl.col("origin") == ahead["origin"][0])
    assert ahead.columns == later.columns and "q97.5" in ahead.columns and len(ahead) == 2 * PLACES
    for name in ahead.columns:
        if ahead[name].dtype.is_float():
            np.testing.assert_allclose(ahead[name], later[name], rtol=1e-5)
        else:
            assert ahead[name].to_list() == later[name].to_list()
