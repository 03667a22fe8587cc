"""A command run in this process, small inputs for it, and one run trained from beginning to end."""

import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_prep import READERS, prepare
from stdist import cli

DAYS, SLOTS = 8, 24
# Both alignment stages, SFT and GRPO within seconds: every stage saves more than once and is evaluated in between.
TINY: dict[str, Any] = {
    "name": "tiny",
    "output_dir": "runs",
    "data": {"store": "city.zarr", "history": 3, "horizon": 2, "region": "0:2,0:2"},
    "numerals": {"mantissa_digits": 2},
    "policy": {"base": "tiny"},
    "alignment": {"trainable": "full", "max_steps": 3, "train_batch_size": 4, "eval_examples": 1},
    "arithmetic": {"trainable": "full", "max_steps": 3, "train_batch_size": 4, "eval_examples": 1},
    "sft": {"trainable": "full", "max_steps": 10, "windows_per_step": 2, "cells_per_window": 2, "eval_windows": 2},
    "grpo": {"max_steps": 8, "windows_per_step": 1, "cells_per_window": 2, "num_generations": 2, "eval_windows": 2},
}
for _stage in ("alignment", "arithmetic", "sft", "grpo"):
    TINY[_stage] |= {"logging_steps": 1, "save_steps": 2, "eval_steps": 5, "warmup_steps": 2, "learning_rate": 1e-3}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of standard output."""
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def stdist(monkeypatch, capsys) -> Callable[..., Result]:
    """``stdist("prepare", …)`` as the console script runs it, in this process. An exception is a failed test."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["stdist", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(stdist, tmp_path) -> Callable[..., str]:
    """Runs a command that must be refused: exit code 2 (``code``), one ``error:`` line, no file more or less than
    before.

    Returns the line without ``error: ``.
    """

    def run(*arguments: object, code: int = 2) -> str:
        before = files_below(tmp_path)
        result = stdist(*arguments)
        lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
        assert result.code == code and len(lines) == 1 and "Traceback" not in result.err, result
        assert result.out == ""
        assert files_below(tmp_path) == before
        return lines[0].removeprefix("error: ")

    return run


def files_below(folder: Path) -> dict[str, bytes | None]:
    paths = [path for path in folder.rglob("*") if "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def write_config(folder: Path, store: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"data": TINY["data"] | {"store": str(store)}}))
    return path


@pytest.fixture
def config(tmp_path, monkeypatch, city) -> Path:
    """``tiny.yaml`` in the current folder ``tmp_path``, on the shared store."""
    monkeypatch.chdir(tmp_path)
    return write_config(tmp_path, city)


def wide_csv(changes: dict[int, str] | None = None) -> str:
    """Eight days of hourly frames of a 2 × 2 grid; ``changes``: rows to replace."""
    rows = [",".join(str(5 + (frame * 7 + 3 * cell) % 50) for cell in range(4)) for frame in range(DAYS * SLOTS)]
    for number, row in (changes or {}).items():
        rows[number] = row
    return "\n".join(rows) + "\n"


@pytest.fixture
def csv_command(tmp_path) -> Callable[..., list[str]]:
    """Writes ``wide_csv(changes)`` and gives the command that prepares a store of it, NAME.zarr below ``tmp_path``."""

    def command(name: str, changes: dict[int, str] | None = None) -> list[str]:
        source, out = tmp_path / f"{name}.csv", tmp_path / f"{name}.zarr"
        source.write_text(wide_csv(changes))
        command = ["prepare", "table", str(source), "--out", str(out), "--start", "2013-11-01", "--cadence", "60"]
        return [*command, "--height", "2", "--channel", "internet"]

    return command


# --- processes -----------------------------------------------------------------------------------------------------


PATIENCE = 900
"""Seconds a process may take on a crowded machine; alone on it none takes more than twenty."""

MAIN = "from stdist.cli import main; main()"
HANGING_MAIN = """
import sys, time
from pathlib import Path
from stdist.training.run_log import RunLog

write, hang_at = RunLog.write, sys.argv.pop()

def write_then_hang(self, stage, step, scalars):
    write(self, stage, step, scalars)
    if f"{stage} {step}" == hang_at:
        Path("hanging").touch()
        while not Path("go_on").exists():
            time.sleep(0.01)

RunLog.write = write_then_hang
from stdist.cli import main
main()
"""


FORKED = """
import os, sys

os.chdir({folder!r})
sys.argv = ["stdist", *{arguments!r}]
for number, path in enumerate({outputs!r}, 1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
"""
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["stdist.cli", "stdist.vision_llm.run", "stdist.evaluation.report"])


class Command:
    """A command in a process of its own in ``folder``, on one thread, without a network. It is the fork of a process
    that has only imported what commands import: torch and transformers alone take longer than a tiny training."""

    def __init__(self, folder: Path, *arguments: str, program: str = MAIN):
        self._outputs = tempfile.TemporaryDirectory()
        self._paths = [Path(self._outputs.name, name) for name in ("stdout", "stderr")]
        source = FORKED.format(folder=str(folder), arguments=arguments, outputs=[str(path) for path in self._paths])
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("OMP_NUM_THREADS", "1")
            environment.setenv("HF_HUB_OFFLINE", "1")
            forkserver.ensure_running()
        self._process = PROCESSES.Process(target=exec, args=(source + program, {}))  # type: ignore[attr-defined]
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def said(self) -> str:
        """Standard output so far."""
        return self._paths[0].read_text() if self._paths[0].exists() else ""

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Standard output and error of the command, which has ended."""
        self._process.join(timeout)
        assert self.returncode is not None, f"still running after {timeout} s"
        out, err = (path.read_text() if path.exists() else "" for path in self._paths)
        return out, err


@pytest.fixture(scope="session")
def finish_training() -> Callable[[Path], tuple[dict[str, Any], str]]:
    """``stdist train tiny.yaml --json`` in a folder, to its end: its result and standard error."""

    def finish(folder: Path) -> tuple[dict[str, Any], str]:
        process = Command(folder, "train", "tiny.yaml", "--json")
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
        return json.loads(out.splitlines()[-1]), err

    return finish


@pytest.fixture(scope="session")
def hanging_training() -> Callable[[Path, str, int], Command]:
    """The same, hanging behind the log's line of a step when this returns; it goes on once FOLDER/go_on exists."""

    def start(folder: Path, stage: str, step: int) -> Command:
        process = Command(folder, "train", "tiny.yaml", "--json", f"{stage} {step}", program=HANGING_MAIN)
        deadline = time.monotonic() + PATIENCE
        while not (folder / "hanging").exists():
            assert process.returncode is None, process.communicate()
            assert time.monotonic() < deadline, f"no step {step} of {stage} in time"
            time.sleep(0.01)
        return process

    return start


@pytest.fixture(scope="session")
def city(tmp_path_factory) -> Path:
    """A store of a generated city: 3 × 3 cells, eight days of hourly frames. Tests leave it as it is."""
    path = tmp_path_factory.mktemp("city") / "city.zarr"
    prepare(READERS["synthetic"].plan([], height=3, width=3, days=DAYS, cadence=60, seed=1), path)
    return path


@dataclass(frozen=True)
class FinishedRun:
    """``folder`` holds tiny.yaml and runs/tiny. Tests copy it before they change anything."""

    folder: Path
    result: Result

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / "tiny"


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, city) -> FinishedRun:
    """All four stages, forecast and report, uninterrupted, by ``stdist train tiny.yaml --json``."""
    folder = tmp_path_factory.mktemp("finished")
    write_config(folder, city)
    process = Command(folder, "train", "tiny.yaml", "--json")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return FinishedRun(folder, Result(0, out, err))


# --- a run on nodes, seconds long -------------------------------------------------------------------------------------

URBAN = {
    "recipe": "urbanpg-train",
    "name": "n",
    "data": {"store": "z.zarr", "channel": "flow", "history": 3, "horizon": 2},
    "model": {"d": 4},
    "training": {"max_epochs": 1, "patience": 1, "train_batch_size": 16},
}


def prepare_zones(store: Path, days: int = 28, lost: slice | None = None) -> None:
    values = np.random.default_rng(1).uniform(1, 40, (24 * days, 4, 1))
    if lost:
        values[lost] = np.nan
    np.savez(store.with_suffix(".npz"), arr_0=values)
    READERS["zones-npz"].prepare(
        [store.with_suffix(".npz")], store, city="demo", start="2019-01-01T00:00", channels="flow"
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with z.zarr, c.yaml and the finished run runs/n. Tests copy it."""
    folder = tmp_path_factory.mktemp("boundary")
    prepare_zones(folder / "z.zarr")
    (folder / "c.yaml").write_text(yaml.safe_dump(URBAN))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        from stdist.runs import recipes

        recipes.train(recipes.load_config(Path("c.yaml")), lambda line: None)
    return folder


@pytest.fixture
def world(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line_of(result, code):
    assert result.code == code, result
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and result.err.rstrip().endswith(errors[0]) and "Traceback" not in result.err, result
    return errors[0].removeprefix("error: ")
