"""The learners, processes that train together: which one this is, and the few things that all must agree on."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from stdist.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """All learners, seen by the one of index ``rank``. The ``*_object`` methods are collectives."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "ProcessGroup":
        """The default process group of torch.distributed; one learner alone where there is none."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    @property
    def is_main(self) -> bool:
        """True on the learner that writes what is written once: logs, summaries, the model's files."""
        return self.rank == 0

    def local_slice(self, count: int, key: str) -> slice:
        """This learner's equal part of ``count`` items, so that a mean of the parts' means is the mean of all.

        Raises InputError, naming the configuration's ``key``, where the learners cannot share evenly.
        """
        if count % self.size:
            raise InputError(
                f"{key} is {count}, which {self.size} learners cannot share evenly; "
                f"make it a multiple of {self.size}, or change learners.num_workers"
            )
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def local_items(self, items: Sequence[T]) -> Sequence[T]:
        """Every ``size``-th item: all are some learner's, none is two learners'."""
        return items[self.rank :: self.size]

    def all_gather_object(self, item: T) -> list[T]:
        """Returns every learner's ``item``, in the order of their ranks."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def broadcast_object(self, item: T) -> T:
        """Returns the main learner's ``item``."""
        items = [item]
        if self.size > 1:
            dist.broadcast_object_list(items, src=0)
        return items[0]


def collective_backend(on_gpu: bool) -> str:
    """Returns what a group is made with: NCCL for tensors on GPUs, gloo for those on the CPU, objects among them."""
    return "cpu:gloo,cuda:nccl" if on_gpu else "gloo"


def collective_timeout() -> timedelta:
    """The time that the launcher's collectives wait for a silent learner. A group made later waits for half an hour
    unless it is told."""
    default = dist.distributed_c10d._get_default_group()
    return default._get_backend(default._device_types[0]).options._timeout
