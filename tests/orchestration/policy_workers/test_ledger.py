"""The ledger proves that every group was learnt from once, and names any that was not."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stdist.cli import app
from stdist.errors import InputError
from stdist.orchestration.policy_workers.ledger import Ledger
from stdist.orchestration.policy_workers.proof import prove
from stdist.runs.workers import WorkKey

KEYS = [WorkKey(step, window, (4, 9, 11)) for step in range(2) for window in (20, 31)]


def once(ledger: Ledger, key: WorkKey, fence: int = 1) -> None:
    ledger.note("issued", key, version="a")
    ledger.note("leased", key, worker="worker-1", fence=fence)
    ledger.note("returned", key, worker="worker-1", fence=fence)
    ledger.note("trained", key)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rollouts" / "ledger.jsonl"


def written(path: Path) -> Ledger:
    ledger = Ledger(path)
    for key in KEYS:
        once(ledger, key)
    return ledger


def test_a_whole_ledger_is_a_proof(path: Path) -> None:
    written(path).close()
    proof = prove(path, range(2))
    assert proof.problems == [] and (proof.steps, proof.groups, proof.trained) == (2, 12, 12)
    assert proof.events == {"issued": 4, "leased": 4, "returned": 4, "trained": 4}
    assert proof.verdict == "12 of 12 groups of 2 steps were learnt from exactly once; no lease was lost"
    assert prove(path) == proof


def test_lost_leases_and_late_answers_break_no_proof(path: Path) -> None:
    ledger, (key, *others) = Ledger(path), KEYS
    ledger.note("issued", key, version="a")
    ledger.note("leased", key, worker="worker-1", fence=1)
    ledger.note("lost", key, worker="worker-1", fence=1, reason="died")
    ledger.note("leased", key, worker="worker-2", fence=2)
    ledger.note("returned", key, worker="worker-2", fence=2)
    ledger.note("trained", key)
    for other in others:
        once(ledger, other)
    ledger.close()
    proof = prove(path, range(2))
    assert proof.problems == [] and proof.lost == {"died": 1} and proof.verdict.endswith("leases lost: 1 died")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (
            lambda lines: [x for x in lines if (x["event"], x["step"]) != ("trained", 1)],
            "step 1, window 20, cells 4, 9, 11: learnt from never",
        ),
        (lambda lines: [*lines, lines[3]], "step 0, window 20, cells 4, 9, 11: learnt from 2 times"),
        (lambda lines: lines[4:], "step 0 has 3 groups, others have 6"),
        (lambda lines: [*lines, lines[0]], "line 17: step 0, window 20 was issued twice"),
        (lambda lines: lines[1:], "line 1: step 0, window 20 was leased and never issued"),
        (lambda lines: [*lines, lines[2]], "line 17: step 0, window 20 was answered under lease 1"),
        (lambda lines: [*lines[:2], *lines[3:]], "line 3: step 0, window 20 was learnt from without an answer"),
        (lambda lines: [lines[0], lines[1] | {"fence": 9}, *lines[2:]], "answered under lease 1, its last one is 9"),
        (lambda lines: [*lines[:3], lines[1], *lines[3:]], "line 4: step 0, window 20 was leased after its answer"),
    ],
)
def test_what_was_not_learnt_once_is_named(path: Path, spoil, problem: str) -> None:
    written(path).close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in spoil(lines)))
    proof = prove(path, range(2))
    assert any(problem in found for found in proof.problems), proof.problems
    assert "problem" in proof.verdict


def test_groups_of_steps_that_the_weights_never_made_are_named(path: Path) -> None:
    written(path).close()
    foreign = [f"step 1, window {w} was learnt from and is no step of the weights" for w in (20, 31)]
    assert prove(path, range(1)).problems == foreign
    assert "step 2 has 0 groups, others have 6" in prove(path, range(3)).problems


def test_after_a_resume_what_was_learnt_from_its_step_on_counts_anew(path: Path) -> None:
    """Once again with the answers that were kept, or issued again where they were not."""
    ledger = written(path)
    ledger.resume(1, "grpo", 1)
    ledger.note("trained", KEYS[2])
    ledger.flush()
    assert prove(path, range(2)).problems == ["step 1, window 31, cells 4, 9, 11: learnt from never"]
    once(ledger, KEYS[3])
    ledger.close()
    proof = prove(path, range(2))
    assert proof.problems == [] and proof.trained == 12 and proof.events["resumed"] == 1
    assert (proof.stage, proof.every) == ("grpo", 1)


def test_voided_work_may_be_issued_again(path: Path) -> None:
    ledger = Ledger(path)
    ledger.note("issued", KEYS[0], version="a")
    ledger.note("voided", KEYS[0])
    once(ledger, KEYS[0])
    once(ledger, KEYS[1])
    ledger.close()
    assert prove(path, range(1)).problems == []


def test_the_half_line_of_a_killed_process_is_cut(path: Path) -> None:
    written(path).close()
    whole = path.read_text()
    path.write_text(whole + '{"event": "tra')
    assert prove(path, range(2)).problems == []
    Ledger(path).close()
    assert path.read_text() == whole
    path.write_text(whole.replace('"leased"', "leased", 1))
    with pytest.raises(InputError, match="damaged in line 2"):
        prove(path, range(2))
    with pytest.raises(InputError, match="does not exist; runs whose learners sample themselves"):
        prove(path.with_name("none.jsonl"))


@pytest.mark.parametrize("whole", [True, False])
def test_the_command_says_what_is_proven_and_exits_with_4_where_it_is_not(tmp_path: Path, whole: bool) -> None:
    """Of a finished stage every step needs its groups: the last one here has none where the ledger is not whole."""
    run = tmp_path / "run"
    (run / "checkpoints" / "grpo").mkdir(parents=True)
    (run / "config.yaml").write_text("name: run\ndata: {store: city.zarr}\n")
    (run / "checkpoints" / "grpo" / "finished.json").write_text(
        json.dumps({"steps": 2 if whole else 3, "checkpoint": "step-2", "before": {}, "after": {}})
    )
    ledger = Ledger(run / "rollouts" / "ledger.jsonl")
    ledger.resume(0, "grpo", 1)
    for key in KEYS:
        once(ledger, key)
    ledger.close()
    end = CliRunner().invoke(app, ["ledger", str(run), "--json"])
    result = json.loads(end.stdout.splitlines()[-1])
    assert result["trained"] == 12 and result["stage"] == "grpo"
    assert end.exit_code == (0 if whole else 4)
    assert result["problems"] == ([] if whole else ["step 2 has 0 groups, others have 6"])
