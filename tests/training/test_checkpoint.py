"""Checkpoints: whole or absent, also under SIGKILL, pruned, exact, free of pickle, and clear where damaged."""

import json
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stdist.errors import InputError
from stdist.files import write_atomically
from stdist.training import checkpoint as checkpoint_module
from stdist.training.checkpoint import StageCheckpoints


def _save(checkpoints: StageCheckpoints, stage, step: int, **values: float) -> None:
    checkpoints.save(step, stage.write, stage.engine(), values)


def _trained(toy, steps: int):
    stage = toy.ToyStage()
    engine = stage.engine()
    for step in range(steps):
        stage.step(step, engine.backward)
        engine.step()
    return stage, engine


def test_save_and_load_restore_engine_loop_and_random_state(toy, tmp_path):
    stage, engine = _trained(toy, 3)
    checkpoints = StageCheckpoints(tmp_path / "toy")
    torch.manual_seed(11)
    checkpoints.save(3, stage.write, engine, {"best": float("inf"), "stale": 2})
    expected = torch.rand(4)

    other = toy.ToyStage()
    restored = other.engine()
    torch.manual_seed(99)
    assert checkpoints.latest == tmp_path / "toy" / "step-3"
    state = checkpoints.load(checkpoints.at(3), restored)
    assert state["step"] == 3 and state["loop"] == {"best": float("inf"), "stale": 2}
    assert torch.equal(torch.rand(4), expected)
    for name, value in engine.state()[0].items():
        assert torch.equal(restored.state()[0][name], value), name
    assert restored.learning_rate == engine.learning_rate


def test_no_checkpoint_yet(tmp_path):
    checkpoints = StageCheckpoints(tmp_path / "toy")
    assert checkpoints.latest is None and checkpoints.finished is None


def test_a_failing_writer_leaves_the_last_checkpoint_in_place(toy, tmp_path):
    stage, engine = _trained(toy, 1)
    checkpoints = StageCheckpoints(tmp_path / "toy")
    checkpoints.save(1, stage.write, engine, {})

    def full_disk(path: Path) -> None:
        (path / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoints.save(2, full_disk, engine, {})
    assert not checkpoints.at(2).exists() and checkpoints.latest == checkpoints.at(1)
    checkpoints.save(2, stage.write, engine, {})  # what it left does not stand in the way
    assert checkpoints.latest == checkpoints.at(2)


KILLS = {
    "in the model's file": "write",
    "before the folder has its name": "rename",
    "between the folder's name and latest": "latest",
}


@pytest.mark.parametrize("where", KILLS.values(), ids=KILLS.keys())
def test_killed_in_the_middle_of_a_save(toy, tmp_path, monkeypatch, where):
    """SIGKILL at the worst moments: ``latest`` names a whole checkpoint that loads, and saving goes on."""
    stage, engine = _trained(toy, 2)
    checkpoints = StageCheckpoints(tmp_path / "toy")
    checkpoints.save(2, stage.write, engine, {})
    hanging, replace = tmp_path / "hanging", os.replace

    def hang() -> None:
        hanging.touch()
        time.sleep(600)

    def write_half(path: Path) -> None:
        stage.write(path)
        if where == "write":
            whole = path / "model.safetensors"
            whole.write_bytes(whole.read_bytes()[:20])
            hang()

    def replace_but(source: Path, target: Path) -> None:
        if (target.name == "latest") if where == "latest" else (target.name == "step-4"):
            hang()
        replace(source, target)

    def child() -> None:
        monkeypatch.setattr(checkpoint_module.os, "replace", replace_but)
        checkpoints.save(4, write_half, engine, {})

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    _wait_for(hanging.exists)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL

    assert checkpoints.latest == checkpoints.at(2)
    fresh = toy.ToyStage()
    fresh.read(checkpoints.latest)
    assert checkpoints.load(checkpoints.latest, fresh.engine())["step"] == 2
    checkpoints.save(4, stage.write, engine, {})
    assert checkpoints.latest == checkpoints.at(4)
    checkpoints.prune({4})
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["latest", "step-4"]


def _wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def test_prune_keeps_only_the_steps_it_is_told(toy, tmp_path):
    checkpoints = StageCheckpoints(tmp_path / "toy")
    for step in (0, 5, 10, 50):
        _save(checkpoints, toy.ToyStage(), step)
    (checkpoints.folder / "step-60.partial").mkdir()  # of a killed save
    checkpoints.prune({5, 50})
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["latest", "step-5", "step-50"]
    assert checkpoints.latest == checkpoints.at(50)


def test_finish_and_finished(tmp_path):
    checkpoints = StageCheckpoints(tmp_path)
    checkpoints.finish({"steps": 7, "checkpoint": "step-7"})
    assert checkpoints.finished == {"steps": 7, "checkpoint": "step-7"}
    assert [path.name for path in tmp_path.iterdir()] == ["finished.json"]


def test_write_atomically_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "latest"
    for text in ("step-1", "step-2"):
        write_atomically(path, text)
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_no_pickle_is_ever_read(toy, tmp_path):
    """A pickle in place of the state runs no code: it is refused as damage."""
    checkpoints = StageCheckpoints(tmp_path / "toy")
    _save(checkpoints, toy.ToyStage(), 1)

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    for name in ("state.safetensors", "state.json"):
        path = checkpoints.at(1) / "trainer_state" / name
        whole = path.read_bytes()
        path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(InputError):
            checkpoints.load(checkpoints.at(1), toy.ToyStage().engine())
        path.write_bytes(whole)
    assert not (tmp_path / "exploded").exists()
    assert not [p for p in checkpoints.at(1).rglob("*") if p.suffix in {".pt", ".pth", ".bin", ".pkl"}]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "optimizer cut short": ("trainer_state/state.safetensors", _cut),
    "optimizer missing": ("trainer_state/state.safetensors", Path.unlink),
    "state cut short": ("trainer_state/state.json", _cut),
    "state of something else": ("trainer_state/state.json", lambda path: path.write_text("{}")),
    "state missing": ("trainer_state/state.json", Path.unlink),
    "model cut short": ("model.safetensors", _cut),
    "model missing": ("model.safetensors", Path.unlink),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_stops_the_run_with_one_line(toy, tmp_path, name, damage):
    """The line says which checkpoint and what to do; the run's log stays as it was."""
    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path, toy.ToyStage(on_step=_interrupt_at(7)))
    checkpoint = tmp_path / "checkpoints" / "toy" / "step-6"
    log = (tmp_path / "log.jsonl").read_text()
    damage(checkpoint / name)
    with pytest.raises(InputError) as caught:
        toy.run(tmp_path, toy.ToyStage())
    message = str(caught.value)
    assert "\n" not in message and "step-6" in message and "damaged" in message and "delete" in message
    assert (tmp_path / "log.jsonl").read_text() == log


def _interrupt_at(step: int) -> Callable[[int], None]:
    def on_step(number: int) -> None:
        if number == step:
            raise KeyboardInterrupt

    return on_step


def test_a_damaged_result_of_a_finished_stage_is_said(toy, tmp_path):
    toy.run(tmp_path, toy.ToyStage())
    folder = tmp_path / "checkpoints" / "toy"
    _cut(folder / f"step-{toy.MAX_STEPS}" / "model.safetensors")
    with pytest.raises(InputError, match=f"step-{toy.MAX_STEPS}.*damaged"):
        toy.run(tmp_path, toy.ToyStage())
    _cut(folder / "finished.json")
    with pytest.raises(InputError, match=r"finished\.json"):
        toy.run(tmp_path, toy.ToyStage())


def test_the_state_is_plain_json_and_safetensors(toy, tmp_path):
    stage, engine = _trained(toy, 2)
    checkpoints = StageCheckpoints(tmp_path / "toy")
    checkpoints.save(2, stage.write, engine, {"stale": 0})
    files = sorted(str(path.relative_to(checkpoints.at(2))) for path in checkpoints.at(2).rglob("*") if path.is_file())
    assert files == ["model.safetensors", "trainer_state/state.json", "trainer_state/state.safetensors"]
    state = json.loads((checkpoints.at(2) / "trainer_state" / "state.json").read_text())
    assert state == {"step": 2, "engine": {"steps": 2}, "loop": {"stale": 0}}
