"""A check, by ``stdist plan``, that a run fits the device that is about to train it, before anything is loaded."""

import time
from collections.abc import Callable
from contextlib import suppress

import torch

from stdist.errors import InputError
from stdist.runs.devices import Device
from stdist.runs.plan import RunPlan

Plan = Callable[[Device], RunPlan]


def this_device() -> Device | None:
    """This process's GPU; None on a CPU, whose memory others use too."""
    if not torch.cuda.is_available():
        return None
    return Device(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def require_fit(plan: Plan, device: Device | None, force: bool, log: Callable[[str], None]) -> None:
    """Raises InputError, with what to change, where a stage takes more than all of the ``device``'s memory; with
    ``force`` that is a line of the log. Nothing is planned where the device is None."""
    if device is None or device.memory is None:
        return
    began = time.monotonic()
    planned = plan(device)
    pairs = zip(planned.stages, planned.verdicts, strict=True)
    too_large = [line for stage, line in pairs if stage.device_bytes > device.memory]
    seconds = f"planned in {time.monotonic() - began:.0f} s"
    if not too_large:
        log(f"every stage fits this device on paper ({seconds})")
    elif force:
        log(f"{'; '.join(too_large)} ({seconds}); going on, as --force says")
    else:
        raise InputError(f"{'; '.join(too_large)}; --force trains all the same")


def advice(plan: Plan, stage: str) -> str:
    """Returns what the plan would change of ``stage``, for which memory was not enough, to take a tenth less."""
    # A plan that cannot be made must not take the place of the error that it was asked for.
    with suppress(InputError, RuntimeError, MemoryError, StopIteration):
        takes = next(each.device_bytes for each in plan(Device()).stages if each.stage == stage)
        planned = plan(Device(int(0.9 * takes)))
        return next(line for line in planned.verdicts if line.startswith(f"{stage}: "))
    return ""
