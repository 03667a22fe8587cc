"""Reads a ledger and proves which groups the weights have learnt from, and how often.

A unit's groups (its window's cells) are learnt from exactly once if, of all its lines since it was last issued, one is
``trained``, and before it one is ``returned`` under the number of its last lease.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stdist.errors import DamageError, InputError
from stdist.orchestration.policy_workers.ledger import LEDGER
from stdist.runs.recipes import read_run_config
from stdist.training.checkpoint import StageCheckpoints


@dataclass
class Proof:
    """Counts of a run's ledger; ``problems`` is empty where every group was learnt from exactly once. ``every``:
    updates of ``stage`` on the groups of a step."""

    stage: str = ""
    every: int = 1
    steps: int = 0
    groups: int = 0
    trained: int = 0
    events: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def verdict(self) -> str:
        lost = ", ".join(f"{count} {reason}" for reason, count in sorted(self.lost.items()))
        text = f"{self.trained} of {self.groups} groups of {self.steps} steps were learnt from exactly once"
        text += f"; leases lost: {lost}" if lost else "; no lease was lost"
        return text + ("" if not self.problems else f"; {len(self.problems)} problems: {self.problems[0]}")


@dataclass
class _Unit:
    cells: tuple[int, ...]
    fence: int = 0
    returned: bool = False
    trained: int = 0
    may_be_issued: bool = False


def prove_run(run_dir: Path) -> Proof:
    """Reads a run's ledger: of all its steps where the training has ended, else of those so far.

    Raises InputError where there is none."""
    read_run_config(run_dir)
    path = run_dir / LEDGER
    proof = prove(path)
    finished = StageCheckpoints(run_dir / "checkpoints" / proof.stage).finished if proof.stage else None
    return proof if finished is None else prove(path, range(0, finished["steps"], proof.every))


def prove(path: Path, steps: Collection[int] | None = None) -> Proof:
    """Reads a ledger. ``steps``: numbers of the steps that the run's weights have learnt from, each of which must have
    groups; up to the last one that the ledger says was trained, if absent. Raises InputError where there is no ledger.
    """
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; runs whose learners sample themselves (no rollouts.num_workers) have none"
        )
    proof, units = Proof(), dict[tuple[int, int, int], _Unit]()
    for number, line in _lines(path):
        try:
            _take(proof, units, line, f"line {number}")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise _damage(path, number) from None
    return _judge(proof, units, steps)


def _take(proof: Proof, units: dict[tuple[int, int, int], _Unit], line: dict[str, Any], where: str) -> None:
    event = line.pop("event")
    proof.events[event] = proof.events.get(event, 0) + 1
    if event == "resumed":
        proof.stage, proof.every = line["stage"], line["every"]
        for (step, *_), unit in units.items():
            if step >= line["step"]:
                unit.trained, unit.may_be_issued = 0, True
        return
    where += f": step {line['step']}, window {line['window']}"
    if event == "issued":
        key = (line["step"], line["window"], line["cells"][0])
        if key in units and not units[key].may_be_issued:
            proof.problems.append(f"{where} was issued twice")
        units[key] = _Unit(tuple(line["cells"]))
        return
    known = units.get((line["step"], line["window"], line["first"]))
    if known is None:
        proof.problems.append(f"{where} was {event} and never issued")
    else:
        _count(proof, known, event, line, where)


def _count(proof: Proof, unit: _Unit, event: str, line: dict[str, Any], where: str) -> None:
    if event == "leased":
        if unit.returned:
            proof.problems.append(f"{where} was leased after its answer")
        unit.fence = line["fence"]
    elif event == "lost":
        proof.lost[line["reason"]] = proof.lost.get(line["reason"], 0) + 1
    elif event == "returned":
        if unit.returned or line["fence"] != unit.fence:
            proof.problems.append(f"{where} was answered under lease {line['fence']}, its last one is {unit.fence}")
        unit.returned = True
    elif event == "voided":
        unit.may_be_issued = True
    elif event == "trained":
        if not unit.returned:
            proof.problems.append(f"{where} was learnt from without an answer")
        unit.trained += 1


def _judge(proof: Proof, units: dict[tuple[int, int, int], _Unit], steps: Collection[int] | None) -> Proof:
    of_step: dict[int, int] = {}
    if steps is None:
        steps = {step for (step, *_), unit in units.items() if unit.trained}
    for (step, window, _), unit in units.items():
        if step not in steps:
            if unit.trained:
                proof.problems.append(f"step {step}, window {window} was learnt from and is no step of the weights")
            continue
        proof.groups += len(unit.cells)
        of_step[step] = of_step.get(step, 0) + len(unit.cells)
        if unit.trained == 1:
            proof.trained += len(unit.cells)
        else:
            times = "never" if not unit.trained else f"{unit.trained} times"
            proof.problems.append(f"step {step}, window {window}, cells {_few(unit.cells)}: learnt from {times}")
    proof.steps = len(of_step)
    usual = max(of_step.values(), default=0)
    for step in sorted(steps):
        if of_step.get(step, 0) != usual:
            proof.problems.append(f"step {step} has {of_step.get(step, 0)} groups, others have {usual}")
    return proof


def _few(cells: tuple[int, ...]) -> str:
    return ", ".join(map(str, cells[:3])) + (", …" if len(cells) > 3 else "")


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(errors="replace") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith("\n"):
                return  # the half line of a process that was killed; nothing that counts was in it
            try:
                yield number, json.loads(text)
            except ValueError:
                raise _damage(path, number) from None


def _damage(path: Path, number: int) -> DamageError:
    return DamageError(f"{path} is damaged in line {number}; what it proved it proves no more")
