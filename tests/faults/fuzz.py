"""Every option of every command and every key of every configuration, with values that people and programs give them.

    python -m tests.faults.fuzz [--trials N] [--seed SEED] [--only PLACE] [--outcomes FILE]

Options and keys are read off the commands and the configurations' classes, so that a new one is tried as soon as it is
there. Each trial is a process of its own, forked from one that has imported everything, in a folder whose inputs it
leaves alone. Trainings are cut off where their first step would begin: until then all is decided. A trial is wrong
where it ends in a traceback, hangs, is killed, is refused in more than ``LINES`` lines or ``CHARACTERS`` characters,
leaves something half-written under a final name, or accepts what cannot be meant (``harmless`` is the list of what may
be accepted, and why).
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import types
import typing
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from stdist import cli
from stdist.nodes.kinds import BACKBONES
from stdist.runs.recipes import RECIPES

from . import world

VALUES = [
    "", " ", "0", "-1", "3", "0.5", "99999999999999999999", "4000000000", "1e400", "nan", "true", "null",
    "[1, 2]", "{a: 1}", "[" * 3000, "x" * 5000, "2013-11-01:2013-11-99", "/dev/null", "grid.zarr",
    "nowhere/at all\tü\u2028'\"",
]  # fmt: skip
HUGE = {"99999999999999999999", "4000000000", "1e400", "nan"}
"""Values that nobody means."""
LINES, CHARACTERS = 2, 1100
PATIENCE = 60
"""Seconds of a trial, on a crowded machine."""
MEMORY = 6 * 2**30
"""Bytes of address space that a trial may have beyond what it begins with."""


KEPT: set[str] = set()
"""Names in the world's folder that trials leave there."""


@dataclass(frozen=True)
class Trial:
    where: str
    """As ``forecast --region`` or ``vision grpo.beta``."""
    value: str
    arguments: list[str]


@dataclass(frozen=True)
class Outcome:
    trial: Trial
    kind: str
    """``accepted``, ``refused`` (2), ``diverged`` (3), ``damage`` (4), ``machine`` (5), or what is wrong."""
    text: str

    @property
    def wrong(self) -> bool:
        return self.kind in WRONG


WRONG = ("traceback", "hang", "killed", "long", "leftover", "silent", "other code")


class FirstStep(Exception):
    """A training was accepted: its first step would begin now."""


# --- trials --------------------------------------------------------------------------------------------------------


def trials() -> list[Trial]:
    return [*_of_commands(), *_of_keys()]


def _of_commands() -> Iterator[Trial]:
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        if name == "prepare":
            for reader in command.list_commands(None):
                base = [*world.SOURCES.get(reader, ["junk"]), *world.OPTIONS.get(reader, []), "--out", "out/x.zarr"]
                yield from _of_command(command.get_command(None, reader), ["prepare", reader], base)
        else:
            out = {"forecast": ["--out", "out/x.zarr"], "demo": ["--out", "out/demo"]}.get(name, [])
            yield from _of_command(command, [name], [*world.COMMANDS[name], *out])


def _of_command(command: Any, path: list[str], base: list[str]) -> Iterator[Trial]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    for parameter in command.params:
        for value in VALUES:
            if parameter.param_type_name == "argument":
                place = arguments.index(parameter)
                changed = [*base[:place], value, *base[place + 1 :]]
            elif parameter.is_flag:
                changed = [*base, f"{parameter.opts[0]}={value}"]
            else:
                changed = [*_without(base, parameter.opts[0]), parameter.opts[0], value]
            yield Trial(f"{' '.join(path)} {parameter.opts[0]}", value, [*path, *changed])


def _without(arguments: list[str], option: str) -> list[str]:
    if option not in arguments:
        return arguments
    place = arguments.index(option)
    return arguments[:place] + arguments[place + 2 :]


def _of_keys() -> Iterator[Trial]:
    commands = cycle(["train", "train", "plan"])  # in turn: all values go to both
    for name, tree in world.CONFIGS.items():
        kind = RECIPES[tree.get("recipe", "vision-llm")].Config
        keys = list(keys_of(kind.of_tree(tree)))
        if name not in ("urban", "vision"):  # what differs from ``urban``
            keys = [key for key in keys if key.split(".")[0] in ("model", "few_shot", "continual")]
        for key in keys:
            for value in VALUES:
                command = next(commands)
                yield Trial(f"{name} {key}", value, [command, f"{name}.yaml", "name=new", f"{key}={value}"])


def keys_of(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Dotted keys of a configuration's class, groups of keys too."""
    for name, field in model.model_fields.items():
        yield f"{above}{name}"
        for kind in _models_in(field.annotation):
            yield from keys_of(kind, f"{above}{name}.")


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [kind for part in typing.get_args(annotation) for kind in _models_in(part)]
    return []


# --- one trial -----------------------------------------------------------------------------------------------------


def attempt(trial: Trial) -> Outcome:
    """Runs a trial in a fork, in the current folder."""
    _clear()
    os.mkdir("out")
    for path in ("stdout", "stderr"):
        Path(path).unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _limit_memory()
        run_command(trial.arguments)
    began = time.monotonic()
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() - began > PATIENCE:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome(trial, "hang", "")
        time.sleep(0.002)
    text = Path("stderr").read_text(errors="replace")
    code = os.waitstatus_to_exitcode(ended[1])
    return Outcome(trial, judge(trial, code, text), text)


def _clear() -> None:
    """Removes what a trial wrote beside the world's own inputs."""
    for path in Path().iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def judge(trial: Trial, code: int, text: str) -> str:
    left = [path.name for path in Path("out").rglob("*") if not any(".partial" in part for part in path.parts)]
    new = Path("runs/new").exists()
    shutil.rmtree("runs/new", ignore_errors=True)
    if "Traceback (most recent call last)" in text:
        return "traceback"
    if code < 0:
        return "killed"
    if code == 0:
        return "accepted" if harmless(trial) else "silent"
    lines = text.splitlines()
    said = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    if code not in (2, 3, 4, 5) or not said:
        return "other code"
    if len(lines) - said[-1] > LINES or len("\n".join(lines[said[-1] :])) > CHARACTERS:
        return "long"
    if code == 2 and (left or new):
        return "leftover"
    return {2: "refused", 3: "diverged", 4: "damage", 5: "machine"}[code]


def run_command(arguments: list[str]) -> typing.NoReturn:
    """In a fork: ``stdist`` with these arguments; what it prints goes into files of the current folder."""
    for number, path in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, errors="backslashreplace", closefd=False) for number in (1, 2))
    sys.argv = ["stdist", *arguments]
    code: Any = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    except FirstStep:
        pass
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _limit_memory() -> None:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def cut_off() -> None:
    """From now on trainings and services end where they would begin, and nothing starts Ray."""
    import stdist.orchestration.cluster
    import stdist.orchestration.jobs
    import stdist.orchestration.learners
    import stdist.orchestration.policy_workers.sweep
    import stdist.orchestration.preparation
    import stdist.serving.service
    import stdist.urbanpg.plan
    import stdist.urbanpg.run
    import stdist.vision_llm.demo
    import stdist.vision_llm.doctor
    import stdist.vision_llm.plan
    import stdist.vision_llm.run
    from stdist.training import loop

    def first_step(*_: Any, **__: Any) -> None:
        raise FirstStep

    loop.StageRun.train = first_step  # type: ignore[method-assign]
    stdist.orchestration.cluster.ray.init = first_step  # type: ignore[assignment]
    stdist.serving.service.uvicorn.Server.run = first_step  # type: ignore[method-assign]
    list(RECIPES.values()), list(BACKBONES.values())


# --- what may be accepted ------------------------------------------------------------------------------------------

NAMES = ("city", "channel", "name", "variable", "submission_id")
LIMITS = (
    "max_steps", "max_epochs", "patience", "logging_steps", "save_steps", "eval_steps", "warmup_steps", "max_failures",
    "timeout", "lease_timeout", "max_grad_norm", "activation_memory", "epsilon", "epsilon_high", "device_flops",
    "device_memory",
)  # fmt: skip
CUT_TO_SIZE = ("eval_windows", "windows_per_batch", "cells_per_window", "block_nodes", "max_staleness")
SCALES = ("half_score", "beta", "temperature")


def harmless(trial: Trial) -> bool:
    """Whether a value may be accepted there: one that somebody may mean (``HUGE`` are meant by nobody), or, with its
    reason, one of those."""
    if trial.value not in HUGE:
        return True
    key = trial.where.split()[-1].removeprefix("--").split(".")[-1].replace("-", "_")
    return (
        key in NAMES  # a name is any text
        or key == "seed"  # one number draws as well as another
        or key in ("row0", "col0", "id_width")  # ids are the data's own, whatever they are
        or key in ("out", "output_dir", "working_dir")  # so is the name of a file or folder that is made
        or key in LIMITS  # what is never reached limits nothing, and holds nothing
        or key in CUT_TO_SIZE  # no more are taken than there are
        or key in SCALES  # a number of the loss: what comes of it is measured, and ends in 3 where it is too much
    )


# --- the program ---------------------------------------------------------------------------------------------------


def fuzz(chosen: list[Trial], folder: Path) -> list[Outcome]:
    """Runs trials in a world made in ``folder``."""
    before = os.getcwd()
    os.chdir(folder)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}

    def stdist(*arguments: str) -> int:
        sys.argv = ["stdist", *arguments]
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    try:
        # In forks: a library that has begun threads in this process would wait for them in every fork.
        if (builder := os.fork()) == 0:
            world.build(folder, stdist)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(builder, 0)[1]) == 0, "the world could not be made"
        if child := os.fork():  # the fork is patched, and this process is not
            os.waitpid(child, 0)
            outcomes = [json.loads(line) for line in Path("outcomes.jsonl").read_text().splitlines()]
            return [Outcome(Trial(*outcome[0]), *outcome[1:]) for outcome in outcomes]
        cut_off()
        KEPT.update({path.name for path in Path().iterdir()}, {"outcomes.jsonl"})
        with open("outcomes.jsonl", "w") as file:
            for trial in chosen:
                made = attempt(trial)
                file.write(json.dumps([list(vars(trial).values()), made.kind, made.text[-4000:]]) + "\n")
                file.flush()
        os._exit(0)
    finally:
        os.chdir(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, help="drawn at random; all if absent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="those whose place has this in it")
    parser.add_argument("--outcomes", type=Path, help="file to write every outcome to")
    parser.add_argument("--folder", type=Path, help="where to make the world; the system's own for such if absent")
    options = parser.parse_args()
    chosen = [trial for trial in trials() if options.only in trial.where]
    if options.trials:
        chosen = random.Random(options.seed).sample(chosen, min(options.trials, len(chosen)))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        outcomes = fuzz(chosen, Path(folder))
        if options.outcomes:
            shutil.copy(Path(folder) / "outcomes.jsonl", options.outcomes)
    for outcome in outcomes:
        if outcome.wrong:
            last = outcome.text.strip().splitlines()[-1:] or [""]
            print(f"{outcome.kind}: stdist {' '.join(a[:40] for a in outcome.trial.arguments)!r}: {last[0][:200]}")
    counts = Counter(outcome.kind for outcome in outcomes)
    print(json.dumps({"trials": len(outcomes), **dict(counts.most_common())}))
    sys.exit(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    main()
