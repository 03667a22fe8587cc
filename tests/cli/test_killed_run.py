"""A whole training, killed or interrupted and started again, ends as if nothing had happened, bit for bit."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from safetensors.torch import load_file

RUN = Path("runs") / "tiny"


def _log(run_dir: Path) -> list[dict[str, Any]]:
    """The log's lines without their wall-clock times, and without those that say which process trained from where."""
    entries = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if entry.get("event") != "start"]
    return [{k: v for k, v in entry.items() if k != "time" and not k.startswith("seconds/")} for entry in steps]


def _require_same(folder: Path, result: dict[str, Any], finished_run) -> None:
    """Losses and metrics of every step of every stage, weights, forecasts and scores equal the uninterrupted run's."""
    assert _log(folder / RUN) == _log(finished_run.run_dir)
    expected = finished_run.result.json
    assert result["test"] == expected["test"] and result["baselines"] == expected["baselines"]
    for stage, summary in expected["stages"].items():
        assert {**result["stages"][stage], "seconds": 0} == {**summary, "seconds": 0}, stage
        checkpoint = Path("checkpoints") / stage / summary["checkpoint"]
        files = [
            path.relative_to(finished_run.run_dir) for path in (finished_run.run_dir / checkpoint).rglob("*.safet*")
        ]
        assert len(files) == (3 if stage == "grpo" else 2), files  # model, trainer state, and GRPO's adapter
        for path in files:
            ours, expected_tensors = _tensors(folder / RUN / path), _tensors(finished_run.run_dir / path)
            assert ours.keys() == expected_tensors.keys()
            assert all(torch.equal(ours[name], value) for name, value in expected_tensors.items()), path
    forecasts = [xarray.open_zarr(run / "forecasts" / "test.zarr") for run in (folder / RUN, finished_run.run_dir)]
    mine, theirs = (dataset["forecast"].values for dataset in forecasts)
    assert np.isfinite(theirs).all() and np.array_equal(mine, theirs)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """All but the state of torch's global generator, which is another one in every process."""
    return {name: value for name, value in load_file(path).items() if name != "torch_rng"}


def test_the_uninterrupted_run_learns_in_every_stage(finished_run):
    """Else the comparisons below would compare nothing."""
    for stage, steps in {"alignment": 3, "arithmetic": 3, "sft": 10, "grpo": 8}.items():
        lines = [entry for entry in _log(finished_run.run_dir) if entry["stage"] == stage and "event" not in entry]
        assert [entry["step"] for entry in lines] == list(range(1, steps + 1)), stage
        assert len({entry["grad_norm"] for entry in lines}) == steps and all(e["grad_norm"] > 0 for e in lines), stage


def test_no_stage_draws_from_the_global_generator(finished_run):
    """Its state differs between processes: whatever draws from it cannot be repeated by a resumed run."""
    states = sorted(finished_run.run_dir.glob("checkpoints/*/step-*/trainer_state/shard-*.safetensors"))
    assert len({path.parts[-4] for path in states}) == 4
    generators = [load_file(path)["torch_rng"] for path in states]
    assert all(torch.equal(generator, generators[0]) for generator in generators)


def test_killed_in_the_middle_of_sft(hanging_training, finish_training, finished_run, tmp_path):
    """SIGKILL behind step 5 of SFT: the save of step 4 does not count yet, optimiser and weights are of step 2."""
    shutil.copy(finished_run.folder / "tiny.yaml", tmp_path)
    process = hanging_training(tmp_path, "sft", 5)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    stages = tmp_path / RUN / "checkpoints"
    assert (stages / "arithmetic" / "finished.json").exists() and not (stages / "sft" / "finished.json").exists()
    assert _log(tmp_path / RUN)[-1]["step"] == 5 and (stages / "sft" / "latest").read_text() == "step-2"
    result, err = finish_training(tmp_path)
    assert "alignment: exact_match" in err and "sft: nrmse" in err
    _require_same(tmp_path, result, finished_run)


@pytest.fixture
def before_grpo(finished_run, tmp_path) -> Path:
    """The finished run as it was when GRPO began."""
    folder = tmp_path / "before_grpo"
    shutil.copytree(finished_run.folder, folder)
    for name in ("checkpoints/grpo", "forecasts", "report"):
        shutil.rmtree(folder / RUN / name)
    log = folder / RUN / "log.jsonl"
    kept = [line for line in log.read_text().splitlines() if json.loads(line)["stage"] != "grpo"]
    log.write_text("".join(f"{line}\n" for line in kept))
    return folder


@pytest.mark.slow
def test_ctrl_c_in_grpo(hanging_training, finish_training, stdist, before_grpo, finished_run, city):
    """SIGINT in step 3: that step is saved, though no save is due, the exit code is 130, and the run goes on there."""
    process = hanging_training(before_grpo, "grpo", 3)
    os.kill(process.pid, signal.SIGINT)
    (before_grpo / "go_on").touch()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    said = [line for line in err.splitlines() if line.startswith("interrupted: ")]
    assert said == ["interrupted: grpo: stopped at step 3 and saved; run the same command to resume"], err
    assert (before_grpo / RUN / "checkpoints" / "grpo" / "latest").read_text() == "step-3"
    assert _log(before_grpo / RUN)[-1]["step"] == 3

    refusal = stdist("forecast", before_grpo / RUN, city, "--out", before_grpo / "early.zarr")
    assert refusal.code == 2 and "has not finished its stage grpo" in refusal.err
    assert not (before_grpo / "early.zarr").exists()

    result, _ = finish_training(before_grpo)
    _require_same(before_grpo, result, finished_run)


def test_a_finished_run_only_reports_again(stdist, finished_run, tmp_path, monkeypatch):
    """The same command once more: no step, no forecast, the same result."""
    folder = tmp_path / "again"
    shutil.copytree(finished_run.folder, folder)
    log = (folder / RUN / "log.jsonl").read_text()
    forecast = folder / RUN / "forecasts" / "test.zarr" / "zarr.json"
    written = forecast.stat().st_mtime_ns
    monkeypatch.chdir(folder)
    result = stdist("train", "tiny.yaml", "--json")
    assert (folder / RUN / "log.jsonl").read_text() == log and forecast.stat().st_mtime_ns == written
    _require_same(folder, result.json, finished_run)
