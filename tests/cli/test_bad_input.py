"""Every bad input: exit code 2, one line that says what, where and what to do, and nothing written.

The fixture ``refused`` checks the code, the one ``error:`` line, empty standard output, and that no file below the
test's folder appeared, vanished or changed.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from stdist.errors import DivergenceError, InputError, Interrupted

# --- prepare -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("1,quite a lot,3,4", ["line 6, column 2", "'quite a lot' is not a finite number", "blank means missing"]),
        ("1,inf,3,4", ["line 6, column 2", "not a finite number"]),
        ("1,2,3", ["line 6", "3 columns instead of 4", "broken, blank, or the file was cut short"]),
        ("1,2,3,4,5", ["line 6", "5 columns instead of 4"]),
        ("1,-2,3,4", ["internet is -2 at 2013-11-01T05:00, place 1", "--missing -2 where it means missing"]),
    ],
)
def test_a_broken_csv(refused, csv_command, row, expected):
    line = refused(*csv_command("broken", {5: row}))
    assert "broken.csv" in line and all(part in line for part in expected)


def test_missing_values_of_a_csv_are_counted_not_refused(stdist, csv_command):
    command = csv_command("gaps", {5: "1,NaN,3,4", 9: "1,,,4"})
    result = stdist(*command)
    assert result.code == 0 and "3 values missing and imputed" in result.out
    assert result.err.startswith("read as: wide, a column a place, no header")


def test_a_csv_without_its_start(refused, csv_command):
    command = csv_command("city")
    del command[command.index("--start") :][:2]
    line = refused(*[part for part in command if part not in ("--start", "2013-11-01")])
    assert "has no column of time" in line and "--start 2013-11-01T00:00" in line


def test_the_hourly_look_alike_of_the_raw_files(refused, tmp_path):
    source = tmp_path / "sms-call-internet-mi-2013-11-01.csv"
    source.write_text(
        "datetime,CellID,countrycode,smsin,smsout,callin,callout,internet\n2013-11-01 00:00:00,1,0,.3,,,,\n"
    )
    line = refused("prepare", "telecom-italia", source, "--out", tmp_path / "milan.zarr")
    assert str(source) in line and "hourly re-release with a header" in line
    assert "give the original tab-separated 10-minute files" in line


def test_an_unknown_reader(refused, tmp_path):
    line = refused("prepare", "telecom", tmp_path / "a.txt", "--out", tmp_path / "a.zarr")
    assert line == "no reader 'telecom'; did you mean 'telecom-italia'?"


def test_an_option_the_reader_does_not_take(refused, csv_command):
    line = refused(*csv_command("city"), "--days", "3")
    assert line.startswith("No such option: --days") and line.endswith("prepare table --help`")
    line = refused("prepare", "synthetic", "--out", "a.zarr", "--id-width", "100")
    assert line.startswith("No such option: --id-width")


def test_options_that_are_no_numbers_or_lacking(refused, csv_command):
    line = refused(*csv_command("city"), "--width", "many")
    assert line.startswith("Invalid value for '--width'") and line.endswith("prepare table --help`")
    line = refused("prepare", "synthetic")
    assert line.startswith("Missing option '--out'")


def test_workers_of_two_kinds(refused, tmp_path):
    line = refused("prepare", "synthetic", "--out", tmp_path / "a.zarr", "--workers", "2", "--ray", "auto")
    assert line == "--workers 2 are of this machine, --ray auto has its own; give one of the two"


def test_a_cluster_that_is_not_there(refused, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'stdist[cluster]'")
    line = refused("prepare", "synthetic", "--out", tmp_path / "a.zarr", "--days", "2", "--ray", "127.0.0.1:1")
    assert line.startswith("nothing answers at 127.0.0.1:1 (Connection refused)")


def test_ray_is_needed_for_a_cluster_alone(refused, stdist, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("cluster", "preparation"):
        monkeypatch.delitem(sys.modules, f"stdist.orchestration.{name}", raising=False)
    line = refused("prepare", "synthetic", "--out", tmp_path / "a.zarr", "--days", "2", "--ray", "auto")
    assert line == "Ray is not installed; pip install 'stdist[cluster]', or leave out --ray"
    size = ["--days", "2", "--height", "2", "--width", "2", "--cadence", "60"]
    assert stdist("prepare", "synthetic", "--out", tmp_path / "a.zarr", *size).code == 0


def test_a_store_is_never_overwritten(stdist, refused, csv_command):
    command = csv_command("city")
    assert stdist(*command).code == 0
    line = refused(*command)
    assert line == f"{command[4]} exists already; remove it or choose another name"


def test_a_source_that_is_not_there(refused, tmp_path):
    line = refused("prepare", "table", tmp_path / "a.csv", "--out", tmp_path / "a.zarr", "--start", "2013-11-01")
    assert f"{tmp_path / 'a.csv'} is not a file" in line


# --- train ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sft.learning_rte=1", ["tiny.yaml", "unknown key 'sft.learning_rte'", "did you mean 'learning_rate'?"]),
        ("data.history=long", ["tiny.yaml", "data.history", "valid integer"]),
        ("data.history=5000", ["no window fits train", "gap-free run has 144 frames", "S + K needs 5002", "smaller S"]),
        ("data.region=0:9,0:2", ["region 0:9,0:2 leaves the grid of 3 rows x 3 columns", "stay inside"]),
        ("data.region=0-9", ["region '0-9' is not r0:r1,c0:c1", "write it as"]),
        ("data.channel=sms_in", ["city.zarr has no channel 'sms_in'", "it has internet"]),
        ("data.store=tiny.yaml", ["tiny.yaml is not a grid store", "stdist prepare"]),
        ("data.store=nowhere.zarr", ["nowhere.zarr is not a grid store: it does not exist", "stdist prepare"]),
        ("policy.base=./nowhere", ["policy.base ./nowhere cannot be loaded", "give a folder or one of tiny, small"]),
    ],
)
def test_a_configuration_that_cannot_be(refused, config, override, expected, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refused("train", config, override)
    assert all(part in line for part in expected), line


def test_a_configuration_that_is_not_there(refused, tmp_path):
    assert refused("train", tmp_path / "a.yaml") == f"config {tmp_path / 'a.yaml'} does not exist"


def test_a_split_without_its_days(refused, config):
    split = "{train: [2013-11-01, 2013-11-02], validation: [2013-11-03, 2013-11-03], test: [2014-02-01, 2014-02-02]}"
    line = refused("train", config, f"data.split={split}")
    assert "span 2014-02-01:2014-02-02 leaves the days of" in line and "choose days within" in line


def _copy_cut_short(store: Path, out: Path) -> str:
    """A copy of a store, one of whose shards lacks its last ten bytes; returns that shard's name."""
    shutil.copytree(store, out)
    shard = max((path for path in (out / "internet" / "c").rglob("*") if path.is_file()), key=str)
    shard.write_bytes(shard.read_bytes()[:-10])
    return str(shard.relative_to(out))


def test_a_store_that_was_cut_short(refused, config, city, finished_run, tmp_path):
    shard = _copy_cut_short(city, tmp_path / "cut.zarr")
    for command in (
        ["train", config, "data.store=cut.zarr"],
        ["forecast", finished_run.run_dir, "cut.zarr", "--out", "f.zarr"],
        ["evaluate", finished_run.run_dir / "forecasts" / "test.zarr", "cut.zarr"],
    ):
        line = refused(*command, code=4)
        assert f"cut.zarr is damaged: {shard} has " in line and "make it again, or copy it again" in line


def test_a_run_folder_of_another_configuration(refused, finished_run, tmp_path, monkeypatch):
    shutil.copytree(finished_run.folder, tmp_path / "runs-of-another")
    monkeypatch.chdir(tmp_path / "runs-of-another")
    line = refused("train", "tiny.yaml", "sft.learning_rate=0.5")
    assert line.startswith("runs/tiny belongs to another config (sft.learning_rate is 0.001 there, 0.5 here); choose ")


# --- values without a numeral --------------------------------------------------------------------------------------


@pytest.fixture
def huge(stdist, csv_command, config) -> Path:
    """A store with two values that two-digit numerals cannot write, on a training and on the test day."""
    command = csv_command("huge", {5: "5,2e6,5,5", 7 * 24 + 3: "5,5,5,2e6"})
    assert stdist(*command).code == 0
    return Path(command[4])


@pytest.mark.parametrize("command", ["train", "plan"])
def test_values_without_a_numeral_are_found_before_training(refused, config, huge, command):
    line = refused(command, config, f"data.store={huge}")
    assert line == (
        f"{huge}: internet is 2e+06 at 2013-11-01T05:00 local time, cell 2 (2 such values); numerals end below 995000: "
        "rescale the data, or set numerals.out_of_range=clamp"
    )


def test_values_without_a_numeral_on_the_test_day_only(refused, stdist, csv_command, config):
    command = csv_command("huge", {7 * 24 + 3: "5,5,5,2e6"})
    assert stdist(*command).code == 0
    assert "internet is 2e+06 at 2013-11-08T03:00 local time, cell 4 (1 such value)" in refused(
        "train", config, f"data.store={command[4]}"
    )


def test_values_outside_the_region_need_no_numeral(stdist, config, huge):
    result = stdist(
        *["train", config, f"data.store={huge}", "data.region=1:2,0:1", "stages=[sft]"],
        *["sft.max_steps=1", "sft.windows_per_step=1", "forecast.windows_per_batch=64"],
    )
    assert result.code == 0 and "clamped" not in result.err


def test_clamped_values_are_counted_and_reported(stdist, config, huge, tmp_path):
    """On standard error before training, and as a note in metrics.json and on the page."""
    result = stdist(
        *["train", config, f"data.store={huge}", "stages=[sft]", "numerals.out_of_range=clamp", "--json"],
        *["sft.max_steps=1", "sft.windows_per_step=1", "forecast.windows_per_batch=64"],
    )
    assert result.code == 0
    note = "(2 such values); numerals end below 995000, larger values are clamped"
    page = Path(result.json["report"])
    assert note in result.err and note in (page.parent / "metrics.json").read_text() and note in page.read_text()


# --- forecast, evaluate, report ------------------------------------------------------------------------------------


def test_a_forecast_from_an_unfinished_run(refused, finished_run, city, tmp_path):
    run = tmp_path / "unfinished"
    run.mkdir()
    shutil.copy(finished_run.run_dir / "config.yaml", run)
    line = refused("forecast", run, city, "--out", tmp_path / "f.zarr")
    assert line.startswith(f"{run} has not finished its stage grpo; run `stdist train` on its config again")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--out", "f.xlsx"], ["f.xlsx", "files of .zarr, .parquet or .csv", "change --out"]),
        (["--out", "f.csv", "--places", "17"], ["no place '17'; the nearest names are 7, 1, 9"]),
        (["--out", "f.csv", "--places", "1", "--region", "0:1,0:1"], ["--region and --places", "give one of them"]),
        (["--out", "f.csv", "--horizon", "3"], ["forecasts 2 steps (120 minutes) and no further", "data.horizon=3"]),
        (["--out", "f.csv", "--horizon", "0"], ["--horizon 0", "ask for 1 to 2"]),
        (["--out", "f.zarr", "--region", "0:9,0:2"], ["region 0:9,0:2 leaves the grid of 3 rows x 3 columns"]),
        (["--out", "f.zarr", "--split", "tset"], ["no tset days", "local days A:B"]),
        (["--out", "f.zarr", "--split", "2014-02-01:2014-02-02"], ["leaves the days", "choose days within"]),
    ],
)
def test_a_forecast_that_cannot_be(refused, finished_run, city, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    line = refused("forecast", finished_run.run_dir, city, *arguments)
    assert all(part in line for part in expected), line


def test_a_run_that_is_not_there(refused, finished_run, city, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "nowhere is no run folder" in refused("forecast", "nowhere", city, "--out", "f.zarr")
    assert "nowhere: no run folder" in refused("report", "nowhere")
    line = refused("report", finished_run.run_dir, "--beside", "nowhere")
    assert line == "nowhere/report/metrics.json does not exist; name the folder of a finished `stdist train`"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "model.safetensors": _cut,
    "policy.json": _cut,
    "adapter/adapter_model.safetensors": _cut,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint(refused, finished_run, city, tmp_path, monkeypatch, name):
    run = tmp_path / "run"
    shutil.copytree(finished_run.run_dir, run)
    monkeypatch.chdir(tmp_path)
    checkpoint = Path("run") / "checkpoints" / "grpo" / finished_run.result.json["stages"]["grpo"]["checkpoint"]
    DAMAGES[name](checkpoint / name)
    line = refused("forecast", "run", city, "--out", "f.zarr", code=4)
    assert line.startswith(str(checkpoint)) and "is damaged" in line
    if name.endswith(".safetensors"):
        assert f"delete {checkpoint.parent} to redo the stage" in line


def test_forecasts_of_another_store(refused, stdist, finished_run, csv_command):
    command = csv_command("other")
    assert stdist(*command).code == 0
    line = refused("evaluate", finished_run.run_dir / "forecasts" / "test.zarr", command[4])
    assert "score them on the store they were made on" in line


def test_forecasts_that_are_none(refused, city, tmp_path):
    assert "no such forecasts" in refused("evaluate", tmp_path / "f.zarr", city)
    assert "carries no contract, so it was not written by stdist" in refused("evaluate", city, city)


# --- main ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("no such thing [bold]here[/bold]"), 2, "error: no such thing [bold]here[/bold]"),
        (DivergenceError("sft: loss is nan at step 3"), 3, "error: sft: loss is nan at step 3"),
        (Interrupted("sft: stopped at step 3"), 130, "interrupted: sft: stopped at step 3"),
        (InputError("a long line " * 30), 2, "error: " + "a long line " * 30),
    ],
)
def test_main_turns_each_failure_into_its_code_and_one_line(stdist, config, monkeypatch, error, code, line):
    from stdist.runs import recipes

    monkeypatch.setattr(recipes, "train", lambda *_, **__: (_ for _ in ()).throw(error))
    result = stdist("train", config)
    assert result.code == code and result.out == ""
    assert result.err.rstrip("\n").rstrip() == line.rstrip() and result.err.count("\n") == 1


def test_a_bug_keeps_its_traceback(stdist, config, monkeypatch):
    from stdist.runs import recipes

    monkeypatch.setattr(recipes, "train", lambda *_, **__: (_ for _ in ()).throw(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        stdist("train", config)


def test_wrong_usage_names_the_option(stdist):
    result = stdist("prepare", "synthetic")
    assert result.code == 2 and "--out" in result.err and result.out == ""
    result = stdist("nonsense")
    assert result.code == 2 and "nonsense" in result.err


def test_the_tiny_configuration_of_these_tests_is_valid(config):
    assert yaml.safe_load(config.read_text())["name"] == "tiny"


@pytest.mark.parametrize("command", ["plan", "train"])
def test_training_days_without_traffic(refused, stdist, csv_command, config, command):
    zeros = csv_command("still", dict.fromkeys(range(6 * 24), "0,0,0,0"))
    assert stdist(*zeros).code == 0
    line = refused(command, config, f"data.store={zeros[4]}")
    assert line.startswith(f"{zeros[4]}: internet is zero all over ") and line.endswith("; train on other days")


@pytest.mark.parametrize("command", ["plan", "train"])
def test_parts_of_a_batch_that_are_not_equal(refused, config, tmp_path, command):
    """The same words before a training and before its plan."""
    line = refused(command, config, f"output_dir={tmp_path}", "arithmetic.gradient_accumulation_steps=3")
    assert line.startswith("arithmetic.gradient_accumulation_steps 3 does not divide the ")


@pytest.mark.parametrize("out", ["", ".", "/", "runs/.."])
def test_a_demo_without_a_folder(refused, city, out):
    line = refused("demo", "--data", city, "--out", out)
    assert line.startswith("--out ") and line.endswith("names no folder of its own; give one, as runs/demo")
