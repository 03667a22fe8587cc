"""The loop: exact resume, early stop, divergence, Ctrl-C and SIGKILL, and a log without holes or doubles."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stdist.errors import DivergenceError, Interrupted, MemoryFullError
from stdist.training.loop import LoopSettings


class _Killed(Exception):
    """Stands for whatever ends a process between two lines; nothing handles it."""


@pytest.fixture(scope="module")
def uninterrupted(toy, tmp_path_factory, log_lines) -> list[dict]:
    """The log of a run from beginning to end."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    toy.run(run_dir, toy.ToyStage())
    return log_lines(run_dir)


def _stop_at(step: int, error: BaseException) -> Callable[[int], None]:
    def on_step(number: int) -> None:
        if number == step:
            raise error

    return on_step


def test_the_log_has_every_step_and_evaluation_once(toy, uninterrupted):
    steps = [line["step"] for line in uninterrupted if "event" not in line]
    evaluations = [line["step"] for line in uninterrupted if line.get("event") == "evaluation"]
    assert steps == list(range(1, toy.MAX_STEPS + 1)) and evaluations == [0, 8, 16, 24]
    scalars = {"stage", "step", "loss", "learning_rate", "grad_norm"}
    assert all(set(line) == scalars for line in uninterrupted if "event" not in line)
    assert uninterrupted[-2]["loss"] < 0.5 * uninterrupted[1]["loss"]  # it learns, so a wrong resume would show


@pytest.mark.parametrize("step", [1, 4, 8, 11, 23])
def test_a_resumed_run_repeats_the_uninterrupted_one(toy, tmp_path, log_lines, uninterrupted, step):
    """Stopped before any save (1), between saves (4, 11), while one is being written (8), and in the last step."""
    with pytest.raises(_Killed):
        toy.run(tmp_path, toy.ToyStage(on_step=_stop_at(step, _Killed())))
    made: list[int] = []
    summary = toy.run(tmp_path, toy.ToyStage(on_step=made.append))
    assert made[0] == max((step - 1) // 3 * 3, (step - 1) // 8 * 8)  # a save counts once the step behind it is made
    assert log_lines(tmp_path) == uninterrupted
    assert summary["before"] == uninterrupted[0]["metrics"] and summary["after"] == uninterrupted[-1]["metrics"]
    assert summary["steps"] == toy.MAX_STEPS and summary["checkpoint"] == f"step-{toy.MAX_STEPS}"


def test_a_run_stopped_many_times_is_still_the_same(toy, tmp_path, log_lines, uninterrupted):
    for step in (0, 2, 2, 5, 9, 17):
        with pytest.raises(_Killed):
            toy.run(tmp_path, toy.ToyStage(on_step=_stop_at(step, _Killed())))
    toy.run(tmp_path, toy.ToyStage())
    assert log_lines(tmp_path) == uninterrupted


def test_a_finished_stage_is_only_loaded(toy, tmp_path):
    trained = toy.ToyStage()
    summary = toy.run(tmp_path, trained)
    log = (tmp_path / "log.jsonl").read_text()
    loaded = toy.ToyStage(on_step=_stop_at(0, AssertionError("made a step")))
    assert toy.run(tmp_path, loaded) == summary
    assert torch.equal(loaded.model.weight, trained.model.weight)
    assert (tmp_path / "log.jsonl").read_text() == log


def test_logging_steps_thins_the_log_but_keeps_the_last_step(toy, tmp_path, log_lines):
    toy.run(tmp_path, toy.ToyStage(), replace(toy.SETTINGS, max_steps=7, logging_steps=3))
    assert [line["step"] for line in log_lines(tmp_path) if "event" not in line] == [3, 6, 7]


def test_two_checkpoints_are_kept(toy, tmp_path):
    """The newest, and the one before, which serves where the newest is damaged."""
    toy.run(tmp_path, toy.ToyStage(), replace(toy.SETTINGS, max_steps=9, save_steps=1))
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "toy").glob("step-*")) == ["step-8", "step-9"]


# --- the hook on weights -------------------------------------------------------------------------------------------


class _Hooked:
    """Records each call of the hook with the weights that it saw."""

    def __init__(self, stage) -> None:
        self.calls: list[tuple[int, torch.Tensor]] = []
        stage.on_weights_changed = lambda step: self.calls.append((step, stage.model.weight.detach().clone()))


def test_the_stage_is_told_of_its_weights_before_the_first_step_and_after_every_update(toy, tmp_path):
    order: list[str] = []
    stage = toy.ToyStage(on_step=lambda number: order.append(f"step number {number}"))
    evaluate = stage.evaluate
    stage.evaluate = lambda: (order.append("evaluate"), evaluate())[1]
    stage.on_weights_changed = lambda step: order.append(f"weights {step}")
    toy.run(tmp_path, stage, replace(toy.SETTINGS, max_steps=2, eval_steps=2))
    assert order == ["weights 0", "evaluate", "step number 0", "weights 1", "step number 1", "weights 2", "evaluate"]


def test_a_resumed_stage_is_told_of_the_weights_that_it_goes_on_from(toy, tmp_path):
    """The same weights at every step as in the run that was not stopped; no weights before the saved ones are seen."""
    whole = toy.ToyStage()
    uninterrupted = _Hooked(whole)
    toy.run(tmp_path / "whole", whole)
    with pytest.raises(_Killed):
        toy.run(tmp_path / "killed", toy.ToyStage(on_step=_stop_at(11, _Killed())))
    stage = toy.ToyStage()
    resumed = _Hooked(stage)
    toy.run(tmp_path / "killed", stage)
    assert [step for step, _ in uninterrupted.calls] == list(range(25))
    assert [step for step, _ in resumed.calls] == list(range(9, 25))
    for step, weights in resumed.calls:
        assert torch.equal(weights, uninterrupted.calls[step][1])


# --- the best checkpoint, patience ---------------------------------------------------------------------------------

EVERY_STEP = LoopSettings(max_steps=20, logging_steps=1, save_steps=100, eval_steps=1, patience=3)


def _monitored(toy, evaluations: Sequence[float], on_step: Callable[[int], None] = lambda step: None):
    stage = toy.ToyStage(monitor="error", on_step=on_step)
    stage.evaluations = list(evaluations)
    return stage


def test_patience_stops_the_stage_and_the_best_is_restored(toy, tmp_path):
    """Errors 9, 7, 5, then three evaluations without a new best (5 again is none): stopped at step 5, result step 2."""
    weights: dict[int, torch.Tensor] = {}
    stage = _monitored(toy, [9, 7, 5, 6, 5, 8, 1, 1])
    stage.on_step = lambda step: weights.update({step: stage.model.weight.detach().clone()})
    summary = toy.run(tmp_path, stage, EVERY_STEP)
    assert summary["steps"] == 5 and summary["checkpoint"] == "step-2"
    assert summary["before"] == {"error": 9} and summary["after"] == {"error": 5}
    assert torch.equal(stage.model.weight, weights[2])  # step number 2 begins with the weights after two steps
    folder = tmp_path / "checkpoints" / "toy"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-2", "step-4", "step-5"]


def test_an_evaluation_that_falls_resets_patience(toy, tmp_path):
    summary = toy.run(tmp_path, _monitored(toy, [9, 9, 9, 8, 9, 9, 7, 9, 9, 9, 0]), EVERY_STEP)
    assert summary["steps"] == 9 and summary["checkpoint"] == "step-6"


def test_without_patience_a_stage_runs_to_its_end(toy, tmp_path):
    settings = replace(EVERY_STEP, max_steps=6, patience=None)
    summary = toy.run(tmp_path, _monitored(toy, [3, 4, 4, 4, 4, 4, 4]), settings)
    assert summary["steps"] == 6 and summary["checkpoint"] == "step-0"


@pytest.mark.parametrize("step", [0, 1, 3, 4])
def test_patience_counts_on_over_a_resume(toy, tmp_path, step):
    """Stopped in any step, patience 3 runs out at step 5 as if nothing had happened: not sooner, not later."""
    errors = [9, 7, 5, 6, 5, 8, 1, 1]
    with pytest.raises(_Killed):
        toy.run(tmp_path, _monitored(toy, errors, _stop_at(step, _Killed())), EVERY_STEP)
    summary = toy.run(tmp_path, _monitored(toy, errors[step:]), EVERY_STEP)
    assert summary["steps"] == 5 and summary["checkpoint"] == "step-2" and summary["after"] == {"error": 5}


def test_a_stage_stopped_by_patience_stays_stopped(toy, tmp_path, monkeypatch):
    """Killed after its last save but before its summary: the resumed stage makes no step more."""
    from stdist.training import loop

    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(loop.StageCheckpoints, "finish", lambda *_: (_ for _ in ()).throw(_Killed()))
        toy.run(tmp_path, _monitored(toy, [9, 7, 5, 6, 5, 8, 1, 1]), EVERY_STEP)
    summary = toy.run(tmp_path, _monitored(toy, [1], _stop_at(5, AssertionError("made a step"))), EVERY_STEP)
    assert summary["steps"] == 5 and summary["checkpoint"] == "step-2"


def test_the_best_checkpoint_survives_pruning_and_a_resume(toy, tmp_path):
    settings = replace(EVERY_STEP, max_steps=9, patience=None, save_steps=1)
    errors = [9, 2, 8, 8, 8, 8, 8, 8, 8, 8]
    with pytest.raises(_Killed):
        toy.run(tmp_path, _monitored(toy, errors, _stop_at(6, _Killed())), settings)
    summary = toy.run(tmp_path, _monitored(toy, errors[6:]), settings)
    assert summary["checkpoint"] == "step-1" and summary["after"] == {"error": 2}


# --- divergence ----------------------------------------------------------------------------------------------------


def _stage_of_losses(toy, losses: Callable[[int], float]):
    """A stage whose loss in step number n, from 0, is said to be ``losses(n)``."""
    stage = toy.ToyStage()
    step = stage.step
    stage.step = lambda number, backward: step(number, backward) | {"loss": losses(number)}
    return stage


@pytest.mark.parametrize(
    ("first", "within", "lost"),
    [(1.0, 99.0, 101.0), (0.01, 99.0, 101.0), (3.0, 299.0, 301.0), (-3.0, -299.0, -301.0)],
    ids=["of 1", "of less counts as of 1", "of 3", "negative"],
)
def test_an_exploding_loss_stops_the_run(toy, tmp_path, first, within, lost):
    """A hundred times the mean size of the first ten losses, but at least 100."""
    stage = _stage_of_losses(toy, lambda number: {10: within, 11: lost}.get(number, first))
    with pytest.raises(DivergenceError, match=rf"toy: loss exploded to {lost:g} at step 12, learner 0, on batch 11;"):
        toy.run(tmp_path, stage)


def test_the_first_ten_losses_may_be_any_and_only_they_count(toy, tmp_path):
    """Nine of 1 and one of 991 have mean 100: the ceiling is 10,000, and the 5,000 of step 11 does not raise it."""
    losses = {9: 991.0, 10: 5_000.0, 11: 9_999.0, 12: 10_001.0}
    with pytest.raises(DivergenceError, match=r"loss exploded to 1e\+04 at step 13,"):
        toy.run(tmp_path, _stage_of_losses(toy, lambda number: losses.get(number, 1.0)))


def test_a_resumed_run_remembers_what_its_losses_were(toy, tmp_path):
    stage = toy.ToyStage(on_step=_stop_at(14, _Killed()))
    with pytest.raises(_Killed):
        toy.run(tmp_path, stage)
    other = toy.ToyStage()
    step_of = other.step
    other.step = lambda number, backward: step_of(number, backward) | {"loss": 1e5}
    with pytest.raises(DivergenceError, match=r"loss exploded to 1e\+05 at step 13"):
        toy.run(tmp_path, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_names_stage_and_step(toy, tmp_path, value):
    """The weights of the last good checkpoint stay the latest."""
    stage = toy.ToyStage()

    def break_weights(step: int) -> None:
        if step == 4:
            with torch.no_grad():
                stage.model.bias.fill_(value)

    stage.on_step = break_weights
    with pytest.raises(DivergenceError, match=r"toy: loss is (nan|inf) at step 5, learner 0, on batch 4;"):
        toy.run(tmp_path, stage)
    assert (tmp_path / "checkpoints" / "toy" / "latest").read_text() == "step-3"


def test_a_gradient_that_is_no_number_stops_before_it_is_saved(toy, tmp_path):
    """A finite loss may have an infinite gradient, which clipping turns into weights that are no numbers: the run
    stops in that step, not after the next checkpoint."""
    stage = toy.ToyStage()
    step_of = stage.step

    def step(number: int, backward: Callable[[torch.Tensor], None]) -> dict[str, float]:
        scalars = step_of(number, backward)
        if number == 5:  # whose end is a save
            backward(torch.sqrt(stage.model.weight - stage.model.weight.detach()).sum())
        return scalars

    stage.step = step
    with pytest.raises(DivergenceError, match=r"toy: gradient norm is (nan|inf) at step 6, learner 0 on batch 5;"):
        toy.run(tmp_path, stage)
    assert (tmp_path / "checkpoints" / "toy" / "latest").read_text() == "step-3"


def test_a_checkpoint_that_is_being_written_survives_a_divergence(toy, tmp_path):
    """The weights before the loss was lost are good: their checkpoint is waited for."""
    stage = toy.ToyStage()
    step_of = stage.step
    stage.step = lambda number, backward: step_of(number, backward) | ({"loss": math.nan} if number == 3 else {})
    with pytest.raises(DivergenceError):
        toy.run(tmp_path, stage)
    assert (tmp_path / "checkpoints" / "toy" / "latest").read_text() == "step-3"


# --- signals -------------------------------------------------------------------------------------------------------


def _start(toy, run_dir: Path, hang_at: int) -> subprocess.Popen:
    """The toy run as a process, hanging inside step number ``hang_at`` when this returns."""
    run_dir.mkdir()
    command = [sys.executable, toy.__file__, str(run_dir), str(hang_at)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not (run_dir / "hanging").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    return process


def test_ctrl_c_finishes_the_step_saves_and_resumes(toy, tmp_path, log_lines, uninterrupted):
    """SIGINT inside step 11 (number 10): that step is finished, saved and logged, though no save was due."""
    run_dir = tmp_path / "run"
    process = _start(toy, run_dir, hang_at=10)
    process.send_signal(signal.SIGINT)
    (run_dir / "go_on").touch()
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0 and "Interrupted: toy: stopped at step 11 and saved" in errors
    assert (run_dir / "checkpoints" / "toy" / "latest").read_text() == "step-11"
    assert log_lines(run_dir)[-1]["step"] == 11
    made: list[int] = []
    toy.run(run_dir, toy.ToyStage(on_step=made.append))
    assert made[0] == 11 and log_lines(run_dir) == uninterrupted


def test_ctrl_c_waits_for_a_step_that_can_be_resumed(toy, tmp_path, log_lines, uninterrupted):
    """A stage whose steps hang together by fours is saved behind step 12, pressed in step 10; nor earlier."""
    stage = toy.ToyStage(on_step=lambda step: signal.raise_signal(signal.SIGINT) if step == 9 else None)
    stage.resumable_every = 4
    settings = replace(toy.SETTINGS, save_steps=24)
    with pytest.raises(Interrupted, match="stopped at step 12"):
        toy.run(tmp_path / "run", stage, settings)
    assert {p.name for p in (tmp_path / "run" / "checkpoints" / "toy").glob("step-*")} == {"step-8", "step-12"}
    toy.run(tmp_path / "run", toy.ToyStage(), settings)
    assert log_lines(tmp_path / "run") == uninterrupted


def test_a_second_ctrl_c_does_not_wait(toy, tmp_path):
    """A step that hangs can be left: the second SIGINT is Python's own."""
    process = _start(toy, tmp_path / "run", hang_at=10)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors


def test_killed_and_resumed_the_log_has_no_hole_and_no_double(toy, tmp_path, log_lines, uninterrupted):
    """SIGKILL inside step number 11: steps 10 and 11 are logged but not saved, and a line may be half written."""
    run_dir = tmp_path / "run"
    process = _start(toy, run_dir, hang_at=11)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    log = run_dir / "log.jsonl"
    assert [line["step"] for line in log_lines(run_dir)][-3:] == [9, 10, 11]
    with log.open("a") as file:
        file.write('{"stage": "toy", "step": 12, "lo')
    made: list[int] = []
    toy.run(run_dir, toy.ToyStage(on_step=made.append))
    assert made == list(range(9, toy.MAX_STEPS))
    assert log_lines(run_dir) == uninterrupted


def test_rewinding_one_stage_leaves_the_others_alone(toy, tmp_path):
    others = [{"stage": "before", "step": step, "loss": 1.0} for step in (1, 99)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in others))
    toy.run(tmp_path, toy.ToyStage(), replace(toy.SETTINGS, max_steps=1))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[:2] == others and {line["stage"] for line in lines[2:]} == {"toy"}


def test_tensorboard_shows_each_step_once_after_a_resume(toy, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(_Killed):
        toy.run(tmp_path, toy.ToyStage(on_step=_stop_at(11, _Killed())))
    toy.run(tmp_path, toy.ToyStage())
    events = EventAccumulator(str(tmp_path / "tensorboard" / "toy")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, toy.MAX_STEPS + 1))


# --- memory --------------------------------------------------------------------------------------------------------

NO_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 8 bytes")


def _full(toy, failures: int, can_halve: bool = True):
    """A stage whose memory ends in step 5, ``failures`` times, when part of the gradient is there."""

    class Full(toy.ToyStage):
        failed = halved = 0

        def step(self, step, backward):
            if step == 5 and self.failed < failures:
                self.failed += 1
                backward(self.model.weight.sum())
                raise NO_MEMORY
            return super().step(step, backward)

        def halve_memory(self):
            self.halved += 1
            return can_halve

    return Full()


def test_a_step_without_memory_is_made_again_with_half_the_activations(toy, tmp_path, log_lines, uninterrupted):
    """The same draws, and nothing left of the gradient that was begun: the log is that of a run with room enough."""
    lines: list[str] = []
    stage = _full(toy, failures=1)
    toy.run(tmp_path, stage, log=lines.append)
    assert stage.halved == 1 and log_lines(tmp_path) == uninterrupted
    (said,) = (line for line in lines if "out of memory" in line)
    assert said.startswith("toy: learner 0 at step 6, forward and backward: out of memory")
    assert said.endswith("making step 6 again with half the activations at once")


@pytest.mark.parametrize(("failures", "can_halve"), [(2, True), (1, False)], ids=["a second time", "no smaller"])
def test_memory_that_ends_again_ends_the_run_with_the_plans_advice(toy, tmp_path, failures, can_halve):
    stage = _full(toy, failures, can_halve)
    trainer = toy.PromptTrainer(tmp_path, advice=lambda name: f"try {name}.optim=adamw_8bit")
    with pytest.raises(MemoryFullError, match=r"step 6, .* out of memory .*; try toy\.optim=adamw_8bit$") as caught:
        trainer.fit(stage, stage, stage.engine, toy.SETTINGS)
    trainer.close()
    assert stage.halved == 1 and "\n" not in str(caught.value)
