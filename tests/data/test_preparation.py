"""Preparations that are parallel, killed, restarted, disturbed: always the same store, or one clear line."""

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr

from data_prep import READERS, Day, Part, Plan, prepare
from data_prep.preparation import local_processes
from stdist import locks
from stdist.data import DaySpan, GridSpec, GridWriter, Split, finalise, journal, open_store, shards
from stdist.data.check import check_store
from stdist.data.parts import Executor, PartResult, RunPart
from stdist.errors import InputError, Interrupted, ResourceError

from .killing import kill_at

DAY = np.datetime64("2024-03-01")
SLOTS, DAYS, H, W = 6, 6, 3, 4
SYNTHETIC = {"height": 257, "width": 258, "days": 3, "cadence": 240, "seed": 4}
"""Four tiles of three days, for what needs readers that other processes can import."""

fork = multiprocessing.get_context("fork")


def _values(day: int) -> np.ndarray:
    """Missing values on either side of every midnight, so that imputation crosses days."""
    rng = np.random.default_rng(day)
    values = rng.gamma(2, 30, (SLOTS, H, W)).astype(np.float32)
    values[rng.random(values.shape) < 0.3] = np.nan
    values[[0, -1], 0, 0] = np.nan
    return values


def _read(part: Part) -> Iterator[Day]:
    for day in part.days:
        yield Day(day, {"flow": _values(day), "speed": _values(day + 100)})


def _plan(sources: list[Path] | None = None, **changes: object) -> Plan:
    """Day 2 has no part: a gap of one day."""
    spec = GridSpec("toy", ("flow", "speed"), DAY, DAY + (DAYS - 1), np.arange(H * W).reshape(H, W), 240)
    days = ((0,), (1,), (3,), (4, 5))
    parts = [Part(f"days {each}", each) for each in days]
    split = Split(DaySpan(DAY, DAY + 3), None, DaySpan(DAY + 4, DAY + 5))
    return replace(Plan(spec, {"reader": "test"}, sources or [], split, parts, _read), **changes)


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the toy store, prepared without disturbance."""
    return prepare(_plan(), tmp_path_factory.mktemp("whole") / "toy.zarr").digest


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the synthetic store, prepared in one process."""
    out = tmp_path_factory.mktemp("synthetic") / "city.zarr"
    return READERS["synthetic"].prepare([], out, **SYNTHETIC).digest


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_gap_of_a_day_is_reported_and_the_store_is_whole(tmp_path):
    summary = prepare(_plan(), tmp_path / "toy.zarr")
    assert _names(tmp_path) == ["toy.zarr"]
    # Six slots a day: a day without frames is as long as the longest absence that is filled.
    assert summary.runs == 1 and summary.absent_days == () and summary.frames == DAYS * SLOTS
    store = open_store(summary.path)
    assert check_store(store.path).ok and not (store.path / journal.FOLDER).exists()
    assert xarray.open_zarr(store.path).equals(store.dataset)
    assert not store.observed("flow", 2 * SLOTS, 3 * SLOTS).any()
    known = np.concatenate([~np.isnan(_values(day)) for day in (0, 1, 3, 4, 5)])
    assert summary.missing["flow"] == DAYS * SLOTS * H * W - known.sum()


def test_a_longer_absence_is_a_gap_and_its_days_are_named(tmp_path):
    parts = [Part("first", (0,)), Part("last", (5,))]
    summary = prepare(_plan(parts=parts, split=None), tmp_path / "toy.zarr")
    assert summary.runs == 2 and summary.frames == 2 * SLOTS
    assert summary.absent_days == ("2024-03-02", "2024-03-03", "2024-03-04", "2024-03-05")
    assert summary.as_dict()["absent_days"][0] == "2024-03-02"


def _backwards(run_part: RunPart, parts: list[Part]) -> Iterator[PartResult]:
    return map(run_part, reversed(parts))


def test_the_order_of_parts_does_not_matter(tmp_path, digest):
    assert prepare(_plan(), tmp_path / "toy.zarr", executor=_backwards).digest == digest
    # Nor how the work is cut.
    one = [Part("all", (0, 1, 3, 4, 5))]
    assert prepare(_plan(parts=one), tmp_path / "one.zarr").digest == digest


def test_processes_write_the_store_that_one_process_writes(tmp_path, synthetic):
    seen: list[tuple[int, int]] = []
    plan = READERS["synthetic"].plan([], **SYNTHETIC)
    summary = prepare(plan, tmp_path / "city.zarr", workers=2, progress=lambda *count: seen.append(count))
    assert summary.digest == synthetic
    assert seen == [(3, 12), (6, 12), (9, 12), (12, 12)]


@pytest.mark.parametrize(("given", "threads"), [(None, 2), ("1", 1)])
def test_processes_share_the_cores(monkeypatch, given, threads):
    """Seven cores are two threads of polars for each of three workers, unless the environment says how many."""
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.delenv("POLARS_MAX_THREADS", raising=False)
    if given:
        monkeypatch.setenv("POLARS_MAX_THREADS", given)
    with local_processes(3) as execute:
        # In a worker a part is evaluated: this one as the threads that polars has there.
        assert list(execute(eval, ["__import__('polars').thread_pool_size()"])) == [threads]
    assert os.environ.get("POLARS_MAX_THREADS") == given


# Killed for real. In a forked process, which ends itself with signal 9 at the n-th call of a function: before the
# call, or right after it.


def _prepare_until(out: Path, owner: object, name: str, count: int, before: bool) -> None:
    kill_at(owner, name, count, before)
    prepare(_plan(), out)


# Writes of shards: 5 days of 2 channels with their masks are 20; then 6 imputed days of 2 channels.
POINTS = [
    ("init, before it is noted", journal.Journal, "begin", 1, True),
    ("init, noted", journal.Journal, "begin", 1, False),
    ("in the first part", shards.Shards, "write", 2, False),
    ("between the shards of a day", shards.Shards, "write", 7, False),
    ("shards written, no note", journal.Journal, "add", 2, True),
    ("between parts", journal.Journal, "add", 2, False),
    ("parts done", finalise, "fill_short_absences", 1, True),
    ("in the imputation, of a day without a part", shards.Shards, "write", 23, False),
    ("between channels", shards.Shards, "write", 26, False),
    ("imputed, no digests", finalise, "seal", 1, True),
    ("digests, no name", zarr, "consolidate_metadata", 1, False),
    ("name, notes not removed", Path, "rename", 1, False),
]


@pytest.mark.parametrize(("owner", "name", "count", "before"), [p[1:] for p in POINTS], ids=[p[0] for p in POINTS])
def test_killed_anywhere_and_started_again_it_ends_the_same(tmp_path, digest, owner, name, count, before):
    out = tmp_path / "toy.zarr"
    process = fork.Process(target=_prepare_until, args=(out, owner, name, count, before))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    # The final name is free, or that of a whole store.
    assert not out.exists() or open_store(out).digest == digest
    done = {path.name for path in (tmp_path / "toy.zarr.partial" / journal.FOLDER / "parts").glob("*.json")}
    again: list[str] = []

    def monitor(run_part: RunPart, parts: list[Part]) -> Iterator[PartResult]:
        again.extend(part.name for part in parts if not part.name.startswith("impute"))
        return map(run_part, parts)

    assert prepare(_plan(), out, executor=monitor).digest == digest
    assert _names(tmp_path) == ["toy.zarr"] and check_store(out).ok
    assert not list(out.rglob("*.partial")) and not (out / journal.FOLDER).exists()
    if name != "rename":
        # A shard of a part that imputation has just written and not noted is not told from a damaged one.
        unnoted = (name, count) == ("write", 26)
        assert len(again) + len(done) == 4 + unnoted


@pytest.mark.parametrize(
    "reached",
    [
        pytest.param(lambda at: any((at / "internet").rglob("c/0/*/*")), id="while parts run"),
        pytest.param(lambda at: len(list((at / journal.FOLDER / "parts").glob("*.json"))) >= 2, id="between parts"),
        pytest.param(lambda at: (at / journal.FOLDER / "scratch").exists(), id="in finalise"),
    ],
)
def test_a_preparation_with_workers_is_killed_and_its_workers_end_with_it(tmp_path, synthetic, reached):
    """The coordinating process alone is killed; nobody may write on, or a restart would share shards with it."""
    out = tmp_path / "city.zarr"
    plan = READERS["synthetic"].plan([], **SYNTHETIC)
    process = fork.Process(target=prepare, args=(plan, out, 2))
    process.start()
    _wait_for(lambda: reached(tmp_path / "city.zarr.partial") or not process.is_alive())
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not out.exists()
    assert prepare(plan, out).digest == synthetic
    assert _names(tmp_path) == ["city.zarr"] and check_store(out).ok


def _wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_a_dead_worker_is_one_line_and_a_restart_finishes(tmp_path, synthetic):
    plan = READERS["synthetic"].plan([], **SYNTHETIC)

    def kill_one(done: int, total: int) -> None:
        worker = multiprocessing.active_children()[0]
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)

    with pytest.raises(ResourceError, match=r"a worker process of .*city\.zarr died.*give fewer --workers") as error:
        prepare(plan, tmp_path / "city.zarr", workers=2, progress=kill_one)
    assert "\n" not in str(error.value) and _names(tmp_path) == ["city.zarr.partial"]
    assert prepare(plan, tmp_path / "city.zarr").digest == synthetic


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_keeps_what_is_done(tmp_path, synthetic, workers):
    plan = READERS["synthetic"].plan([], **SYNTHETIC)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="goes on from there"):
        prepare(plan, tmp_path / "city.zarr", workers, stop)
    assert _names(tmp_path) == ["city.zarr.partial"]
    counts: list[int] = []
    assert prepare(plan, tmp_path / "city.zarr", progress=lambda done, _: counts.append(done)).digest == synthetic
    # In one process the first day stopped it, before any part was whole; processes finish the parts in hand.
    assert counts[0] == (1 if workers == 1 else 6)


@pytest.mark.parametrize("share", [0, 0.4, 0.8, 1])
def test_a_full_disk_is_one_line_and_a_restart_finishes(tmp_path, digest, monkeypatch, share):
    """No file can be written after a share of those that a preparation writes: in init, in parts, in finalise."""
    from zarr.storage import _local

    put, calls, limit = _local._put, 0, float("inf")

    def limited(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls >= limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(_local, "_put", limited)
        prepare(_plan(), tmp_path / "counted.zarr")
        limit, calls = max(1, int(share * calls)), 0
        with pytest.raises(ResourceError, match=r"toy\.zarr\.partial: no space is left; free some") as error:
            prepare(_plan(), tmp_path / "toy.zarr")
    assert "\n" not in str(error.value) and _names(tmp_path) == ["counted.zarr", "toy.zarr.partial"]
    assert prepare(_plan(), tmp_path / "toy.zarr").digest == digest


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path, digest):
    out = tmp_path / "toy.zarr"

    def meet(run_part: RunPart, parts: list[Part]) -> Iterator[PartResult]:
        for part in parts:
            with pytest.raises(InputError, match=rf"toy\.zarr is being written by process {os.getpid()} on"):
                prepare(_plan(), out)
            yield run_part(part)

    assert prepare(_plan(), out, executor=meet).digest == digest


def test_workers_of_a_killed_preparation_are_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "PATIENCE", 0.1)
    own = journal.Journal(tmp_path / "toy.zarr.partial")
    with ExitStack() as worker:
        with own.lock(tmp_path / "toy.zarr", "before"):
            worker.enter_context(own.working("before"))
        with pytest.raises(InputError, match="workers of a killed preparation still write"):
            prepare(_plan(), tmp_path / "toy.zarr")
    prepare(_plan(), tmp_path / "toy.zarr")


def test_a_worker_of_a_killed_preparation_writes_no_further_part(tmp_path, digest):
    """Such a worker may have taken a part just when the restart looked for it, and would begin it now."""
    plan = _plan()
    with GridWriter(tmp_path / "toy.zarr", plan.spec, plan.recipe, parts=plan.parts) as before:
        late = before.part_writer(_read)

    def meet(run_part: RunPart, parts: list[Part]) -> Iterator[PartResult]:
        with pytest.raises(RuntimeError, match="was restarted"):
            late(parts[0])
        return map(run_part, parts)

    assert prepare(plan, tmp_path / "toy.zarr", executor=meet).digest == digest


def test_a_file_system_without_locks_serves(tmp_path, digest, monkeypatch):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    assert prepare(_plan(), tmp_path / "toy.zarr").digest == digest


def _stopped(plan: Plan, out: Path) -> None:
    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        prepare(plan, out, progress=stop)


def test_a_partial_of_other_work_is_refused_and_kept(tmp_path, digest):
    source = tmp_path / "raw.txt"
    source.write_text("one")
    out = tmp_path / "toy.zarr"
    _stopped(_plan([source]), out)
    source.write_text("two")
    other_spec = replace(_plan().spec, inside=np.eye(H, W, dtype=bool))
    for plan, what in (
        (_plan([source]), "sources"),
        (_plan(recipe={"reader": "other"}), "recipe"),
        (_plan([source], spec=replace(_plan().spec, city="elsewhere")), "city"),
    ):
        with pytest.raises(InputError, match=rf"of another preparation: its {what} differs; remove it or choose"):
            prepare(plan, out)
    source.write_text("one")
    with pytest.raises(InputError, match="its coordinates differs"):
        prepare(_plan([source], spec=other_spec), out)
    with pytest.raises(InputError, match="its parts differs"):
        prepare(_plan([source], parts=[Part("all", (0, 1, 2, 3))]), out)
    assert _names(tmp_path) == ["raw.txt", "toy.zarr.partial"]
    assert open_store(prepare(_plan([source]), out).path).attributes["sources"] == [
        {"name": "raw.txt", "bytes": 3, "sha256": "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"}
    ]


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path):
    source = tmp_path / "raw"
    source.mkdir()
    (source / "a").write_text("one")

    def change(*_: int) -> None:
        (source / "a").write_text("other")

    with pytest.raises(InputError, match="raw changed while it was read"):
        prepare(_plan([source]), tmp_path / "toy.zarr", progress=change)
    assert _names(tmp_path) == ["raw"]


def test_bad_input_in_a_part_leaves_nothing(tmp_path):
    def broken(part: Part) -> Iterator[Day]:
        yield from _read(part)
        raise InputError("raw.txt, line 7: broken")

    with pytest.raises(InputError, match="line 7"):
        prepare(_plan(read=broken), tmp_path / "toy.zarr")
    assert _names(tmp_path) == []


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ([Part("a", (0, 1)), Part("b", (1, 2))], "parts a and b both touch day 1"),
        ([Part("a", (0,)), Part("a", (1,))], "two parts are called a"),
        ([Part("a", (DAYS,))], "none of the store's"),
        ([Part("a", (0,), tiles=((slice(0, 2), slice(0, 4)),))], "none of the store's"),
    ],
)
def test_parts_that_share_shards_are_refused_before_anything_is_written(tmp_path, parts, line):
    with pytest.raises(ValueError, match=line):
        prepare(_plan(parts=parts), tmp_path / "toy.zarr")
    assert _names(tmp_path) == []


WHOLE = (slice(0, H), slice(0, W))


@pytest.mark.parametrize(
    ("days", "line"),
    [
        ([Day(1, {})], "not one of its whole shards"),
        ([Day(0, {}, tile=(slice(0, H), slice(0, 2)))], "not one of its whole shards"),
        ([Day(0, {"flow": np.zeros((SLOTS, H, 2)), "speed": np.zeros((SLOTS, H, W))})], r"shape \(6, 3, 2\)"),
        ([Day(0, {"flow": np.zeros((3, H, W))}, tile=WHOLE)], r"has shape \(3, 3, 4\), the store \(6, 3, 4\)"),
        ([Day(0, {}, np.ones(5, bool))], "a day has 6 slots"),
        ([Day(0, dict.fromkeys(("flow", "speed"), np.zeros((SLOTS, H, W))))] * 2, "yields day 0, tile 0 twice"),
    ],
)
def test_less_than_whole_shards_of_its_own_is_refused(tmp_path, days, line):
    with pytest.raises(ValueError, match=line):
        prepare(_plan(parts=[Part("a", (0,))], read=lambda part: iter(days)), tmp_path / "toy.zarr")
    assert not (tmp_path / "toy.zarr").exists()


def test_finalise_wants_every_part(tmp_path):
    plan = _plan()
    with (
        pytest.raises(ValueError, match=r"3 parts are missing, the first of them days \(1,\)"),
        GridWriter(tmp_path / "toy.zarr", plan.spec, plan.recipe, parts=plan.parts) as writer,
    ):
        writer.part_writer(_read)(plan.parts[0])
        writer.finalise()


def test_no_workers_are_refused(tmp_path):
    with pytest.raises(InputError, match="0 workers"):
        prepare(_plan(), tmp_path / "toy.zarr", workers=0)


def test_executors_are_of_the_declared_kind(tmp_path, digest):
    """Results in any order; a part's result may come long after others were begun."""

    def eager(run_part: RunPart, parts: list[Part]) -> Iterator[PartResult]:
        return iter([run_part(part) for part in parts][::-1])

    execute: Executor = eager
    assert prepare(_plan(), tmp_path / "toy.zarr", executor=execute).digest == digest
