"""The processes that train together: who this one is, and the few things that all of them must agree on."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from stdist.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """Learner ``rank`` of ``size``. Methods but ``local_slice`` and ``local_items`` are collectives of all learners."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "ProcessGroup":
        """The default process group of torch.distributed; one learner alone where there is none."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    @property
    def is_main(self) -> bool:
        """Whether this learner writes what is written once: logs, summaries, the model's files."""
        return self.rank == 0

    def local_slice(self, count: int, what: str) -> slice:
        """This learner's equal part of ``count`` things, so that means of parts are means of the whole.

        Raises InputError, naming ``what`` as the configuration does, where the learners cannot share evenly.
        """
        if count % self.size:
            raise InputError(
                f"{what} is {count}, which {self.size} learners cannot share evenly; "
                f"make it a multiple of {self.size}, or change learners.num_workers"
            )
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def local_items(self, things: Sequence[T]) -> Sequence[T]:
        """Every ``size``-th thing: each is some learner's, none is two learners'."""
        return things[self.rank :: self.size]

    def all_gather_object(self, thing: T) -> list[T]:
        """Each learner's ``thing``, in the order of their ranks."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def broadcast_object(self, thing: T) -> T:
        """What the first learner has."""
        things = [thing]
        if self.size > 1:
            dist.broadcast_object_list(things, src=0)
        return things[0]


def patience() -> timedelta:
    """How long the launcher's collectives wait for a silent learner; those of a group made later would wait for half an
    hour, unless they are told."""
    whole = dist.distributed_c10d._get_default_group()
    return whole._get_backend(whole._device_types[0]).options._timeout
