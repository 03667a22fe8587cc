"""What stops a training in one line: losses that are lost, memory and disks that are full, learners that are silent."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stdist.errors import DivergenceError, ResourceError, SilentLearner
from stdist.training.guards import check_losses, resource_errors
from stdist.training.process_group import ProcessGroup

SILENT = Path(__file__).with_name("silent_worker.py")


class _Two(ProcessGroup):
    """Learner 1 of 2, whose other learner answers ``batch 7``."""

    def __init__(self) -> None:
        super().__init__(1, 2)

    def all_gather_object(self, thing):
        return ["batch 7", thing]


# --- losses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([float("nan"), 1.0], "loss is nan at step 12, learner 0, on batch 7;"),
        ([1.0, float("inf")], "loss is inf at step 12, learner 1, on batch 8;"),
        ([1.0, -float("inf")], "loss is -inf at step 12, learner 1, on batch 8;"),
        ([1.0, 101.0], "loss exploded to 101 at step 12, learner 1, on batch 8;"),
        ([-100.5, 1.0], "loss exploded to -100.5 at step 12, learner 0, on batch 7;"),
    ],
)
def test_a_lost_loss_names_stage_step_learner_and_examples(losses, said):
    """On every learner, also those whose own loss is good."""
    with pytest.raises(DivergenceError) as caught:
        check_losses(losses, 100.0, "sft", 12, _Two(), lambda: "batch 8")
    message = str(caught.value)
    assert message.startswith(f"sft: {said}") and "\n" not in message
    assert "lower sft.learning_rate" in message and "not saved" in message


def test_good_losses_pass_and_nobody_looks_for_examples():
    def examples() -> str:
        raise AssertionError("examples are only looked up for a lost loss")

    check_losses([1.0, 100.0], 100.0, "sft", 1, _Two(), examples)
    check_losses([1e30], float("inf"), "sft", 1, ProcessGroup(), examples)


# --- memory, disk --------------------------------------------------------------------------------------------------


def _raised(error: BaseException, group: ProcessGroup = ProcessGroup()) -> ResourceError:
    with pytest.raises(ResourceError) as caught, resource_errors("grpo", "forward and backward", 7, group):
        raise error
    assert "\n" not in str(caught.value) and caught.value.__cause__ is error
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_says_stage_learner_step_and_phase(error):
    message = str(_raised(error, ProcessGroup(1, 2)))
    assert message.startswith("grpo: learner 1 at step 7, forward and backward: out of memory (")
    assert "lower grpo's batch or activation_memory" in message


def test_a_real_allocation_that_fails():
    with pytest.raises(ResourceError, match=r"alignment: learner 0 at step 1, update: out of memory \(.*allocate"):  # noqa: SIM117
        with resource_errors("alignment", "update", 1, ProcessGroup()):
            torch.empty(1 << 58)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk(number):
    message = str(_raised(OSError(number, os.strerror(number), "log.jsonl")))
    assert message.startswith("grpo: learner 0 at step 7, forward and backward: log.jsonl: ")
    assert message.endswith("; the same command goes on from the newest checkpoint")
    assert {errno.ENOSPC: "no space is left", errno.EDQUOT: "quota", errno.EFBIG: "ulimit -f"}[number] in message


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "no such file"), RuntimeError("shapes differ"), ValueError()])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, resource_errors("grpo", "update", 1, ProcessGroup(0, 2)):
        raise error
    assert caught.value is error


def test_the_innermost_phase_is_named_once():
    with pytest.raises(ResourceError) as caught, resource_errors("sft", "start", 0, ProcessGroup(0, 2)):  # noqa: SIM117
        with resource_errors("sft", "evaluation", 4, ProcessGroup(0, 2)):
            raise RuntimeError("Timed out waiting 5000ms for recv operation to complete")
    assert str(caught.value).startswith("sft: learner 0 at step 4, evaluation: another learner no longer answers")


def test_one_learner_alone_waits_for_nobody():
    with pytest.raises(RuntimeError) as caught, resource_errors("sft", "update", 1, ProcessGroup()):
        raise RuntimeError("Timed out")
    assert not isinstance(caught.value, ResourceError)
    assert isinstance(_raised(RuntimeError("Connection closed by peer"), ProcessGroup(0, 2)), SilentLearner)


# --- silent learners -----------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path) -> Iterator:
    learners: list[subprocess.Popen] = []

    def run(timeout: float, phase: str) -> list[subprocess.Popen]:
        for rank in (0, 1):
            command = [sys.executable, str(SILENT), str(rank), str(tmp_path), str(timeout), phase]
            learners.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        deadline = time.monotonic() + 300
        while not (tmp_path / "ready").exists():
            ended = [learner.communicate() for learner in learners if learner.poll() is not None]
            assert not ended and time.monotonic() < deadline, ended
            time.sleep(0.01)
        return learners

    yield run
    for learner in learners:
        learner.kill()
        learner.communicate()


@pytest.mark.parametrize(
    ("sent", "timeout", "phase", "where"),
    [
        (signal.SIGSTOP, 6.0, "step", "learner 0 at step 3, forward and backward"),
        (signal.SIGKILL, 500.0, "evaluation", "learner 0 at step 2, evaluation"),
    ],
    ids=["hangs", "dies"],
)
def test_a_learner_that_falls_silent_ends_the_others_in_one_line(start, sent, timeout, phase, where):
    """One that hangs is waited for until the group's time-out, one that died is known at once."""
    alive, silent = start(timeout, phase)
    os.kill(silent.pid, sent)
    output, errors = alive.communicate(timeout=300)
    assert alive.returncode == 5, errors
    line = output.strip().splitlines()[-1]
    assert line.startswith(f"SilentLearner: toy: {where}: another learner no longer answers (")
    assert line.endswith("run the same command to go on")
