"""All of stdist that needs a GPU, in order of worth, in slices that go on where the last one ended.

Every item is a process of its own with a time limit, so that a crash in one does not hide another, and its result is
written as soon as it ends, all into one file. A failed one is tried once more, in a later slice. On a machine with a
CUDA build of torch, until nothing is left:

    make gpu
    python benchmarks/gpu.py --minutes 10

``--device cpu --base tiny`` runs the same in small, into a file of its own: it shows that this works, and measures
nothing.
"""

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from _harness import processor

from stdist.errors import InputError
from stdist.files import own_file, to_json, write_atomically

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"alignment": 300, "arithmetic": 300, "sft": 330, "grpo": 480}
"""Seconds at most, by stage."""
ATTEMPTS = 2
LAST_LINES = 20
PARENT_DIED = 1  # PR_SET_PDEATHSIG of Linux' prctl


@dataclass(frozen=True)
class Item:
    """A command whose last line is its result as JSON; it is killed after ``limit`` seconds, at a second attempt after
    twice as many if a slice has them.

    ``makes``: a path that others need, by ``needs``; where it is gone the item is run again, and where nothing that is
    left needs it the item is not run.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ()
    makes: Path | None = None


class Results:
    """The file of results: ``setting``, and of each item its ``status`` (running, done, failed), ``attempts``, and its
    ``result`` or how it ``ended`` with its ``last_lines``. Raises InputError where the file is of another setting."""

    def __init__(self, path: Path, setting: dict[str, Any]):
        self.path, self.items = path, {}
        self._setting = setting
        if path.exists():
            with own_file(path, "move it away and begin again"):
                tree = json.loads(path.read_text(encoding="utf-8"))
                self.items, found = dict(tree["items"]), tree["setting"]
            if found != setting:
                raise InputError(f"{path} has the results of {found}, and this is {setting}; give another --results")
        for record in self.items.values():
            if record["status"] == "running":  # whoever ran it is gone
                record |= {"status": "failed", "ended": "with the machine, or killed with its slice", "last_lines": []}

    def put(self, name: str, record: dict[str, Any]) -> None:
        self.items[name] = record
        self.write()

    def forget(self, name: str) -> None:
        self.items.pop(name, None)
        self.write()

    def write(self) -> None:
        write_atomically(self.path, to_json({"setting": self._setting, "items": self.items}, indent=1) + "\n")

    def is_done(self, item: Item) -> bool:
        there = item.makes is None or item.makes.exists()
        return there and self.items.get(item.name, {}).get("status") == "done"

    def attempts(self, item: Item) -> int:
        """Failed ones."""
        record = self.items.get(item.name, {})
        return record["attempts"] if record.get("status") == "failed" else 0


class Slice:
    """Some minutes of work on ``items``. ``run`` runs one of them and returns its record."""

    def __init__(
        self,
        items: Sequence[Item],
        results: Results,
        seconds: float,
        run: Callable[[Item], dict[str, Any]],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.items, self.results, self._run, self._clock = items, results, run, clock
        self._seconds, self._end = seconds, clock() + seconds
        self._tried: set[str] = set()

    def go(self) -> None:
        """Runs what fits. An item whose limit does not fit into the rest waits for another slice, or it would wait for
        ever: in a fresh slice it may outlast it."""
        while (item := self._next()) is not None:
            self._tried.add(item.name)
            before = self.results.items.get(item.name)
            attempts, limit = self.results.attempts(item) + 1, self._limit(item)
            self.results.put(item.name, {"status": "running", "attempts": attempts})
            print(f"{item.name}: at most {limit:.0f} s", flush=True)
            try:
                record = self._run(replace(item, limit=limit)) | {"attempts": attempts}
            except KeyboardInterrupt:  # not its fault
                if before is None:
                    self.results.forget(item.name)
                else:
                    self.results.put(item.name, before)
                raise
            self.results.put(item.name, record)
            print(f"{item.name}: {record['status']}, {record['seconds']:.0f} s", flush=True)

    def left(self) -> list[Item]:
        """Items that another slice would try."""
        wanted = [item for item in self.items if self._wanted(item)]
        needed = {name for item in wanted for name in item.needs}
        return [item for item in wanted if item.makes is None or item.name in needed]

    def _wanted(self, item: Item) -> bool:
        return not self.results.is_done(item) and self.results.attempts(item) < ATTEMPTS

    def _next(self) -> Item | None:
        """The first one that was never tried, else the first one that failed in an earlier slice."""
        rest, is_fresh = self._end - self._clock(), not self._tried
        done = {item.name for item in self.items if self.results.is_done(item)}
        able = [
            item
            for item in self.left()
            if done.issuperset(item.needs) and item.name not in self._tried and (is_fresh or self._limit(item) <= rest)
        ]
        return min(able, key=self.results.attempts, default=None)

    def _limit(self, item: Item) -> float:
        longer = min(2 * item.limit, max(item.limit, self._seconds))
        return longer if self.results.attempts(item) else item.limit


def run_process(item: Item, log: Path) -> dict[str, Any]:
    """Runs an item, its output into ``log``. Returns its record."""
    log.parent.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None)

    def dies_with_parent() -> None:
        if hasattr(libc, "prctl"):
            libc.prctl(PARENT_DIED, signal.SIGKILL)

    began, start = datetime.now(UTC), time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            item.command,
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=dies_with_parent,
        )
        try:
            code = process.wait(item.limit)
            ended = f"with exit code {code}" if code >= 0 else f"by signal {-code}"
        except subprocess.TimeoutExpired:
            code, ended = -1, f"killed at its limit of {item.limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    record = {
        "seconds": round(time.monotonic() - start, 1),
        "began": began.isoformat(timespec="seconds"),
        "commit": commit(),
    }
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    result = result_in(lines)
    if code == 0 and result is not None:
        return {"status": "done", **record, "result": result}
    # Of a test that failed, also what the others did.
    return {"status": "failed", **record, "ended": ended, "last_lines": lines[-LAST_LINES:], "result": result}


def result_in(lines: list[str]) -> dict[str, Any] | None:
    """The last line, where it is one JSON object."""
    try:
        result = json.loads(lines[-1])
        to_json(result)  # no infinities
    except (ValueError, IndexError):
        return None
    return result if isinstance(result, dict) else None


def commit() -> str | None:
    """The code's, where this is a checkout."""
    told = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return told.stdout.strip() or None


def all_items(device: str, base: str, cap: float, work: Path) -> list[Item]:
    """In order of worth."""
    here = Path(__file__).parent

    where = "--device", device, "--base", base, "--cap", str(cap), "--work", str(work)

    def measured(
        name: str, *arguments: str, limit: int = 300, needs: tuple[str, ...] = (), makes: Path | None = None
    ) -> Item:
        return Item(name, (sys.executable, str(here / "_gpu_measure.py"), *arguments, *where), limit, needs, makes)

    prepared = "base", "city"
    backends = ("stdist", "trl") if find_spec("trl") else ()
    return [
        measured("machine", "machine", limit=120),
        *(
            Item(f"tests: {path}", (sys.executable, str(here / "_gpu_tests.py"), str(path)), 300)
            for path in gpu_tests(ROOT / "tests")
        ),
        measured("city", "city", limit=240, makes=work / "city.zarr"),
        measured("base", "base", makes=work / "base"),
        *(measured(f"stage: {name}", "stage", "--stage", name, limit=s, needs=prepared) for name, s in STAGES.items()),
        *(
            measured(f"grpo by {name}", "stage", "--stage", "grpo", "--backend", name, needs=prepared)
            for name in backends
        ),
        measured("rollouts", "rollouts", needs=prepared),
        measured("rollouts in bfloat16", "rollouts", "--bfloat16", needs=prepared),
        measured("sweep", "sweep", needs=prepared),
        measured("sweep in bfloat16", "sweep", "--bfloat16", needs=prepared),
    ]


def gpu_tests(tests: Path) -> list[Path]:
    """Files with tests marked ``gpu``, as pytest is given them; the model's before the rest."""
    marked = [path for path in tests.rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    found = [path.relative_to(tests.parent) for path in marked]
    return sorted(found, key=lambda path: ("vision_llm" not in path.parts, path))


def device_name(device: str) -> str:
    """Ends the process with 2 where there is no CUDA device."""
    if device == "cpu":
        return processor()
    import torch

    if not torch.cuda.is_available():
        why = "finds none" if torch.version.cuda else "is built without CUDA"
        refuse(
            f"no CUDA device: torch {torch.__version__} {why}; run this on a machine with a GPU, or with --device cpu"
        )
    return torch.cuda.get_device_name()


def refuse(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of this slice (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--base", choices=("7b", "tiny"), default="7b", help="shape of the base (default: %(default)s)")
    parser.add_argument("--cap", type=float, default=32, help="GiB that a stage may take (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "gpu", help="base, city, logs; 35 GB for the 7B")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/gpu.json; on a CPU in --work")
    parser.add_argument(
        "--again", metavar="NAME", action="append", default=[], help="an item to run though it has been"
    )
    given = parser.parse_args()
    work = given.work.absolute()
    default = work / "cpu.json" if given.device == "cpu" else ROOT / "benchmarks" / "results" / "gpu.json"
    items = all_items(given.device, given.base, given.cap, work)
    setting = {"device": device_name(given.device), "base": given.base, "cap_gib": given.cap}
    if unknown := set(given.again) - {item.name for item in items}:
        refuse(f"--again {min(unknown)!r} is none of {', '.join(item.name for item in items)}")
    try:
        results = Results((given.results or default).absolute(), setting)
    except InputError as error:
        refuse(str(error))
    for name in given.again:
        results.forget(name)

    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    logs = work / "logs"
    part = Slice(
        items, results, 60 * given.minutes, lambda item: run_process(item, logs / f"{file_name(item.name)}.log")
    )
    try:
        part.go()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    failed = [item for item in items if results.attempts(item)]
    for item in failed:
        record = results.items[item.name]
        print(f"failed: {item.name}, {record['ended']}; {file_name(item.name)}.log in {logs}")
    left = ", ".join(item.name for item in part.left())
    print(f"left: {left}; the same command goes on" if left else f"nothing is left; {results.path}")
    raise SystemExit(bool(failed))


def file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


if __name__ == "__main__":
    main()
