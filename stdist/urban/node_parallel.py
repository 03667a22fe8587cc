"""UrbanPG with its nodes on several ranks, and several such groups side by side for parts of the batch.

The ranks are a mesh of two dimensions, ``data`` and ``nodes``: ranks along ``nodes`` hold different nodes of the same
samples, ranks along ``data`` the same nodes of different samples. A rank holds its own nodes' rows of E_s and all of
the rest. Every rank's loss is its own points' share of one sum over all points, so gradients are sums everywhere:

* S, the sums of Eq. 6, is S = Σ_r S_r over the ranks of ``nodes``. Each rank r' computes with all of S, so
  dL/dS_r = dL/dS = Σ_r' dL_r'/dS: the forward pass sums S over ``nodes``, the backward pass its gradient.
* A row of E_s acts through its own rank's outputs and through S_r. With dL/dS whole, its gradient is whole: nothing is
  summed over ``nodes``, only over ``data``, where ranks hold copies of it.
* Every other weight is on all ranks and each has the part of its gradient that passes through the rank's own nodes
  and samples, that of P_t in Eq. 6 included, which every rank forms again from S: summed over the whole mesh.

Along ``nodes`` a step sends the sums, their gradient, the other weights' gradient and one number: nothing depends on N.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from stdist.errors import InputError
from stdist.urban.prompts import Prompts
from stdist.urban.urbanpg import Backbone, UrbanPG

DATA, NODES = "data", "nodes"


def nodes_of(rank: int, ranks: int, nodes: int) -> slice:
    """Which of ``nodes`` nodes a rank holds. Raises InputError where there are not enough of them."""
    if nodes < ranks:
        raise InputError(f"{nodes} nodes cannot be shared by {ranks} ranks; use at most {nodes} along {NODES!r}")
    return slice(nodes * rank // ranks, nodes * (rank + 1) // ranks)


class NodeParallel(UrbanPG):
    """UrbanPG on one rank's nodes, ``here``, of the whole city's ``prompts``; ``forward`` takes and gives those nodes.

    mesh: ``init_device_mesh(device, (data, nodes), mesh_dim_names=("data", "nodes"))`` over all ranks. Weights start as
    the first rank's; a node's row as that of the first rank with it. Every method but ``check`` and
    ``shared_parameters`` is a collective: a rank whose input is refused leaves the others waiting for it.
    """

    def __init__(self, backbone: Backbone, prompts: Prompts, mesh: DeviceMesh) -> None:
        if mesh.mesh_dim_names != (DATA, NODES) or mesh.size() != dist.get_world_size():
            raise InputError(
                f"a mesh {mesh.mesh_dim_names} of {mesh.size()} ranks; give ({DATA!r}, {NODES!r}) over all"
            )
        self.here = nodes_of(mesh.get_local_rank(NODES), mesh.size(1), prompts.spec.nodes)
        super().__init__(backbone, prompts.part(self.here.start, self.here.stop))
        self.total_nodes, self._periods = prompts.spec.nodes, prompts.spec.periods
        self._trains = [rows.requires_grad for rows in prompts.node_rows]
        self._data, self._nodes = mesh.get_group(DATA), mesh.get_group(NODES)
        for parameter in self.shared_parameters():
            dist.broadcast(parameter.data, src=0)
        for rows in self.prompts.node_rows:
            dist.broadcast(rows.data, group=self._data, group_src=0)

    def shared_parameters(self) -> list[nn.Parameter]:
        """Those that every rank has: all but the nodes' rows."""
        rows = {id(row) for row in self.prompts.node_rows}
        return [parameter for parameter in self.parameters() if id(parameter) not in rows]

    def meet(self, sums: Tensor) -> Tensor:
        return _SumOverRanks.apply(sums, self._nodes)

    def draw(self, draw: int | None) -> int | None:
        """One number for all ranks: a step has one perturbation, whoever has the samples."""
        number = super().draw(draw)
        if number is None or draw is not None:
            return number
        agreed = torch.tensor(number, device=self.prompts.mean.device)
        dist.broadcast(agreed, src=0)
        return int(agreed)

    def total(self, count: Tensor) -> Tensor:
        """A number summed over all ranks, without gradient: the points that the mean error is over."""
        count = count.detach().clone()
        dist.all_reduce(count)
        return count

    def sum_gradients(self) -> None:
        """After the backward pass, before the optimizer's step: makes every gradient that of the whole loss."""
        gradients = [p.grad for p in self.shared_parameters() if p.grad is not None]
        if gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            for gradient, whole in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(whole.view_as(gradient))
        for rows in self.prompts.node_rows:
            if rows.grad is not None and self._data.size() > 1:
                dist.all_reduce(rows.grad, group=self._data)

    def whole_prompts(self) -> Prompts:
        """The prompts of the whole city, on every rank, for instance for saving them."""
        own = self.prompts.rows()
        if own is None:
            return self.prompts.with_rows(self._periods, [])
        parts = []
        for rank in range(self._nodes.size()):
            held = nodes_of(rank, self._nodes.size(), self.total_nodes)
            part = own.detach() if held == self.here else own.new_empty(held.stop - held.start, own.shape[1])
            dist.broadcast(part, group=self._nodes, group_src=rank)
            parts.append(part)
        rows = torch.cat(parts).split(list(self._periods))
        kept = zip(rows, self._trains, strict=True)
        return self.prompts.with_rows(self._periods, [nn.Parameter(r.clone(), requires_grad=t) for r, t in kept])


class _SumOverRanks(torch.autograd.Function):
    """Forward: Σ_r S_r on every rank. Backward: Σ_r' dL_r'/dS on every rank."""

    @staticmethod
    def forward(ctx, sums: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = sums.clone()
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        whole = gradient.clone()
        dist.all_reduce(whole, group=ctx.group)
        return whole, None
