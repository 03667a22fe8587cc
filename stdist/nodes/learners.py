"""Learners in a grid: along ``nodes`` they hold different nodes of the same windows, along ``data`` the same nodes of
different windows. Learner r is number r mod R along the R of ``nodes`` and r div R along ``data``.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stdist.errors import InputError
from stdist.training.process_group import ProcessGroup, collective_timeout


def nodes_of(rank: int, ranks: int, nodes: int) -> slice:
    """Returns the nodes that a rank along ``nodes`` holds: in order, as many as the others or one less."""
    return slice(nodes * rank // ranks, nodes * (rank + 1) // ranks)


def check_grid(num_workers: int, node_ranks: int, nodes: int, zero_stage: int, block_nodes: int | None = None) -> None:
    """Raises InputError where so many learners cannot share the nodes and windows of a training."""
    if num_workers % node_ranks:
        raise InputError(
            f"learners.num_workers {num_workers} is no multiple of nodes.ranks {node_ranks}; change one of the two"
        )
    if nodes < node_ranks:
        raise InputError(f"{nodes} nodes cannot be shared by nodes.ranks {node_ranks}; use at most {nodes}")
    splits = "nodes.ranks" if node_ranks > 1 else "nodes.block_nodes" if block_nodes else None
    if zero_stage == 3 and splits:
        # Blocks read weights outside of every module's call, where ZeRO-3 has none; and DeepSpeedEngine takes ZeRO-3's
        # parts to be of all learners.
        raise InputError(f"learners.zero_stage 3 does not go with {splits}; set it to 1 or 2")


ALONE = ProcessGroup()


@dataclass(frozen=True)
class NodeLearners:
    """This learner's place. Every method but ``share`` and ``of_nodes`` is a collective, and nothing where there is
    one learner alone, which needs no torch.distributed.

    nodes: of the whole city. group: all learners.
    """

    nodes: int
    node_ranks: int = 1
    group: ProcessGroup = ALONE
    along_data: dist.ProcessGroup | None = None
    along_nodes: dist.ProcessGroup | None = None

    @classmethod
    def current(cls, nodes: int, node_ranks: int = 1) -> "NodeLearners":
        """The learners of torch.distributed's default group, ``node_ranks`` of them along ``nodes``, of which there is
        a multiple (:func:`check_grid`)."""
        group = ProcessGroup.current()
        if group.size == 1:
            return cls(nodes)
        grid = torch.arange(group.size).view(-1, node_ranks)
        waits = collective_timeout()
        # Of all groups at once, in the same order everywhere.
        along_nodes, _ = dist.new_subgroups_by_enumeration(grid.tolist(), timeout=waits)
        along_data, _ = dist.new_subgroups_by_enumeration(grid.T.tolist(), timeout=waits)
        return cls(nodes, node_ranks, group, along_data, along_nodes)

    def of_nodes(self, nodes: int) -> "NodeLearners":
        """The same learners for a city of ``nodes`` nodes."""
        return replace(self, nodes=nodes)

    @property
    def data_ranks(self) -> int:
        return self.group.size // self.node_ranks

    @property
    def data_rank(self) -> int:
        return self.group.rank // self.node_ranks

    @property
    def node_rank(self) -> int:
        return self.group.rank % self.node_ranks

    @property
    def node_slice(self) -> slice:
        """The nodes that this learner holds."""
        return nodes_of(self.node_rank, self.node_ranks, self.nodes)

    def share(self, batch_size: int) -> int:
        """Returns this learner's part of ``batch_size`` windows. Raises InputError where they cannot be shared
        evenly."""
        mine = ProcessGroup(self.data_rank, self.data_ranks).local_slice(batch_size, "training.train_batch_size")
        return mine.stop - mine.start

    def total(self, count: Tensor) -> Tensor:
        """A number summed over all learners, without gradient: the points that the mean error is over."""
        count = count.detach().clone()
        if self.group.size > 1:
            dist.all_reduce(count)
        return count

    @property
    def mpu(self) -> "ModelParallelUnit | None":
        """For DeepSpeed; None where no node is on several learners, which is data parallelism alone."""
        return ModelParallelUnit(self) if self.node_ranks > 1 else None


class ModelParallelUnit:
    """Answers to DeepSpeed's questions, under the names that Megatron-LM gave them: ``nodes`` is the model-parallel
    axis, over which gradient norms are summed, ``data`` the one over which gradients are averaged and ZeRO shares."""

    def __init__(self, learners: NodeLearners) -> None:
        self._learners = learners

    def get_model_parallel_group(self) -> Any:
        return self._learners.along_nodes

    def get_model_parallel_rank(self) -> int:
        return self._learners.node_rank

    def get_model_parallel_world_size(self) -> int:
        return self._learners.node_ranks

    def get_data_parallel_group(self) -> Any:
        return self._learners.along_data

    def get_data_parallel_rank(self) -> int:
        return self._learners.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._learners.data_ranks
