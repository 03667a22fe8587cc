"""Ends a training in one clear line: a loss that is lost, memory that is full, a learner that is silent."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from stdist.errors import DivergenceError, MemoryFullError, ResourceError, SilentLearner, of_the_system
from stdist.training.process_group import ProcessGroup

FIRST_STEPS = 10
EXPLOSION = 100.0
"""A loss this many times what it was on average in the first steps (at least 1) is lost."""


def check_losses(
    losses: list[float], ceiling: float, stage: str, step: int, group: ProcessGroup, describe_batch: Callable[[], str]
) -> None:
    """Raises DivergenceError, on every learner, where a learner's loss is not finite or above ``ceiling``.

    Args:
        losses: one a learner.
        step: counts from 1. describe_batch: names this learner's share of the batch, for the message.
    """
    rank = next((i for i, loss in enumerate(losses) if not math.isfinite(loss) or abs(loss) > ceiling), None)
    if rank is None:
        return
    batch = group.all_gather_object(describe_batch())[rank]
    problem = f"exploded to {losses[rank]:.4g}" if math.isfinite(losses[rank]) else f"is {losses[rank]}"
    raise DivergenceError(
        f"{stage}: loss {problem} at step {step}, learner {rank}, on {batch}; its weights were not saved, "
        f"lower {stage}.learning_rate and train under another name="
    )


def check_gradient(norm: float, stage: str, step: int, group: ProcessGroup, describe_batch: Callable[[], str]) -> None:
    """Raises DivergenceError where the norm of this learner's gradient is not finite; see :func:`check_losses`."""
    if not math.isfinite(norm):
        raise DivergenceError(
            f"{stage}: gradient norm is {norm} at step {step}, learner {group.rank} on {describe_batch()}; its weights "
            f"were not saved, lower {stage}.learning_rate and train under another name="
        )


@contextmanager
def resource_errors(stage: str, phase: str, step: int, group: ProcessGroup) -> Iterator[None]:
    """Inside, out-of-memory, a full disk and a collective that timed out become one ResourceError each, with phase and
    sizes. May be nested: the innermost phase is named."""
    try:
        yield
    except ResourceError:
        raise
    except (MemoryError, OSError, RuntimeError) as error:
        where = f"{stage}: learner {group.rank} at step {step}, {phase}"
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
            raise MemoryFullError(
                f"{where}: out of memory ({text or 'no details'}{_in_use()}); "
                f"lower {stage}'s batch or activation_memory, or shard more (learners.zero_stage)"
            ) from error
        if group.size > 1 and any(sign in text for sign in ("imed out", "Connection closed", "Connection reset")):
            raise SilentLearner(
                f"{where}: another learner no longer answers ({text[:200]}); run the same command to go on"
            ) from error
        if isinstance(said := of_the_system(error), ResourceError):
            raise ResourceError(f"{where}: {said}; the same command goes on from the newest checkpoint") from error
        raise


def _in_use() -> str:
    if not torch.cuda.is_available():
        return ""
    allocated, free, total = (size / 2**30 for size in (torch.cuda.memory_allocated(), *torch.cuda.mem_get_info()))
    return f"; {allocated:.1f} GiB held here, {free:.1f} of {total:.1f} free"
