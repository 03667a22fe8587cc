"""Two processes on one run folder: the second is refused in one line; a kill frees the folder, a folder of somebody
else's is never a run's."""

import os
import platform
import shutil
import signal

import pytest

from .conftest import files_below

RUN = "runs/tiny"


def test_a_second_training_is_refused_and_a_kill_frees_the_folder(
    hanging_training, stdist, finished_run, tmp_path, monkeypatch
):
    shutil.copy(finished_run.folder / "tiny.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    process = hanging_training(tmp_path, "alignment", 1)  # before its first save, which a thread would still write
    before = files_below(tmp_path / RUN)
    second = stdist("train", "tiny.yaml")
    owner = f"process {process.pid} on {platform.node()}"
    assert second.code == 2 and f"error: {RUN} is being written by {owner} (since " in second.err
    assert second.err.count("\n") == 1 and files_below(tmp_path / RUN) == before
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=300)
    third = stdist("train", "tiny.yaml", "stages=[alignment]")
    assert "belongs to another config (stages" in third.err, "the lock of a killed process is no reason to refuse"


@pytest.mark.parametrize("kept", ["forecasts/of my own.csv", "report/index.html", "notes.txt"])
def test_a_folder_that_is_no_run_is_left_alone(refused, config, city, tmp_path, kept):
    """Its folder ``forecasts`` would be removed before the first step."""
    folder = tmp_path / "thesis"
    (folder / kept).parent.mkdir(parents=True)
    (folder / kept).write_text("years of work")
    assert "thesis holds other files" in refused("train", config, "name=thesis", f"output_dir={tmp_path}")
    assert "thesis holds other files" in refused("demo", "--out", folder, "--data", city)


def test_a_folder_of_the_name_that_is_a_file_is_left_alone(refused, config, tmp_path):
    (tmp_path / "thesis").write_text("years of work")
    assert "thesis is not a folder" in refused("train", config, "name=thesis", f"output_dir={tmp_path}")


def test_a_refused_training_leaves_no_folder_behind(refused, config, tmp_path):
    refused("train", config, "name=new", "output_dir=a/b", "data.channel=nothing")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("out", ["city.zarr/f.zarr", "city.zarr/deep/er/f.parquet", "runs/tiny/f.zarr"])
def test_forecasts_inside_a_store_or_a_run_are_refused(refused, finished_run, city, tmp_path, monkeypatch, out):
    shutil.copytree(city, tmp_path / "city.zarr")
    shutil.copytree(finished_run.folder / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    assert f"{out} lies inside the " in refused("forecast", RUN, "city.zarr", "--out", out)


@pytest.mark.parametrize("out", ["city.zarr", "link.zarr", "runs.zarr"])
def test_forecasts_over_what_is_no_forecast_are_refused(refused, finished_run, city, tmp_path, monkeypatch, out):
    """The store they are made on above all."""
    shutil.copytree(city, tmp_path / "city.zarr")
    shutil.copytree(finished_run.folder / "runs" / "tiny", tmp_path / "runs.zarr")
    (tmp_path / "link.zarr").symlink_to("city.zarr")
    monkeypatch.chdir(tmp_path)
    assert "it stays as it is" in refused("forecast", "runs.zarr", "city.zarr", "--out", out)


@pytest.mark.parametrize("name", ["a.zarr.partial/mine.txt", "city.zarr/zarr.json"])
def test_a_store_is_prepared_beside_what_is_there(refused, csv_command, tmp_path, name):
    command = csv_command("a")
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text("{}")
    if name.startswith("city"):
        command[command.index("--out") + 1] = str(tmp_path / "city.zarr" / "b.zarr")
    assert refused(*command).startswith(str(tmp_path / name).rpartition("/")[0])


def test_a_link_of_the_stores_name_stays(refused, csv_command, tmp_path):
    command = csv_command("a")
    (tmp_path / "a.zarr").symlink_to(tmp_path / "nowhere")
    assert "a.zarr exists already" in refused(*command)


def test_a_page_of_somebody_elses_stays(refused, finished_run, tmp_path):
    shutil.copytree(finished_run.run_dir, tmp_path / "run")
    (tmp_path / "run" / "report" / "index.html").write_text("<title>my home page</title>")
    assert "index.html is no page of stdist's" in refused("report", tmp_path / "run")
