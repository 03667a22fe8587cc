"""A forecast killed for real and started again writes the bytes of an undisturbed one, and computes the rest only."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from stdist.evaluation import Chunk, ForecastWriter
from stdist.training.checkpoint import StageCheckpoints

from .conftest import PATIENCE, Command, files_below

HANGING_MAIN = """
import sys, time
from pathlib import Path
from stdist.evaluation import ForecastWriter

write, hang_at = ForecastWriter.write, int(sys.argv.pop())

def write_then_hang(self, *arguments):
    write(self, *arguments)
    if len(self.grid.chunks()) - len(self.remaining) == hang_at:
        Path("hanging").touch()
        time.sleep(3600)

ForecastWriter.write = write_then_hang
from stdist.cli import main
main()
"""


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """The finished run, whose forecast of 23 windows is twelve pieces and draws candidates."""
    folder = tmp_path / "run"
    shutil.copytree(finished_run.run_dir, folder)
    config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    config["forecast"] = {"decoding": "sample", "num_generations": 3, "windows_per_batch": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def pieces_written(monkeypatch) -> list[int]:
    """Cells × windows of every piece written in this process."""
    sizes: list[int] = []
    write = ForecastWriter.write
    monkeypatch.setattr(
        ForecastWriter, "write", lambda self, chunk, *rest: sizes.append(chunk.size) or write(self, chunk, *rest)
    )
    return sizes


def kill_a_forecast(folder: Path, arguments: list[str], pieces: int) -> None:
    """Runs the command in ``folder`` until so many pieces are written, then sends SIGKILL."""
    process = Command(folder, *arguments, str(pieces), program=HANGING_MAIN)
    deadline = time.monotonic() + PATIENCE
    while not (folder / "hanging").exists():
        assert process.returncode is None, process.communicate()
        assert time.monotonic() < deadline, f"no {pieces} pieces in time"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("name", ["f.zarr", "f.parquet"])
def test_killed_in_the_middle(stdist, run, city, tmp_path, pieces_written, name):
    for folder in ("killed", "undisturbed"):
        (tmp_path / folder).mkdir()
    killed, undisturbed = tmp_path / "killed" / name, tmp_path / "undisturbed" / name
    kill_a_forecast(tmp_path / "killed", ["forecast", str(run), str(city), "--out", name], pieces=7)
    assert not killed.exists() and (tmp_path / "killed" / f"{name}.partial").is_dir()

    again = stdist("forecast", run, city, "--out", killed, "--json")
    assert again.code == 0 and again.json["windows"] == 23
    assert f"{killed}.partial holds 7 chunks of 12, going on from there\n" in again.err
    assert pieces_written == [8] * 4 + [4]
    pieces_written.clear()
    assert stdist("forecast", run, city, "--out", undisturbed).code == 0
    assert pieces_written == [8] * 11 + [4]
    (tmp_path / "killed" / "hanging").unlink()
    assert files_below(killed.parent) == files_below(undisturbed.parent)


def test_a_run_killed_while_it_forecasts(stdist, finished_run, city, tmp_path, monkeypatch, pieces_written):
    """Its last step goes on too, in the run folder, with the notes a reader of the forecasts should know."""
    folder = tmp_path / "again"
    shutil.copytree(finished_run.folder, folder)
    for name in ("forecasts", "report"):
        shutil.rmtree(folder / "runs" / "tiny" / name)
    kill_a_forecast(folder, ["train", "tiny.yaml"], pieces=1)
    monkeypatch.chdir(folder)
    result = stdist("train", "tiny.yaml", "--json")
    assert result.json["test"] == finished_run.result.json["test"] and pieces_written == [7 * 4]
    made, undisturbed = folder / "runs" / "tiny" / "forecasts", finished_run.run_dir / "forecasts"
    assert files_below(made / "test.zarr") == files_below(undisturbed / "test.zarr")
    notes = [json.loads((forecasts / "written.json").read_text())["notes"] for forecasts in (made, undisturbed)]
    assert notes[0] == notes[1] and not list(made.glob("*.partial"))


def test_another_checkpoints_pieces_are_not_mixed_in(stdist, run, city, tmp_path, monkeypatch, pieces_written):
    """A stage that was trained again leaves a checkpoint of the same name; its closing summary differs."""
    out = tmp_path / "f.zarr"

    def interrupted(self: ForecastWriter) -> list[Chunk]:
        return self.grid.chunks()[:5]

    with monkeypatch.context() as patch:
        patch.setattr(ForecastWriter, "remaining", property(interrupted))
        with pytest.raises(AssertionError, match="5 chunks are missing"):
            stdist("forecast", run, city, "--out", out)
    stage = StageCheckpoints(run / "checkpoints" / "grpo")
    assert stage.finished
    stage.finish(stage.finished | {"seconds": 0.0})
    pieces_written.clear()
    again = stdist("forecast", run, city, "--out", out)
    assert f"{out}.partial holds 5 chunks made with another training; they are discarded\n" in again.err
    assert len(pieces_written) == 12 and out.is_dir() and not Path(f"{out}.partial").exists()
