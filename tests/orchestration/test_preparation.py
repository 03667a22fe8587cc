"""Parts on a real Ray cluster of this machine: the same bytes as in one process, whatever happens to a worker."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'stdist[cluster]'")

from data_prep import Plan, prepare  # noqa: E402
from stdist.data import GridSpec  # noqa: E402
from stdist.data.parts import Day, Part, PartResult  # noqa: E402
from stdist.errors import InputError, ResourceError  # noqa: E402
from stdist.orchestration import preparation  # noqa: E402
from stdist.orchestration.preparation import ray_executor  # noqa: E402

Read = Callable[[Part], Iterator[Day]]
PATIENCE = 300
"""Seconds a worker may take to end on a crowded machine."""


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Six days of two channels in three parts, some values missing."""
    days = np.datetime64("2013-11-01"), np.datetime64("2013-11-06")
    spec = GridSpec("toy", ("flow", "speed"), *days, np.arange(12).reshape(4, 3), cadence_minutes=60)

    def read(part: Part) -> Iterator[Day]:  # not of this module, which workers could not import
        for day in part.days:
            values = np.random.default_rng(day).gamma(2, 5, (24, 4, 3)).astype(np.float32)
            values[values < 1] = np.nan
            yield Day(day, {"flow": values, "speed": values + 1})

    parts = [Part(f"days {first}", (first, first + 1)) for first in (0, 2, 4)]
    return Plan(spec, {"reader": "test"}, [], None, parts, read)


@pytest.fixture(scope="module")
def digest(plan, tmp_path_factory) -> str:
    """Of the store that one process writes."""
    return prepare(plan, tmp_path_factory.mktemp("one") / "city.zarr").digest


def dying(read: Read, name: str, flag: Path) -> Read:
    """Kills its own process in the middle of a part, as long as ``flag`` has lives left: a byte each."""

    def read_and_die(part: Part) -> Iterator[Day]:
        days = iter(read(part))
        if part.name == name:
            yield next(days)
            if lives := flag.read_bytes():
                flag.write_bytes(lives[1:])
                os.kill(os.getpid(), signal.SIGKILL)
        yield from days

    return read_and_die


def test_the_store_of_a_cluster_is_that_of_one_process(local_ray, plan, digest, tmp_path):
    told: list[tuple[int, int]] = []
    with ray_executor("auto") as executor:
        summary = prepare(plan, tmp_path / "city.zarr", progress=lambda *step: told.append(step), executor=executor)
    assert summary.digest == digest and summary.missing["flow"] > 0
    assert told == [(2, 6), (4, 6), (6, 6)]
    assert ray.is_initialized()  # a connection that was there is left


def test_the_part_of_a_killed_worker_is_run_again(local_ray, plan, digest, tmp_path):
    flag = tmp_path / "lives"
    flag.write_bytes(b"x")
    with ray_executor("auto") as executor:
        summary = prepare(
            replace(plan, read=dying(plan.read, "days 2", flag)), tmp_path / "city.zarr", executor=executor
        )
    assert flag.read_bytes() == b"" and summary.digest == digest


def test_a_part_that_kills_every_worker_ends_it_and_a_restart_finishes(local_ray, plan, digest, tmp_path, monkeypatch):
    """What was done stays: after the restart the bytes are those of an undisturbed preparation."""
    monkeypatch.setattr(preparation, "MAX_RETRIES", 1)
    flag, out = tmp_path / "lives", tmp_path / "city.zarr"
    flag.write_bytes(b"xx")
    deadly = replace(plan, read=dying(plan.read, "days 2", flag))
    with ray_executor("auto") as executor:
        with pytest.raises(ResourceError, match="died, perhaps killed for want of memory"):
            prepare(deadly, out, executor=executor)
        assert flag.read_bytes() == b"" and not out.exists()
        assert prepare(plan, out, executor=executor).digest == digest


def test_bad_input_in_a_part_is_one_line_and_stops_the_others(local_ray, plan, tmp_path):
    endless = tmp_path / "endless"

    def read(part: Part) -> Iterator[Day]:
        if part.name == "days 0":
            endless.write_text(str(os.getpid()))
            while True:
                time.sleep(0.1)
        while not endless.exists():
            time.sleep(0.1)
        raise InputError("raw.txt, line 7: broken; mend it")

    with ray_executor("auto") as executor, pytest.raises(InputError) as refused:
        prepare(replace(plan, read=read), tmp_path / "city.zarr", executor=executor)
    assert str(refused.value) == "raw.txt, line 7: broken; mend it"
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{endless.read_text()}").exists():
        assert time.monotonic() < deadline, "the other part goes on"
        time.sleep(0.1)


def test_results_come_as_parts_finish(local_ray, tmp_path):
    seen = tmp_path / "seen"

    def run(part: Part) -> PartResult:
        while part.name == "slow" and not seen.exists():
            time.sleep(0.1)
        return PartResult(part.name)

    with ray_executor("auto") as executor:
        results = executor(run, [Part("slow", (0,)), Part("fast", (1,))])
        assert next(results).name == "fast"
        seen.touch()
        assert [result.name for result in results] == ["slow"]


def test_polars_keeps_to_the_core_of_its_task(local_ray):
    def run(part: Part) -> PartResult:
        import polars

        return PartResult(part.name, result=polars.thread_pool_size())

    with ray_executor("auto") as executor:
        assert [result.result for result in executor(run, [Part("day", (0,))])] == [1]
