"""The fuzz as tests: a few trials in the ordinary suite, the same ones each time, and 5,000 as ``slow``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stdist.runs.recipes import RECIPES

from .fuzz import CHARACTERS, VALUES, Trial, harmless, judge, keys_of, trials

ROOT = Path(__file__).parents[2]


def fuzz(count: int, tmp_path: Path) -> dict[str, int]:
    """Counts by outcome. Fails where one is wrong."""
    program = [sys.executable, "-m", "tests.faults.fuzz", "--trials", str(count), "--seed", "17"]
    done = subprocess.run([*program, "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["trials"] == count and counts["refused"] > count / 2 and counts["accepted"] > count / 50
    return counts


def test_some_of_the_trials(tmp_path):
    fuzz(60, tmp_path)


@pytest.mark.slow
def test_five_thousand_trials(tmp_path):
    fuzz(5000, tmp_path)


def test_every_option_and_key_is_tried_with_every_value():
    """Of the commands and of the configurations' classes as they are, none of which is named here but a few."""
    places = {trial.where for trial in trials()}
    assert {"forecast --region", "prepare telecom-italia --geometry", "plan config", "submit --stop"} <= places
    assert {
        "vision grpo.num_generations",
        "urban learners.engine",
        "gwnet model.kind",
        "few few_shot.backbone",
    } <= places
    assert all([trial.value for trial in trials() if trial.where == where] == VALUES for where in places)
    assert len(VALUES) == len(set(VALUES)) == 20 and len(trials()) >= 5000
    keys = list(keys_of(RECIPES["vision-llm"].Config))
    assert "data.split.train" in keys and "grpo" in keys and "rollouts.max_staleness" in keys


TRIAL = Trial("prepare synthetic --days", "3", [])


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        (0, "", "accepted"),
        (2, "a note\nerror: no such thing; do this\n", "refused"),
        (4, "error: damaged\n", "damage"),
        (5, "error: no space is left\n", "machine"),
        (1, "Traceback (most recent call last)\n", "traceback"),
        (2, "Usage: …\n╭─ Error ─╮\n", "other code"),
        (1, "error: said with a code of none\n", "other code"),
        (-9, "", "killed"),
        (2, "error: one\ntwo\nthree\n", "long"),
        (2, "error: " + "x" * CHARACTERS, "long"),
    ],
)
def test_outcomes_are_told_apart(tmp_path, monkeypatch, code, text, kind):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    assert judge(TRIAL, code, text) == kind


def test_what_is_left_behind_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for left in ("out/x.zarr", "runs/new"):
        Path("out").mkdir(exist_ok=True)
        Path(left).mkdir(parents=True)
        assert judge(TRIAL, 2, "error: refused\n") == "leftover"
        assert not Path("runs/new").exists()
        Path("out/x.zarr").rmdir() if left == "out/x.zarr" else None
    (Path("out") / "x.zarr.partial").mkdir()
    assert judge(TRIAL, 2, "error: refused\n") == "refused"


@pytest.mark.parametrize(
    ("where", "value", "expected"),
    [
        ("prepare synthetic --days", "4000000000", False),
        ("prepare synthetic --days", "3", True),
        ("prepare synthetic --city", "nan", True),
        ("vision sft.max_steps", "4000000000", True),
        ("vision grpo.num_generations", "4000000000", False),
        ("vision frames.power", "1e400", False),
    ],
)
def test_what_nobody_means_is_not_accepted(where, value, expected):
    assert harmless(Trial(where, value, [])) is expected
