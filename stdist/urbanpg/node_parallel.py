"""UrbanPG with its nodes on several learners, and several such groups side by side for parts of the batch.

:class:`~stdist.nodes.learners.NodeLearners` says who holds what: a learner has E_s of its own nodes and all of the
rest. Its loss is its own points' share of one sum over all points, so gradients are sums everywhere:

* S, the sums of Eq. 6, is S = Σ_r S_r over the learners along ``nodes``. Each learner r' computes with all of S, so
  dL/dS_r = dL/dS = Σ_r' dL_r'/dS: the forward pass sums S over ``nodes``, the backward pass its gradient.
* A row of E_s acts through its own learner's outputs and through S_r. With dL/dS whole, its gradient is whole: nothing
  is summed over ``nodes``, only over ``data``, where learners hold copies of it.
* Every other weight is on all learners and each has the part of its gradient that passes through the learner's own
  nodes and windows, that of P_t in Eq. 6 included, which every learner forms again from S: summed over all of them.

Along ``nodes`` a step sends the sums, their gradient and the other weights' gradient: nothing depends on N.
:class:`~stdist.urbanpg.node_engine.NodeEngine` trains it.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from stdist.errors import InputError
from stdist.nodes.learners import NodeLearners, nodes_of
from stdist.urbanpg.backbone import Backbone
from stdist.urbanpg.model import UrbanPG
from stdist.urbanpg.prompts import ContextPrompts

ROWS = "prompts.node_rows"


class NodeParallel(UrbanPG):
    """UrbanPG on one learner's nodes of the whole city's ``prompts``; ``forward`` takes and gives those nodes.

    Weights start as the first learner's; a node's row as that of the first learner with it. ``forward`` and what says
    so are collectives: a learner whose input is refused leaves the others waiting for it. Raises InputError where the
    prompts are of another number of nodes than the learners share.
    """

    def __init__(self, backbone: Backbone, prompts: ContextPrompts, learners: NodeLearners) -> None:
        if prompts.spec.nodes != learners.nodes:
            raise InputError(f"prompts of {prompts.spec.nodes} nodes, learners of {learners.nodes}; give both the same")
        super().__init__(backbone, prompts.part(learners.node_slice.start, learners.node_slice.stop))
        self.learners, self._periods = learners, prompts.spec.periods
        self._trains = [rows.requires_grad for rows in prompts.node_rows]
        self._gathered: list[ContextPrompts] = []
        for rows in self.prompts.node_rows:
            rows.model_parallel = True  # so DeepSpeed counts each row in the norm
        if learners.group.size > 1:
            for parameter in self.shared_parameters():
                dist.broadcast(parameter.data, src=0)
            for rows in self.prompts.node_rows:
                dist.broadcast(rows.data, group=learners.along_data, group_src=0)

    @property
    def nodes(self) -> int:
        return self.learners.nodes

    def shared_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that every learner has."""
        own = {id(rows) for rows in self.node_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in own]

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Returns what is not frozen, by its name in the whole city's model, of which rows may be a part: for one
        ``ParameterGroup``, since every learner must have the same groups and not all have rows that train."""
        names = {f"{ROWS}.{number}": f"{ROWS}.{period}" for number, (period, _) in enumerate(self._pieces())}
        return {names.get(name, name): p for name, p in self.named_parameters() if p.requires_grad}

    def first_elements(self) -> dict[str, int]:
        """Returns the element of the whole city's at which this learner's rows begin, by their trained names."""
        return {f"{ROWS}.{period}": rows.start * self.prompts.spec.d for period, rows in self._pieces()}

    def _pieces(self, rank: int | None = None) -> Iterator[tuple[int, slice]]:
        """For each of ``prompts.node_rows``, of this learner or of the one numbered ``rank`` along ``nodes``: the
        city's period, and which of its rows these are."""
        learners, first = self.learners, 0
        held = learners.node_slice if rank is None else nodes_of(rank, learners.node_ranks, learners.nodes)
        for period, count in enumerate(self._periods):
            rows = slice(max(held.start - first, 0), min(held.stop - first, count))
            if rows.start < rows.stop:
                yield period, rows
            first += count

    def all_reduce(self, sums: Tensor) -> Tensor:
        if self.learners.node_ranks == 1:
            return sums
        if torch.is_grad_enabled() and not sums.requires_grad:
            # A learner with nothing but frozen rows takes part in the others' backward pass all the same.
            sums = sums.requires_grad_()
        return _SumOverRanks.apply(sums, self.learners.along_nodes)

    def step_seed(self, noise_seed: int | None) -> int | None:
        """One for all learners: a step has one perturbation, whoever has the windows. Collective where it is None."""
        seed = super().step_seed(noise_seed)
        if seed is None or noise_seed is not None or self.learners.group.size == 1:
            return seed
        agreed = torch.tensor(seed, device=self.prompts.mean.device)
        dist.broadcast(agreed, src=0)
        return int(agreed)

    def sum_gradients(self) -> list[RemovableHandle]:
        """Registers hooks: from now on the backward pass of a loss that is this learner's share, times ``data_ranks``,
        is a collective and leaves gradients of which the mean over ``data`` is the whole loss's gradient.

        The shared weights' are summed over all learners, so that not even a rounding differs between them. Autograd
        goes back through the nodes of a graph in the reverse order of the forward pass, so learners sum in the same
        order, also where one has fewer blocks or nothing but frozen rows.
        """
        learners = self.learners

        def sum_over_learners(gradient: Tensor) -> Tensor:
            gradient = gradient / learners.data_ranks
            dist.all_reduce(gradient)
            return gradient

        if learners.node_ranks == 1:
            return []
        return [weight.register_hook(sum_over_learners) for weight in self.shared_parameters() if weight.requires_grad]

    def whole_prompts(self) -> ContextPrompts:
        """The prompts of the whole city, on every learner. Collective, but inside of :meth:`gathered`."""
        if self._gathered:
            return self._gathered[0]
        if self.learners.node_ranks == 1:
            return self.prompts
        if not self.prompts.spec.spatial:
            return self.prompts.with_node_rows(self._periods, [])
        own = iter(self.prompts.node_rows)
        city = [self.prompts.shared.new_empty(count, self.prompts.spec.d) for count in self._periods]
        for rank in range(self.learners.node_ranks):
            for period, rows in self._pieces(rank):
                part = city[period][rows]
                if rank == self.learners.node_rank:
                    part.copy_(next(own).detach())
                dist.broadcast(part, group=self.learners.along_nodes, group_src=rank)
        rows_and_trains = zip(city, self._trains, strict=True)
        parameters = [nn.Parameter(rows, requires_grad=trains) for rows, trains in rows_and_trains]
        return self.prompts.with_node_rows(self._periods, parameters)

    @contextmanager
    def gathered(self) -> Iterator[ContextPrompts]:
        """Inside, every learner has the whole city's prompts, as they are now. Entering it is a collective."""
        self._gathered.append(self.whole_prompts())
        try:
            yield self._gathered[0]
        finally:
            self._gathered.clear()

    def snapshot(self) -> Callable[[Path], None]:
        """See :class:`stdist.training.loop.Model`; of the whole city. Collective, but inside of :meth:`gathered`."""
        prompts = self.whole_prompts()
        prompts = copy.deepcopy(prompts) if prompts is self.prompts else prompts
        return UrbanPG(copy.deepcopy(self.backbone), prompts).save_pretrained

    def read(self, path: Path) -> None:
        """Takes its part of the weights of a saved model of the whole city. Raises InputError as loading does."""
        held, saved = self.learners.node_slice, UrbanPG.from_pretrained(path, self.prompts.spec.scenario)
        self.backbone.load_state_dict(saved.backbone.state_dict())
        self.prompts.load_state_dict(saved.prompts.part(held.start, held.stop).state_dict())


class _SumOverRanks(torch.autograd.Function):
    """Forward: Σ_r S_r on every rank. Backward: Σ_r' dL_r'/dS on every rank."""

    @staticmethod
    def forward(ctx, sums: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = sums.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
