"""Checkpoints: whole or absent, also under SIGKILL and on a full disk, written beside training, pruned, exact, free of
pickle, and clear where damaged."""

import json
import multiprocessing
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stdist.errors import DamageError, InputError, ResourceError
from stdist.files import write_atomically
from stdist.runs.forecasting import finished_stage
from stdist.training import checkpoint as checkpoint_module
from stdist.training.checkpoint import StageCheckpoints, checksums, require_undamaged_model
from stdist.training.run_log import RunLog


def _trained(toy, steps: int):
    stage = toy.ToyStage()
    engine = stage.engine()
    for step in range(steps):
        stage.step(step, engine.backward)
        engine.step()
    return stage, engine


def _save(checkpoints: StageCheckpoints, stage, engine, step: int, keep: tuple[int, ...] = (), **values: float) -> Path:
    checkpoints.save(step, stage.snapshot, engine, values, keep)
    checkpoints.wait()
    return checkpoints.step_dir(step)


def _names(checkpoints: StageCheckpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def _newest(checkpoints: StageCheckpoints) -> Path | None:
    found = checkpoints.newest()
    return found and found[0]


# --- what is in one ------------------------------------------------------------------------------------------------


def test_save_and_load_restore_engine_loop_and_random_state(toy, tmp_path):
    stage, engine = _trained(toy, 3)
    checkpoints = StageCheckpoints(tmp_path / "toy")
    torch.manual_seed(11)
    path = _save(checkpoints, stage, engine, 3, best=float("inf"), stale=2)
    expected = torch.rand(4)

    other = toy.ToyStage()
    torch.manual_seed(99)
    found = checkpoints.newest()
    assert found is not None and found[0] == path == tmp_path / "toy" / "step-3" and found[2] == []
    other.read(path)
    restored = other.engine()
    checkpoints.load(path, restored, found[1])
    assert found[1]["step"] == 3 and found[1]["loop"] == {"best": float("inf"), "stale": 2}
    assert torch.equal(torch.rand(4), expected)
    here, there = dict(restored.state()), dict(engine.state())
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in there)
    assert restored.learning_rate == engine.learning_rate and restored.steps == 3


def test_the_state_is_plain_json_and_safetensors_by_names_of_weights(toy, tmp_path):
    stage, engine = _trained(toy, 2)
    path = _save(StageCheckpoints(tmp_path / "toy"), stage, engine, 2, stale=0)
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    shard = "trainer_state/shard-00000-of-00001.safetensors"
    assert files == ["model.safetensors", shard, "trainer_state/state.json"]
    moments = {f"{name}/{key}" for name in ("weight", "bias") for key in ("step", "exp_avg", "exp_avg_sq")}
    assert load_file(path / shard).keys() == moments | {"torch_rng"}
    state = json.loads((path / "trainer_state" / "state.json").read_text())
    assert state["step"] == 2 and state["engine"] == {"steps": 2} and state["loop"] == {"stale": 0}
    assert set(state["files"]) == {"model.safetensors", shard}
    assert state["weights"] == checksums(engine.parameters)


def test_no_checkpoint_yet(tmp_path):
    checkpoints = StageCheckpoints(tmp_path / "toy")
    assert checkpoints.newest() is None and checkpoints.finished is None


def test_checksums_tell_weights_apart_in_every_precision():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int8):
        weights = torch.arange(12).to(dtype).view(3, 4)
        other = weights.clone()
        other[2, 1] += 1
        assert checksums({"w": weights}) == checksums({"w": weights.t().contiguous().t()})
        assert checksums({"w": weights}) != checksums({"w": other})


def test_weights_that_did_not_arrive_are_said(toy, tmp_path):
    """A file of the right names and shapes with other numbers in it, as a model that loads nothing leaves behind."""
    stage, engine = _trained(toy, 2)
    checkpoints = StageCheckpoints(tmp_path / "toy")
    path = _save(checkpoints, stage, engine, 2)
    found = checkpoints.newest()
    assert found is not None
    stranger = toy.ToyStage()  # has not read the checkpoint
    with pytest.raises(InputError, match=r"step-2: 2 of 2 weights did not arrive in the model as saved, first weight;"):
        checkpoints.load(path, stranger.engine(), found[1])


# --- written beside training ---------------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written(toy, tmp_path):
    """What is written is of the step it was saved at, though the weights and moments have moved on since."""
    stage, engine = _trained(toy, 2)
    checkpoints = StageCheckpoints(tmp_path / "toy")
    writing, go_on = threading.Event(), threading.Event()

    def slow() -> Callable[[Path], None]:
        write = stage.snapshot()

        def wait(path: Path) -> None:
            writing.set()
            assert go_on.wait(300)
            write(path)

        return wait

    weights = {name: p.detach().clone() for name, p in engine.parameters.items()}
    moments = {name: tensor.clone() for name, tensor in engine.state()}
    checkpoints.save(2, slow, engine, {})
    assert writing.wait(300)
    for step in (2, 3):  # while it is being written
        stage.step(step, engine.backward)
        engine.step()
        checkpoints.wait(block=False)
        assert checkpoints.newest() is None and not checkpoints.step_dir(2).exists()
    go_on.set()
    checkpoints.wait()
    assert _newest(checkpoints) == checkpoints.step_dir(2)
    written = load_file(checkpoints.step_dir(2) / "model.safetensors")
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    assert not any(torch.equal(engine.parameters[name], weights[name]) for name in weights)
    shard = load_file(checkpoints.step_dir(2) / "trainer_state" / "shard-00000-of-00001.safetensors")
    assert all(torch.equal(shard[name], moments[name]) for name in moments)


def test_the_next_save_waits_for_the_one_before(toy, tmp_path):
    stage, engine = _trained(toy, 1)
    checkpoints = StageCheckpoints(tmp_path / "toy")
    order: list[str] = []

    def snapshot(step: int) -> Callable[[], Callable[[Path], None]]:
        def copy() -> Callable[[Path], None]:
            order.append(f"copy {step}")
            write = stage.snapshot()
            return lambda path: (write(path), order.append(f"wrote {step}"))[0]

        return copy

    for step in (1, 2):
        checkpoints.save(step, snapshot(step), engine, {})
    checkpoints.wait()
    assert order == ["copy 1", "wrote 1", "copy 2", "wrote 2"]
    checkpoints.wait()  # nothing is left to do
    assert _names(checkpoints) == ["latest", "step-1", "step-2"]


# --- killed, disk full ---------------------------------------------------------------------------------------------


def test_a_failing_writer_leaves_the_last_checkpoint_in_place(toy, tmp_path):
    stage, engine = _trained(toy, 1)
    checkpoints = StageCheckpoints(tmp_path / "toy")
    _save(checkpoints, stage, engine, 1)

    def full_disk(path: Path) -> None:
        (path / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    checkpoints.save(2, lambda: full_disk, engine, {})
    with pytest.raises(ResourceError, match=r"step-2 could not be written \(learner 0: .*No space left on device\)"):
        checkpoints.wait()
    assert _names(checkpoints) == ["latest", "step-1"] and _newest(checkpoints) == checkpoints.step_dir(1)
    _save(checkpoints, stage, engine, 2)  # what it left does not stand in the way
    assert _newest(checkpoints) == checkpoints.step_dir(2)


KILLS = {
    "in the model's file": ("model", "step-2"),
    "in the optimizer's file": ("shard", "step-2"),
    "before the state": ("state.json", "step-2"),
    "before the folder has its name": ("step-4", "step-2"),
    "between the folder's name and latest": ("latest", "step-4"),
}


@pytest.mark.parametrize(("where", "newest"), KILLS.values(), ids=KILLS.keys())
def test_killed_in_the_middle_of_a_save(toy, tmp_path, monkeypatch, where, newest):
    """SIGKILL at the worst moments: the newest checkpoint is a whole one that loads, and saving goes on."""
    stage, engine = _trained(toy, 2)
    checkpoints = StageCheckpoints(tmp_path / "toy")
    _save(checkpoints, stage, engine, 2)
    hanging, replace_file = tmp_path / "hanging", os.replace

    def hang() -> None:
        hanging.touch()
        time.sleep(600)

    def half(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:20])
        hang()

    def snapshot() -> Callable[[Path], None]:
        write = stage.snapshot()

        def write_half(path: Path) -> None:
            write(path)
            half(path / "model.safetensors")

        return write_half if where == "model" else write

    def save_half(tensors: dict, path: Path) -> None:
        save_file(tensors, path)
        half(path)

    def replace_but(source: Path, target: Path) -> None:
        if target.name == where:
            hang()
        replace_file(source, target)

    def child() -> None:
        monkeypatch.setattr(checkpoint_module.os, "replace", replace_but)
        if where == "shard":
            monkeypatch.setattr(checkpoint_module, "save_file", save_half)
        checkpoints.save(4, snapshot, engine, {})
        checkpoints.wait()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    _wait_for(hanging.exists)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL

    found = checkpoints.newest()
    assert found is not None and found[0].name == newest and found[2] == []
    assert (checkpoints.folder / "latest").read_text() == "step-2"
    fresh = toy.ToyStage()
    fresh.read(found[0])
    checkpoints.load(found[0], fresh.engine(), found[1])
    _save(checkpoints, stage, engine, 4)
    assert _names(checkpoints) == ["latest", "step-2", "step-4"] and _newest(checkpoints) == checkpoints.step_dir(4)


def _wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small file system needs to be root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _without_times(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


FULL = {  # pages of 4 KiB that are left: the optimizer's file takes two, the others one each
    "optimizer": (1, "step-12 could not be written (learner 0: SafetensorError: "),
    "model": (2, "step-12 could not be written (learner 0: SafetensorError: "),
    "state": (3, "toy: learner 0 at step 13, checkpoint: "),
    "latest": (4, "toy: learner 0 at step 13, checkpoint: "),
    "log": (0, "toy: learner 0 at step 11, log: "),
}


@pytest.mark.parametrize("where", FULL)
def test_a_full_disk_is_one_line_and_the_next_start_finishes(toy, tmp_path, small_disk, where):
    """Whatever file is the one that no longer fits."""
    toy.run(tmp_path / "whole", toy.ToyStage())
    run_dir, filler, (pages, message) = small_disk / "run", small_disk / "filler", FULL[where]

    def fill(step: int) -> None:
        if step != 10:
            return
        if where == "log":  # its last page is full
            log = run_dir / "log.jsonl"
            other = '{"stage": "another", "step": 0, "note": "%s"}\n'
            room = -(log.stat().st_size + len(other) - 2) % 4096
            log.write_text(log.read_text() + other % ("." * room))
        with filler.open("wb", buffering=0) as file:
            with pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(4096))
            file.truncate(file.tell() - pages * 4096)

    with pytest.raises(ResourceError) as caught:
        toy.run(run_dir, toy.ToyStage(on_step=fill))
    assert (
        message in str(caught.value)
        and re.search("make room|no space is left", str(caught.value))
        and "\n" not in str(caught.value)
    )
    found = StageCheckpoints(run_dir / "checkpoints" / "toy").newest()
    assert found is not None and found[2] == []  # nothing half-written has a final name
    assert found[0].name == ("step-12" if where == "latest" else "step-9")
    filler.unlink()
    toy.run(run_dir, toy.ToyStage())
    lines = [line for line in _without_times(run_dir) if line["stage"] == "toy"]
    assert lines == _without_times(tmp_path / "whole")


def test_a_file_that_may_not_grow_is_one_line_in_a_process_of_its_own(toy, tmp_path):
    """RLIMIT_FSIZE: the shard cannot be written; the error ends the process and only whole checkpoints are left."""
    script = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); import toy; from pathlib import Path\n"
        "limit = lambda step: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)) if step == 10 else None\n"
        "from stdist.training.run_log import RunLog; RunLog.write = lambda *rest: None\n"
        "toy.run(Path(sys.argv[2]), toy.ToyStage(on_step=limit))\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    command = [sys.executable, "-c", script, str(Path(toy.__file__).parent), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "ResourceError: " in last and "step-12 could not be written (learner 0:" in last and "make room" in last
    checkpoints = StageCheckpoints(tmp_path / "run" / "checkpoints" / "toy")
    assert _names(checkpoints) == ["latest", "step-8", "step-9"] and _newest(checkpoints) == checkpoints.step_dir(9)


# --- which are kept ------------------------------------------------------------------------------------------------


def test_the_two_newest_and_what_is_asked_for_are_kept(toy, tmp_path):
    stage, engine = _trained(toy, 1)
    checkpoints = StageCheckpoints(tmp_path / "toy")
    for step in (0, 5, 10, 50):
        _save(checkpoints, stage, engine, step, keep=(5,))
    assert _names(checkpoints) == ["latest", "step-10", "step-5", "step-50"]
    (checkpoints.folder / "step-60.partial").mkdir()  # of a killed save
    _save(checkpoints, stage, engine, 70)
    assert _names(checkpoints) == ["latest", "step-50", "step-70"]


def test_damaged_ones_of_a_lost_future_go_first(toy, tmp_path):
    """Step 9 is damaged, the run goes on from 6: the save at 7 keeps 6, which is good, and not 9."""
    stage, engine = _trained(toy, 1)
    checkpoints = StageCheckpoints(tmp_path / "toy")
    for step in (6, 9):
        _save(checkpoints, stage, engine, step)
    _cut(checkpoints.step_dir(9) / "model.safetensors")
    assert _newest(checkpoints) == checkpoints.step_dir(6)
    _save(checkpoints, stage, engine, 7)
    assert _names(checkpoints) == ["latest", "step-6", "step-7"]


def test_the_best_of_the_checkpoint_before_is_kept_with_it(toy, tmp_path):
    """Best at step 1, then at step 4: while step 4 is the newest, step 3 may still be gone on from, whose best is 1."""
    settings = replace(toy.SETTINGS, max_steps=6, save_steps=1, eval_steps=1)
    stage = toy.ToyStage(monitor="error")
    stage.evaluations = [9, 2, 8, 8, 1, 8, 8]
    seen: dict[int, list[str]] = {}
    folder = tmp_path / "checkpoints" / "toy"
    stage.on_step = lambda step: seen.update({step: sorted(path.name for path in folder.glob("step-*[0-9]"))})
    toy.run(tmp_path, stage, settings)
    assert seen[5] == ["step-1", "step-3", "step-4"]
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-4", "step-5", "step-6"]


# --- damaged -------------------------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    """One bit of the last byte: a file that opens and reads."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _other_step(path: Path) -> None:
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"step": state["step"] + 1}))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


SHARD = "trainer_state/shard-00000-of-00001.safetensors"
DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "optimizer cut short": (SHARD, _cut, f"{SHARD} is not as it was written"),
    "optimizer with a flipped bit": (SHARD, _flip, f"{SHARD} is not as it was written"),
    "optimizer missing": (SHARD, Path.unlink, f"{SHARD} is missing"),
    "state cut short": ("trainer_state/state.json", _cut, "it has no trainer state"),
    "state of something else": ("trainer_state/state.json", lambda p: p.write_text("{}"), "it has no trainer state"),
    "state that is a list": ("trainer_state/state.json", lambda p: p.write_text("[]"), "it has no trainer state"),
    "state with another step": (
        "trainer_state/state.json",
        _other_step,
        "trainer_state/state.json is not as it was written",
    ),
    "state missing": ("trainer_state/state.json", Path.unlink, "it has no trainer state"),
    "model cut short": ("model.safetensors", _cut, "model.safetensors is not as it was written"),
    "model with a flipped bit": ("model.safetensors", _flip, "model.safetensors is not as it was written"),
    "model that is a folder": ("model.safetensors", _folder, "model.safetensors cannot be read: Is a directory"),
    "model missing": ("model.safetensors", Path.unlink, "model.safetensors is missing"),
}


@pytest.fixture
def stopped(toy, tmp_path) -> Path:
    """A run with checkpoints of steps 3 and 6, killed in its eighth step."""

    def stop(step: int) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path / "run", toy.ToyStage(on_step=stop))
    return tmp_path / "run"


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_the_checkpoint_before_serves_where_the_newest_is_damaged(toy, tmp_path, stopped, name, damage, reason):
    """The file is named, and the run ends as if it had never been stopped."""
    folder = stopped / "checkpoints" / "toy"
    damage(folder / "step-6" / name)
    said: list[str] = []
    made: list[int] = []
    toy.run(stopped, toy.ToyStage(on_step=made.append), log=said.append)
    assert said == [f"{folder / 'step-6'} is damaged ({reason}); going on from step-3"]
    assert made == list(range(3, toy.MAX_STEPS))
    toy.run(tmp_path / "whole", toy.ToyStage())
    assert _without_times(stopped) == _without_times(tmp_path / "whole")


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_all_damaged_stops_the_run_with_one_line(toy, stopped, name, damage, reason):
    """The line says which checkpoint, which file and what to do; the run's log stays as it was."""
    folder, log = stopped / "checkpoints" / "toy", (stopped / "log.jsonl").read_text()
    for step in (3, 6):
        damage(folder / f"step-{step}" / name)
    with pytest.raises(InputError) as caught:
        toy.run(stopped, toy.ToyStage())
    assert str(caught.value) == f"{folder / 'step-6'} is damaged ({reason}); delete {folder} to redo the stage"
    assert (stopped / "log.jsonl").read_text() == log


def test_a_lost_latest_is_no_loss(toy, tmp_path, stopped):
    (stopped / "checkpoints" / "toy" / "latest").unlink()
    made: list[int] = []
    toy.run(stopped, toy.ToyStage(on_step=made.append))
    assert made[0] == 6
    assert (stopped / "checkpoints" / "toy" / "latest").read_text() == f"step-{toy.MAX_STEPS}"


@pytest.mark.parametrize("damage", [_cut, _flip])
def test_a_damaged_result_of_a_finished_stage_is_said(toy, tmp_path, damage):
    toy.run(tmp_path, toy.ToyStage())
    folder = tmp_path / "checkpoints" / "toy"
    damage(folder / f"step-{toy.MAX_STEPS}" / "model.safetensors")
    with pytest.raises(InputError, match=rf"step-{toy.MAX_STEPS} is damaged \(model.safetensors is not as .*; delete"):
        toy.run(tmp_path, toy.ToyStage())
    _cut(folder / "finished.json")
    with pytest.raises(InputError, match=r"finished\.json is damaged .*; delete"):
        toy.run(tmp_path, toy.ToyStage())


@pytest.mark.parametrize("damage", [_cut, _flip, Path.unlink])
def test_what_forecasts_is_compared_with_its_digests(toy, tmp_path, damage):
    """Every file of a finished stage's model, whatever loads it afterwards."""
    toy.run(tmp_path, toy.ToyStage())
    checkpoint, _ = finished_stage(tmp_path, "toy")
    require_undamaged_model(checkpoint)
    damage(checkpoint / "model.safetensors")
    with pytest.raises(DamageError, match=r"is damaged \(model.safetensors is (not as|missing).*; delete"):
        finished_stage(tmp_path, "toy")


def test_a_damaged_best_checkpoint_is_no_result(toy, tmp_path):
    """The best is older than what is gone on from; one flipped bit would be another model."""
    stage = toy.ToyStage(monitor="error")
    stage.evaluations = [9, 1, 8, 8]

    def flip(step: int) -> None:
        if step == 20:
            _flip(tmp_path / "checkpoints" / "toy" / "step-8" / "model.safetensors")

    stage.on_step = flip
    with pytest.raises(InputError, match=r"step-8 is damaged \(model.safetensors is not as it was written\); delete"):
        toy.run(tmp_path, stage)
    assert not (tmp_path / "checkpoints" / "toy" / "finished.json").exists()


def test_no_pickle_is_ever_read(toy, tmp_path):
    """A pickle in place of the state runs no code, also where its checksum is made to fit: it is refused as damage."""
    stage, engine = _trained(toy, 1)
    checkpoints = StageCheckpoints(tmp_path / "toy")
    path = _save(checkpoints, stage, engine, 1)
    found = checkpoints.newest()
    assert found is not None

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    for name in (SHARD, "trainer_state/state.json"):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(InputError):
            checkpoints.newest()
        if name == SHARD:
            with pytest.raises(InputError, match="step-1 is damaged"):
                checkpoints.load(path, stage.engine(), found[1])
        (path / name).write_bytes(whole)
    assert _newest(checkpoints) == path
    assert not (tmp_path / "exploded").exists()
    assert not [p for p in path.rglob("*") if p.suffix in {".pt", ".pth", ".bin", ".pkl"}]


# --- small files ---------------------------------------------------------------------------------------------------


def test_finish_and_finished(tmp_path):
    checkpoints = StageCheckpoints(tmp_path)
    summary = {"before": {"mae": 2.0}, "after": {"mae": 1.0}, "steps": 7, "checkpoint": "step-7"}
    checkpoints.finish(summary)
    assert checkpoints.finished == summary
    assert [path.name for path in tmp_path.iterdir()] == ["finished.json"]


def test_write_atomically_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "latest"
    for text in ("step-1", "step-2"):
        write_atomically(path, text)
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_log_that_cannot_grow_keeps_its_lines(tmp_path, small_disk):
    log = RunLog(small_disk)
    log.rewind("toy", -1)
    log.write("toy", 1, {"loss": 1.0})
    with (small_disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    with pytest.raises(OSError, match="No space"):
        for step in range(2, 1000):
            log.write("toy", step, {"loss": 1.0})
    (small_disk / "filler").unlink()
    log.rewind("toy", 1)
    assert [line["step"] for line in _without_times(small_disk)] == [1]
