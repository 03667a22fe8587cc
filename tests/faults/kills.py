"""Commands killed at random moments and started again, until they end as they would have undisturbed.

    python -m tests.faults.kills [--kills N] [--seed SEED] [--only NAME] [--ray]

A command runs undisturbed once, which gives its time and its result. Each trial begins from the same inputs, kills by
SIGKILL one to three times at moments drawn over that time (the process alone, all of its processes, or one of those
that it started), lets the command finish, and compares every file that came of it. Processes are forked from one that
has imported everything; with ``--ray``, commands on Ray clusters of their own, each from the start.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import safe_open

from . import world
from .fuzz import run_command

RAYS_OWN = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Processes of Ray that take their time to see that their raylet is gone."""
PATIENCE = 240
"""Seconds of a command on a crowded machine."""


@dataclass(frozen=True)
class Killed:
    """A command, the files or folders that it makes, and how often it is drawn."""

    name: str
    arguments: list[str]
    makes: str
    weight: int
    inputs: list[str] = field(default_factory=list)
    """What it needs of the world; copied for each trial."""
    whole: str = ""
    """A file that it replaces, which after any kill is the old or the new one."""
    says: bool = False
    """Whether what it says is said once and noted: it must have been said by the time that all is made."""


SYNTHETIC = ["--height", "9", "--width", "9", "--days", "12", "--cadence", "10"]
FORECAST = ["runs/urban", "nodes.zarr", "--split", "2019-01-02:2019-01-08"]
WATCHED = ["runs/watched", "watched.zarr"]
RUN = WATCHED[0]
MANY = ["data.history=3", "training.max_epochs=4"]
TWO = ["learners.engine=deepspeed", "learners.num_workers=2", "learners.max_failures=1"]
COMMANDS = [
    Killed("prepare", ["prepare", "synthetic", *SYNTHETIC, "--out", "x.zarr"], "x.zarr", 4),
    Killed("prepare by two", ["prepare", "synthetic", *SYNTHETIC, "--out", "x.zarr", "--workers", "2"], "x.zarr", 4),
    Killed("prepare table", ["prepare", "table", "wide.parquet", "--out", "x.zarr"], "x.zarr", 2, ["wide.parquet"]),
    Killed("train nodes", ["train", "urban.yaml", "name=new", *MANY], "runs/new", 6, ["urban.yaml", "nodes.zarr"]),
    Killed("train", ["train", "long.yaml", "name=new"], "runs/new", 6, ["long.yaml", "grid.zarr"]),
    Killed("forecast", ["forecast", *FORECAST, "--out", "f.zarr"], "f.zarr", 6, ["nodes.zarr", "runs"]),
    Killed("forecast table", ["forecast", *FORECAST, "--out", "f.parquet"], "f.parquet", 3, ["nodes.zarr", "runs"]),
    Killed("evaluate", ["evaluate", "runs/urban/forecasts/test.zarr", "nodes.zarr"], "runs", 2, ["nodes.zarr", "runs"]),
    Killed("calibrate", ["calibrate", *WATCHED, "--newest", "2"], RUN, 4, [*WATCHED], f"{RUN}/calibration.json"),
    Killed("watch", ["watch", *WATCHED, "--days", "2", "--json"], RUN, 4, [*WATCHED], f"{RUN}/watch.json", says=True),
    Killed("report", ["report", "runs/urban"], "runs/urban", 4, ["nodes.zarr", "runs"]),
]
ON_RAY = [
    Killed("prepare on ray", ["prepare", "synthetic", *SYNTHETIC, "--out", "x.zarr", "--ray", "local"], "x.zarr", 1),
    Killed(
        "train by two",
        ["train", "urban.yaml", "name=new", *MANY, *TWO],
        "runs/new",
        2,
        ["urban.yaml", "nodes.zarr"],
    ),
    Killed(
        "forecast by two",
        ["forecast", "runs/vision", "grid.zarr", "--out", "f.zarr", "--workers", "2"],
        "f.zarr",
        1,
        ["grid.zarr", "runs"],
    ),
]


# --- what came of a command ----------------------------------------------------------------------------------------


def contents(path: Path) -> dict[str, Any]:
    """What every file at or below ``path`` holds, without times and torch's own generator."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): _content(file) for file in files if not _MEASURED & set(file.parts)}


def _content(file: Path) -> Any:
    if file.parent.name == "trainer_state" and file.suffix == ".safetensors":
        with safe_open(file, "np") as tensors:
            held = {name: tensors.get_tensor(name) for name in sorted(tensors.keys()) if name != "torch_rng"}
        return {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in held.items()}
    if file.name == "log.jsonl":  # a resumed run begins more often
        entries = [json.loads(line) for line in file.read_text().splitlines()]
        return [_timeless(entry) for entry in entries if entry.get("event") != "start"]
    if file.suffix == ".json" and "runs" in file.parts:
        return _timeless(json.loads(file.read_text()))
    if file.name == "index.html":
        return _OF_THE_CLOCK.sub("", file.read_text())
    return hashlib.sha256(file.read_bytes()).hexdigest()


_MEASURED = {"tensorboard", "efficiency.json"}
_OF_THE_CLOCK = re.compile(r", \d+ s\)|<th>s / epoch</th>.*?</table>|<tr>\s*<td[^>]*>seconds .*?</tr>", re.DOTALL)


_NOT_KEPT = ("time", "crc32", "files", "peak_memory_bytes")


def _timeless(value: Any) -> Any:
    """Without times, and the sums of files that hold them."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if "second" not in key and key not in _NOT_KEPT}
        return {key: _timeless(item) for key, item in kept.items()}
    if isinstance(value, list):
        return [_timeless(item) for item in value if not _says_seconds(item)]
    return _OF_THE_CLOCK.sub("", value) if isinstance(value, str) else value


def _says_seconds(row: Any) -> bool:
    return isinstance(row, list) and bool(row) and isinstance(row[0], str) and row[0].startswith("seconds ")


# --- one command ---------------------------------------------------------------------------------------------------

Start = Callable[[list[str]], int]
"""Starts a command in the current folder, as the leader of a process group; returns its process."""


def fork(arguments: list[str]) -> int:
    if (child := os.fork()) == 0:
        os.setsid()
        run_command(arguments)
    return child


def execute(arguments: list[str]) -> int:
    with open("stdout", "a") as out, open("stderr", "a") as err:
        program = "import sys; sys.argv[0] = 'stdist'; from stdist.cli import main; main()"
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True).pid


def wait(child: int, until: float) -> int | None:
    """The exit code; None where it still runs at ``until``."""
    while time.monotonic() < until:
        ended = os.waitpid(child, os.WNOHANG)
        if ended[0]:
            return os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.002)
    return None


def kill(child: int, whom: str, rng: random.Random) -> None:
    """SIGKILL to the process alone, to its ``group``, or to one ``below`` it where there is any."""
    if whom == "group":
        os.killpg(child, signal.SIGKILL)
        return
    below = _descendants(child)
    os.kill(rng.choice(below) if whom == "below" and below else child, signal.SIGKILL)


def _descendants(process: int) -> list[int]:
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [found for child in map(int, children) for found in (child, *_descendants(child))]


def outliving(group: int) -> list[str]:
    """What processes of a killed command's group are still there after a while; they are killed then."""
    until = time.monotonic() + PATIENCE / 10
    while left := [path for path in Path("/proc").glob("[0-9]*/stat") if _group_of(path) == group]:
        if time.monotonic() > until:
            names = [(path.parent / "cmdline").read_text().replace("\0", " ").strip()[:120] for path in left]
            os.killpg(group, signal.SIGKILL)
            return [name for name in names if name not in RAYS_OWN]
        time.sleep(0.05)
    return []


def _group_of(stat: Path) -> int | None:
    """None where the process is gone, or waits for somebody to take note of its end."""
    try:
        state, _, group, *_ = stat.read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(group)


def finish(start: Start, command: Killed) -> str | None:
    """Runs to the end; what is wrong, where it does not end well."""
    Path("stderr").unlink(missing_ok=True)
    child = start(command.arguments)
    code = wait(child, time.monotonic() + PATIENCE)
    if code is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "hangs"
    return None if _ended(command, code) else f"exit code {code}: {Path('stderr').read_text()[-2000:]}"


# --- trials --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Undisturbed:
    seconds: float
    made: dict[str, Any]
    said: str
    """The last line on standard output."""


def fresh(command: Killed, world_folder: Path) -> None:
    """Empties the current folder and copies the command's inputs."""
    for path in Path().iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in command.inputs:
        source = world_folder / name
        shutil.copytree(source, name) if source.is_dir() else shutil.copy(source, name)


def undisturbed(command: Killed, start: Start, world_folder: Path) -> Undisturbed:
    fresh(command, world_folder)
    began = time.monotonic()
    wrong = finish(start, command)
    seconds = time.monotonic() - began
    assert wrong is None, f"{command.name}: {wrong}"
    return Undisturbed(seconds, contents(Path(command.makes)), Path("stdout").read_text().splitlines()[-1])


def trial(command: Killed, start: Start, expected: Undisturbed, world_folder: Path, rng: random.Random) -> str | None:
    """What is wrong; None where all is as undisturbed."""
    fresh(command, world_folder)
    wholes = _old_and_new(command, expected)
    groups = []
    code: int | None = None
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        child = start(command.arguments)
        groups.append(child)
        code = wait(child, time.monotonic() + rng.random() * expected.seconds)
        if code is None:
            kill(child, rng.choice(("alone", "group", "below")), rng)
            code = wait(child, time.monotonic() + PATIENCE)
        if code is None:
            os.killpg(child, signal.SIGKILL)
            return "hangs after a kill below it"
        if command.whole and contents(Path(command.whole)) not in wholes:
            return f"{command.whole} is neither the old nor the new one"
        if _ended(command, code) or _was_made(command, code):
            break  # before it could be killed, or behind its last write
        if code == 1 and command in ON_RAY and "Traceback" not in Path("stderr").read_text():
            continue  # Ray itself ends a driver whose raylet died
        if code not in (5, -signal.SIGKILL):
            return f"exit code {code} after a kill below it: {Path('stderr').read_text()[-2000:]}"
    else:
        wrong = finish(start, command)
        if wrong and not _was_made(command, 2):
            return wrong
    if left := [name for group in groups for name in outliving(group)]:
        return f"processes outlive the command that was killed: {left}"
    made = contents(Path(command.makes))
    differing = sorted(name for name in made.keys() | expected.made.keys() if made.get(name) != expected.made.get(name))
    if differing:
        return f"other contents: {differing[:5]}"
    if command.says and expected.said not in Path("stdout").read_text().splitlines():
        return "it is noted as said, and was not"
    partial = sorted(str(path) for path in Path().rglob("*") if ".partial" in path.name)
    return f"left behind: {partial[:5]}" if partial else None


def _old_and_new(command: Killed, expected: Undisturbed) -> list[dict[str, Any]]:
    """What the file that is to stay whole holds before the command, where it may not be there, and behind it."""
    if not command.whole:
        return []
    new = expected.made[str(Path(command.whole).relative_to(command.makes))]
    return [contents(Path(command.whole)), {".": new}]


def _ended(command: Killed, code: int) -> bool:
    """Whether it ended as it does undisturbed: with 6 where it has something to say, with 0 where that was noted."""
    return code == 0 or (command.says and code == 6)


def _was_made(command: Killed, code: int) -> bool:
    """Whether a preparation was refused since its store is there."""
    return code == 2 and f"{command.makes} exists already" in Path("stderr").read_text()


def build(folder: Path, *, vision_run: bool) -> None:
    """The fuzz's world, with a longer training of the vision-LLM, and a run of it; beside them a store with a day more,
    on which a place is unusual, and a run that is calibrated on the days before."""

    def stdist(*arguments: str) -> int:
        child = fork(list(arguments))
        return wait(child, time.monotonic() + PATIENCE) or 0

    world.build(folder, stdist)
    run, store = WATCHED
    shutil.copytree("runs/urban", run)
    shutil.copytree("nodes.zarr", store)
    day = np.load("zones.npz")["arr_0"][: world.SLOTS] * np.array([10, 1, 1, 1, 1])[:, None]
    np.savez("ninth.npz", arr_0=day)
    assert stdist("append", store, "ninth.npz", "--start", "2019-01-09T00:00") == 0
    assert stdist("calibrate", run, store) == 0
    tree: dict[str, Any] = world.CONFIGS["vision"]
    longer = {"logging_steps": 1, "save_steps": 1, "eval_steps": 2}
    tree = tree | {
        stage: tree[stage] | longer | {"max_steps": 3} for stage in ("alignment", "arithmetic", "sft", "grpo")
    }
    Path("long.yaml").write_text(yaml.safe_dump(tree))
    if vision_run:
        assert stdist("train", "long.yaml") == 0


def kills(count: int, seed: int, folder: Path, *, only: str = "", ray: bool = False) -> list[tuple[str, str | None]]:
    """Runs ``count`` trials in ``folder``; of each the command's name and what is wrong."""
    rng, here = random.Random(seed), os.getcwd()
    world_folder, place = folder / "world", folder / "trial"
    world_folder.mkdir(), place.mkdir()
    commands = [command for command in (ON_RAY if ray else COMMANDS) if only in command.name]
    start: Start = execute if ray else fork
    expected: dict[str, Undisturbed] = {}
    outcomes = []
    try:
        os.chdir(world_folder)
        if (
            builder := os.fork()
        ) == 0:  # what begins threads does it there: each fork of this process would wait for them
            build(world_folder, vision_run=ray)
            os._exit(0)
        assert os.waitpid(builder, 0)[1] == 0, "the world could not be made"
        os.chdir(place)
        for command in rng.choices(commands, [command.weight for command in commands], k=count):
            if command.name not in expected:
                expected[command.name] = undisturbed(command, start, world_folder)
            state = rng.getstate()
            wrong = trial(command, start, expected[command.name], world_folder, rng)
            outcomes.append((command.name, wrong))
            if wrong:
                print(f"{command.name}: {wrong} (trial {len(outcomes)}, state {hash(state)})", flush=True)
    finally:
        os.chdir(here)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="commands whose name has this in it")
    parser.add_argument("--ray", action="store_true", help="the commands on Ray")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    with tempfile.TemporaryDirectory() as folder:
        outcomes = kills(options.kills, options.seed, Path(folder), only=options.only, ray=options.ray)
    print(json.dumps({"trials": len(outcomes), **Counter(name for name, _ in outcomes)}))
    sys.exit(any(wrong for _, wrong in outcomes))


if __name__ == "__main__":
    main()
