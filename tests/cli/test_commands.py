"""What commands print, the JSON of each, and what asking for help costs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import xarray

from stdist.reader_commands import option_help

from .conftest import DAYS, SLOTS

COMMANDS = (
    "prepare",
    "check",
    "train",
    "demo",
    "forecast",
    "calibrate",
    "watch",
    "serve",
    "evaluate",
    "report",
    "doctor",
    "plan",
    "submit",
)


def test_help_needs_no_torch():
    """In a fresh process: nothing heavy is imported before a command needs it."""
    program = (
        "import sys; from stdist.cli import app; app(['--help'], standalone_mode=False); "
        "heavy = {'torch', 'transformers', 'zarr', 'xarray', 'polars', 'matplotlib', 'pydantic', 'ray'}; "
        "found = heavy & set(sys.modules); sys.exit(f'imported {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_takes_json(stdist, command):
    result = stdist(command, "--help")
    assert result.code == 0 and "--json" in result.out


def test_prepare(stdist, csv_command):
    command = csv_command("milan", {5: "1,NaN,0,4"})
    result = stdist(*command, "--json")
    assert result.code == 0 and len(result.out.splitlines()) == 1
    summary = result.json
    assert summary["read_as"] == result.err.strip() and "4 places `0`, `1`, `2`" in summary["read_as"]
    assert summary["said"] == [] and summary["path"] == command[4] and Path(command[4]).is_dir()
    assert (summary["city"], summary["channels"], summary["cells"]) == ("milan", ["internet"], 4)
    assert (summary["frames"], summary["runs"]) == (192, 1)
    assert summary["missing"] == {"internet": 1} and summary["true_zeros"] == {"internet": 1}


def test_a_reader_explains_its_data_and_its_own_options(stdist):
    page = stdist("prepare", "table", "--help").out
    assert "long ones a row a place and time" in " ".join(page.split())  # the data's facts
    assert "--id-width" in page and "--workers" in page and "--days" not in page
    flat = " ".join(page.replace("│", " ").split())
    assert "local ISO time of the first row, where there is no column of time" in flat  # of the docstring
    assert "--days" in stdist("prepare", "synthetic", "--help").out


def test_every_reader_has_a_page(stdist):
    from data_prep import READERS

    listed = stdist("prepare", "--help").out
    for reader in READERS:
        assert reader in listed
        page = stdist("prepare", reader, "--help")
        assert page.code == 0 and "--train" in page.out, reader


def test_every_option_of_a_reader_says_what_it_is():
    from data_prep import READERS

    for reader, each in READERS.items():
        _sources, *options = option_help(each.plan).items()
        assert not [name for name, text in options if not text], reader


def test_help_is_read_from_the_docstring():
    def plan(sources, *, city=None, row0=0, col0=0, seed=0, width=1):
        """Plan of one file: read in one part.

        city: by default the
        file's. row0, col0: the first ``cell``. seed: any number. Raises InputError for width: 0.
        """

    expected = {"city": "by default the file's", "row0": "the first cell", "col0": "the first cell"}
    expected |= {"seed": "any number", "width": "columns of the grid", "sources": None}
    assert option_help(plan) == expected


def test_prepare_on_two_processes_writes_the_same(stdist, tmp_path):
    size = ["--days", "3", "--height", "2", "--width", "2", "--cadence", "60", "--json"]
    one = stdist("prepare", "synthetic", "--out", tmp_path / "one.zarr", *size)
    two = stdist("prepare", "synthetic", "--out", tmp_path / "two.zarr", *size, "--workers", "2")
    assert one.json["digest"] == two.json["digest"] and two.code == 0


def test_check(stdist, city, csv_command):
    result = stdist("check", city, "--json")
    assert result.code == 0 and len(result.out.splitlines()) == 1 and result.err == ""
    assert result.json["ok"] is True and result.json["channels"]["internet"]["highest"] > 0
    people = stdist("check", city)
    assert people.code == 0 and people.out.endswith(f"{city}: sound; errors: 0, warnings: 0\n")
    command = csv_command("odd", {row: "1,0,3,4" for row in range(DAYS * SLOTS)})
    assert stdist(*command).code == 0
    warned = stdist("check", command[4], "--json")
    assert warned.code == 0 and "cells zero all the time (1)" in [f["what"] for f in warned.json["findings"]]


def test_check_names_a_damaged_shard_and_exits_4(stdist, city, tmp_path):
    store = Path(shutil.copytree(city, tmp_path / "city.zarr"))
    shard = store / "internet" / "c" / "3" / "0" / "0"
    damaged = bytearray(shard.read_bytes())
    damaged[100] ^= 4
    shard.write_bytes(damaged)
    result = stdist("check", store, "--json")
    assert result.code == 4 and len(result.out.splitlines()) == 1 and result.json["ok"] is False
    assert result.json["findings"][0] == {
        "severity": "error",
        "what": "bytes of the file are not the recorded ones",
        "where": "internet/c/3/0/0",
    }
    people = stdist("check", store)
    assert people.code == 4 and "internet/c/3/0/0" in people.out and "DAMAGED OR WRONG" in people.out


def test_forecasts_of_training_days_are_made_and_never_scored(stdist, finished_run, city, tmp_path):
    """The leak audit from end to end: the run's own training days, on its own store."""
    out = tmp_path / "f.zarr"
    made = stdist("forecast", finished_run.run_dir, city, "--out", out, "--split", "2013-11-06:2013-11-07")
    assert made.code == 0 and "`stdist evaluate` will not score these forecasts" in made.err
    refused = stdist("evaluate", out, city)
    assert refused.code == 2 and refused.out == ""
    whats = "reward normalizer, t_max of the frames, weights"
    assert refused.err.startswith(f"error: leak: {whats} fitted on 2013-11-01:2013-11-06 of this data, which shares")
    assert len(refused.err.splitlines()) == 1


def test_another_city_is_scored_on_any_day(stdist, finished_run, tmp_path):
    size = ["--height", "3", "--width", "3", "--days", "8", "--cadence", "60", "--seed", "2"]
    assert stdist("prepare", "synthetic", "--out", tmp_path / "other.zarr", *size).code == 0
    command = ["forecast", finished_run.run_dir, tmp_path / "other.zarr", "--out", tmp_path / "f.zarr"]
    assert stdist(*command, "--split", "2013-11-02:2013-11-02").code == 0
    assert stdist("evaluate", tmp_path / "f.zarr", tmp_path / "other.zarr", "--json").json["pooled"]["mae"] > 0


def test_train(finished_run):
    """One JSON object is all of standard output; progress and milestones go to standard error."""
    result = finished_run.result.json
    assert len(finished_run.result.out.splitlines()) == 1
    assert list(result) == ["run", "stages", "test", "mean_of_horizons", "baselines", "report"]
    assert list(result["stages"]) == ["alignment", "arithmetic", "sft", "grpo"]
    assert result["stages"]["sft"]["steps"] == 10 and result["test"]["nrmse"] > 0
    assert (finished_run.folder / result["report"]).is_file()
    milestones = ("run runs/tiny: synthetic, ", "alignment: exact_match", "grpo: nrmse", "test NRMSE")
    for milestone in milestones:
        assert milestone in finished_run.result.err


def test_forecast_evaluate_and_report(stdist, finished_run, city, tmp_path, monkeypatch):
    """The commands redo what training ended with: the same forecasts and the same scores."""
    monkeypatch.chdir(tmp_path)
    made = stdist("forecast", finished_run.run_dir, city, "--out", "f.zarr", "--json")
    checkpoint = finished_run.result.json["stages"]["grpo"]["checkpoint"]
    assert made.json == {"out": "f.zarr", "windows": 23, "checkpoint": f"grpo/{checkpoint}"}
    assert len(made.out.splitlines()) == 1 and "23 windows" in made.err
    mine = xarray.open_zarr("f.zarr")["forecast"]
    trained = xarray.open_zarr(finished_run.run_dir / "forecasts" / "test.zarr")["forecast"]
    assert mine.shape == (23, 2, 2, 2) and mine.dims == ("origin", "step", "row", "col")
    xarray.testing.assert_allclose(mine, trained)

    scored = stdist("evaluate", "f.zarr", city, "--json")
    assert scored.json["pooled"]["nrmse"] == pytest.approx(finished_run.result.json["test"]["nrmse"], rel=1e-5)
    assert scored.json["contract"]["S"] == 3 and scored.json["contract"]["K"] == 2
    people = stdist("evaluate", "f.zarr", city)
    assert "pooled: MAE " in people.out and "mean of horizons: " in people.out


def test_forecast_of_other_days_and_cells_as_a_table(stdist, finished_run, city, tmp_path):
    import polars as pl

    out = tmp_path / "f.parquet"
    command = ["forecast", finished_run.run_dir, city, "--out", out, "--region", "1:3,2:3", "--split"]
    result = stdist(*command, "2013-11-02:2013-11-02")
    assert result.code == 0 and result.out == f"{out}\n"
    table = pl.read_parquet(out)
    assert set(table["cell"]) == {6, 9} and set(table["step"]) == {1, 2} and len(table) == 23 * 2 * 2


def test_report_of_a_run(stdist, finished_run):
    result = stdist("report", finished_run.run_dir, "--json")
    page = finished_run.run_dir / "report" / "index.html"
    assert result.json == {"report": str(page)} and "<html" in page.read_text()


def test_report_of_an_unfinished_run_says_what_is_missing(stdist, finished_run, tmp_path):
    run = tmp_path / "unfinished"
    run.mkdir()
    (run / "config.yaml").write_text((finished_run.run_dir / "config.yaml").read_text())
    result = stdist("report", run)
    assert result.code == 0 and "No metrics yet" in (run / "report" / "index.html").read_text()


def test_report_with_another_run_beside(stdist, finished_run, tmp_path):
    for name in ("mine", "without_frames"):
        shutil.copytree(finished_run.run_dir, tmp_path / name)
    result = stdist("report", tmp_path / "mine", "--beside", tmp_path / "without_frames")
    assert result.code == 0
    metrics = json.loads((tmp_path / "mine" / "report" / "metrics.json").read_text())
    assert list(metrics["variants"]) == ["without_frames"]
    assert "without_frames" in (tmp_path / "mine" / "report" / "index.html").read_text()


@pytest.mark.slow
def test_demo(stdist, tmp_path):
    """The whole pipeline on the generated city: it learns, and beats repeating the last value."""
    result = stdist("demo", "--out", tmp_path / "demo", "--json")
    assert result.code == 0
    demo = result.json
    assert Path(demo["report"]).is_file()
    alignment, sft = demo["stages"]["alignment"], demo["stages"]["sft"]
    assert alignment["after"]["exact_match"] > alignment["before"]["exact_match"]
    assert sft["after"]["nrmse"] < 0.5 * sft["before"]["nrmse"]
    assert demo["test"]["nrmse"] < demo["baselines"]["persistence"]


def test_doctor_says_which_attention_runs_and_why(stdist):
    result = stdist("doctor", "--json")
    assert result.code == 0
    cpu = result.json["devices"][0]
    assert cpu["device"] == "cpu" and set(cpu["attention"]) == {"float32", "bfloat16"}
    assert all(choice["back_end"] in choice["reason"] for choice in cpu["attention"].values())
    assert result.json["packages"]["torch"] and "attention in float32: " in stdist("doctor").out


def test_doctor_says_where_the_token_of_a_cluster_is_and_not_what(stdist, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    assert stdist("doctor", "--json").json["ray"] == {"mode": "token", "token": None}
    (tmp_path / "token").write_text("secret")
    people = stdist("doctor").out
    assert f"ray: RAY_AUTH_MODE=token, a token in {tmp_path / 'token'}" in people and "secret" not in people
