"""Commands killed at random moments as tests: a few in the ordinary suite, and 200 as ``slow``."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from .kills import contents

ROOT = Path(__file__).parents[2]


def kill(count: int, *options: str) -> None:
    program = [sys.executable, "-m", "tests.faults.kills", "--kills", str(count), "--seed", "17", *options]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["trials"] == count


def test_some_of_the_kills():
    kill(4, "--only", "prepare")


@pytest.mark.slow
def test_a_hundred_and_fifty_kills():
    kill(150)


@pytest.mark.slow
def test_fifty_kills_on_ray():
    kill(50, "--ray")


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "runs" / "new"
    state = folder / "step-1" / "trainer_state"
    state.mkdir(parents=True)
    save_file({"moment": np.arange(3.0), "torch_rng": np.arange(5)}, state / "shard.safetensors")
    (folder / "log.jsonl").write_text('{"event": "start"}\n{"step": 1, "loss": 2.0, "time": 3.0}\n')
    (folder / "result.json").write_text('{"mae": 1.0, "seconds": 2, "table": [["seconds sampling", 3], ["reward", 4]]}')
    (folder / "index.html").write_text("<p>nrmse 1.0 (3 steps, 2 s)</p>")
    (folder / "values").write_bytes(b"12")
    return folder


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("log.jsonl", "2.0", "2.5"),
        ("result.json", "1.0", "1.5"),
        ("result.json", "4", "5"),
        ("index.html", "1.0", "1.5"),
        ("values", "1", "2"),
    ],
)
def test_another_result_is_told(run, file, old, new):
    """Else the comparisons would compare nothing."""
    before = contents(run)
    path = run / file
    path.write_text(path.read_text().replace(old, new, 1))
    assert contents(run) != before


def test_another_moment_or_a_file_too_few_is_told(run):
    before, state = contents(run), run / "step-1" / "trainer_state" / "shard.safetensors"
    save_file({"moment": np.arange(3.0) + 1e-9, "torch_rng": np.arange(5)}, state)
    assert contents(run) != before
    state.unlink()
    assert contents(run) != before


def test_times_and_the_state_that_nothing_draws_from_are_not(run):
    before = contents(run)
    save_file(
        {"moment": np.arange(3.0), "torch_rng": np.arange(1, 6)}, run / "step-1" / "trainer_state" / "shard.safetensors"
    )
    (run / "log.jsonl").write_text('{"event": "start"}\n{"event": "start"}\n{"step": 1, "loss": 2.0, "time": 9.0}\n')
    (run / "result.json").write_text('{"mae": 1.0, "seconds": 9, "table": [["seconds sampling", 9], ["reward", 4]]}')
    (run / "index.html").write_text("<p>nrmse 1.0 (3 steps, 9 s)</p>")
    assert contents(run) == before
