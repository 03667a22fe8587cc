"""What DeepSpeed costs one learner and gives two: seconds and bytes of an SFT step, checkpoints, and the way to the
first step.

Plain torch and ZeRO-1, 2 and 3 make the same steps of one policy in turn, each engine in the same process (one learner)
or in two that talk through gloo (two learners, the same batch shared between them); the losses must agree. Bytes are
counted from tensors. Then checkpoints are saved: beside training, as a run does, and with training waiting for them.
At last ``stdist train`` is started anew, with and without Ray, and stopped after its first step.

    python benchmarks/learners.py --json
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import json
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from _harness import comparison, figure, parser, publish
from _learner import ENGINES, Bytes, Learners, Saved, Step

from data_prep import READERS
from stdist.runs.recipes import parse_config

if missing := [name for name in ("deepspeed", "ray") if find_spec(name) is None]:
    print(f"error: {missing[0]} is not installed; pip install 'stdist[cluster]'", file=sys.stderr)
    sys.exit(2)

WARM_UP = 2
SIDE, WINDOWS, CELLS, FRAMES, HORIZON = 6, 2, 16, 12, 12
"""Cells along a side of the city; windows a step, cells a window; S and K."""
PEER, HEADLINE = "torch", "zero1"
# Who trains and with which engine.
Team = tuple[int, str]
TEAMS: list[Team] = [(1, kind) for kind in ENGINES] + [(2, kind) for kind in ENGINES if kind != PEER]
STARTS = {
    "1 learner, torch": [],
    "1 learner, ZeRO-1": ["learners.engine=deepspeed"],
    "2 learners through Ray, ZeRO-1": ["learners.engine=deepspeed", "learners.num_workers=2"],
}
PATIENCE = 600
"""Seconds that a start may take."""


def config_tree(folder: Path, preset: str, trainable: str) -> dict[str, Any]:
    return {
        "name": "steps",
        "output_dir": str(folder / "runs"),
        "stages": ["sft"],
        "data": {"store": str(folder / "city.zarr"), "history": FRAMES, "horizon": HORIZON},
        "numerals": {"mantissa_digits": 2, "out_of_range": "clamp"},
        "frames": {"pixels_per_cell": 7},
        "policy": {"base": preset},
        "sft": {
            **{"trainable": trainable, "windows_per_step": WINDOWS, "cells_per_window": CELLS, "blank_share": 0.3},
            **{"logging_steps": 1, "eval_windows": 1},
        },
        "forecast": {"decoding": "direct"},
    }


# --- steps -------------------------------------------------------------------------------------------------------


def one_step(learners: dict[int, Learners], team: Team) -> Step:
    """The slowest learner's."""
    size, kind = team
    return max(learners[size].call(kind, "step"), key=lambda step: step.seconds)


def measure_steps(learners: dict[int, Learners], runs: int) -> dict[Team, list[Step]]:
    steps: dict[Team, list[Step]] = {team: [] for team in TEAMS}
    for _ in range(WARM_UP + runs):
        for team in TEAMS:
            steps[team].append(one_step(learners, team))
    for team, made in steps.items():
        for number, (ours, peer) in enumerate(zip(made, steps[1, PEER], strict=True)):
            if not abs(ours.loss - peer.loss) <= 1e-3 * abs(peer.loss):
                raise SystemExit(f"error: {team} has loss {ours.loss} in step {number}, plain torch has {peer.loss}")
    return {team: made[WARM_UP:] for team, made in steps.items()}


def seconds_of(steps: Sequence[Step]) -> list[float]:
    return [step.seconds for step in steps]


def step_figures(steps: dict[Team, list[Step]], team: Team) -> dict[str, Any]:
    seconds = seconds_of(steps[team])
    typical = statistics.median(seconds)

    def times_faster_than(other: Team) -> float:
        return figure(statistics.median(seconds_of(steps[other])) / typical)

    figures = {
        "seconds": spread(seconds),
        "tokens_per_second": figure(statistics.median(step.tokens for step in steps[team]) / typical),
        "speed_up_over_torch": times_faster_than((1, PEER)),
    }
    return figures if team[0] == 1 else figures | {"speed_up_over_one_learner": times_faster_than((1, team[1]))}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": figure(statistics.median(values)), "lowest": figure(min(values)), "highest": figure(max(values))}


# --- bytes -------------------------------------------------------------------------------------------------------


def bytes_figures(learners: dict[int, Learners], whole: Bytes, team: Team) -> dict[str, Any]:
    """Of the learner that holds most; ``theory``: plain torch's bytes, shared as ZeRO's stage shares them (arXiv
    1910.02054, Fig. 1). It knows no ``masters``: DeepSpeed keeps them beside float32 weights too."""
    size, kind = team
    held = [asdict(each) for each in learners[size].call(kind, "held")]
    stage = ENGINES[kind].zero_stage if kind != PEER else 0
    theory = {
        "moments": whole.moments / (size if stage >= 1 else 1),
        "gradients": whole.gradients / (size if stage >= 2 else 1),
        "weights": whole.weights / (size if stage >= 3 else 1),
    }
    most = {key: max(each[key] for each in held) for key in held[0]}
    return most | {"theory": {key: round(value) for key, value in theory.items()}}


# --- checkpoints -------------------------------------------------------------------------------------------------


def checkpoint_figures(learners: dict[int, Learners], team: Team, runs: int) -> dict[str, Any]:
    """``stall``: seconds that training loses to a save beside it, by the steps between saves; ``call``: the part of it
    in which no step is made; ``settled``: until the end of the step in which it counts; ``blocking``: all of it where
    training waits."""
    size, kind = team
    between: list[float] = []
    saved: dict[bool, list[Saved]] = {True: [], False: []}
    for _ in range(1 + runs):
        for beside, saves in saved.items():
            between.append(one_step(learners, team).seconds)
            saves.append(max(learners[size].call(kind, "save", beside), key=lambda save: save.settled))
    concurrent, waiting = saved[True][1:], saved[False][1:]
    step = statistics.median(between)
    return {
        "stall": spread([save.settled - save.steps * step for save in concurrent]),
        "call": spread([save.call for save in concurrent]),
        "settled": spread([save.settled for save in concurrent]),
        "blocking": spread([save.settled for save in waiting]),
    }


# --- the first step ----------------------------------------------------------------------------------------------


def seconds_to_first_step(folder: Path, config: Path, name: str, overrides: Sequence[str]) -> float:
    """From the start of ``stdist train`` to its first logged step. What was started is ended."""
    # No cluster but its own, and no token left in the user's home.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_ADDRESS": "local", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    command = [sys.executable, "-c", "from stdist.cli import main; main()"]
    command += ["train", str(config), f"name={name}", *overrides]
    log, output = folder / "runs" / name / "log.jsonl", folder / f"{name}.txt"
    with output.open("wb") as file:
        started = time.time()
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        while (stamp := first_step_stamp(log)) is None:
            if process.poll() is not None or time.time() > started + PATIENCE:
                raise SystemExit(f"error: {name} made no step; it wrote:\n{output.read_text()[-2000:]}")
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGINT)  # it saves, and takes its own Ray down
        process.wait(PATIENCE)
    return stamp - started


def first_step_stamp(log: Path) -> float | None:
    lines = log.read_text().splitlines() if log.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    return next((entry["time"] for entry in entries if "event" not in entry), None)


def start_figures(folder: Path, tree: dict[str, Any], runs: int) -> dict[str, Any]:
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    seconds: dict[str, list[float]] = {title: [] for title in STARTS}
    for run in range(runs):
        for number, (title, overrides) in enumerate(STARTS.items()):
            seconds[title].append(seconds_to_first_step(folder, config, f"start-{run}-{number}", overrides))
    return {title: spread(values) for title, values in seconds.items()}


# --- result ------------------------------------------------------------------------------------------------------


def measure(preset: str, trainable: str, runs: int, saves: int, starts: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        READERS["synthetic"].prepare([], folder / "city.zarr", height=SIDE, width=SIDE, days=10, cadence=60)
        tree = config_tree(folder, preset, trainable)
        config = parse_config(tree, where="the benchmark's config")
        learners = {size: Learners(size, [k for s, k in TEAMS if s == size], config, folder) for size in (1, 2)}
        steps = measure_steps(learners, runs)
        whole = learners[1].call(PEER, "held")[0]
        titles = {team: f"{team[1]} on {team[0]}" for team in TEAMS}
        extra: dict[str, Any] = {
            "steps": {titles[team]: step_figures(steps, team) for team in TEAMS},
            "bytes_per_learner": {titles[team]: bytes_figures(learners, whole, team) for team in TEAMS},
            "checkpoint_seconds": {titles[team]: checkpoint_figures(learners, team, saves) for team in TEAMS},
        }
        for each in learners.values():
            each.close()
        extra["seconds_to_first_step"] = start_figures(folder, tree, starts)
    return comparison(
        "learners",
        "seconds per SFT step on one learner with DeepSpeed ZeRO-1",
        seconds_of(steps[1, HEADLINE]),
        "plain torch",
        seconds_of(steps[1, PEER]),
        f"preset {preset}, {trainable} training, {WINDOWS} windows x {CELLS} cells a step over all learners, "
        f"S {FRAMES}, K {HORIZON}, 2 mantissa digits, float32; one thread a learner, gloo on 127.0.0.1; {saves} saves, "
        f"{starts} starts; torch {torch.__version__}, deepspeed {version('deepspeed')}",
        better="less",
        **extra,
    )


def main() -> None:
    arguments = parser(__doc__, runs=15)
    arguments.add_argument("--preset", choices=("tiny", "small"), default="small", help="(default: %(default)s)")
    arguments.add_argument("--trainable", choices=("full", "lora"), default="full", help="(default: %(default)s)")
    arguments.add_argument("--saves", type=int, default=5, help="saves of each kind (default: %(default)s)")
    arguments.add_argument("--starts", type=int, default=3, help="starts of each kind (default: %(default)s)")
    chosen = arguments.parse_args()
    publish(measure(chosen.preset, chosen.trainable, chosen.runs, chosen.saves, chosen.starts), chosen.json)


if __name__ == "__main__":
    main()
