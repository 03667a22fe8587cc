"""The plan of a run on nodes: what every stage will hold, compute and send. Weights are counted; what autograd keeps of
a batch, and the operations, are measured on one window and on two: what two cost more, every other one costs too, and
the rest (P_s, say, and maps that serve all windows) is there once. In blocks the activations of the one block that is
computed again come on top.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from stdist.nodes.dataset import NodeDataset
from stdist.nodes.interface import Forecaster
from stdist.nodes.learners import NodeLearners, nodes_of
from stdist.runs import memory_plan
from stdist.runs.memory_plan import Ranks, Weights
from stdist.training.process_group import ProcessGroup
from stdist.urbanpg.checkpoints import stage_names
from stdist.urbanpg.config import UrbanConfig
from stdist.urbanpg.continual import expanded
from stdist.urbanpg.model import UrbanPG
from stdist.urbanpg.opening import open_run

MIB = 2**20
FLOAT = 4
ROWS, SHARED = "rows of nodes", "what every learner has"


@dataclass(frozen=True)
class StagePlan:
    """A step of one stage on one learner, in bytes and operations."""

    stage: str
    nodes: int
    windows: int
    steps_per_epoch: int
    parameters: int
    trained_parameters: int
    state_bytes: int
    activation_bytes: int
    flops: int
    bytes_sent: int

    @property
    def device_bytes(self) -> int:
        return self.state_bytes + self.activation_bytes


@dataclass(frozen=True)
class NodesPlan:
    """See :class:`stdist.vision_llm.plan.RunPlan`."""

    stages: list[StagePlan]
    verdicts: list[str]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        stages = [asdict(stage) | {"device_bytes": stage.device_bytes} for stage in self.stages]
        return {"stages": stages, "verdicts": self.verdicts, "notes": self.notes}

    def as_tables(self) -> Table:
        table = Table("", *(stage.stage for stage in self.stages), title="A step of one learner", title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        lines = {
            "nodes": [f"{stage.nodes:,}" for stage in self.stages],
            "training windows": [f"{stage.windows:,}" for stage in self.stages],
            "steps an epoch": [f"{stage.steps_per_epoch:,}" for stage in self.stages],
            "parameters": [f"{stage.parameters:,}" for stage in self.stages],
            "of them trained": [f"{stage.trained_parameters:,}" for stage in self.stages],
            "weights, gradients, optimizer, MiB": [f"{stage.state_bytes / MIB:,.4g}" for stage in self.stages],
            "activations, MiB": [f"{stage.activation_bytes / MIB:,.4g}" for stage in self.stages],
            "GFLOP": [f"{stage.flops / 1e9:,.4g}" for stage in self.stages],
            "kB sent": [f"{stage.bytes_sent / 1e3:,.4g}" for stage in self.stages],
        }
        for name, figures in lines.items():
            table.add_row(name, *figures)
        return table


def plan_run(config: UrbanConfig, device_memory: int | None) -> NodesPlan:
    """``device_memory``: bytes of one learner's. Raises InputError as training would before its first step."""
    tasks, model, _, notes = open_run(config, ProcessGroup(0, config.learners.num_workers))
    stages = []
    for number, (name, task) in enumerate(zip(stage_names(config), tasks, strict=True)):
        if number and config.continual:
            model = expanded(model, task, config.continual, config.seed)
        stages.append(plan_stage(config, name, task, model))
    if config.nodes.ranks > 1 and isinstance(model, UrbanPG) and model.prompts.spec.spatial:
        rows = model.prompts.spec.nodes * model.prompts.spec.d * FLOAT
        notes.append(f"while a checkpoint is saved, every learner also holds the whole city's rows: {rows:,} bytes")
    verdicts = [] if device_memory is None else [_verdict(stage, device_memory) for stage in stages]
    notes += [
        "beside these a process holds Python, torch and up to 1 GiB of decoded frames",
        "no seconds: a step is bound by memory and calls, not by a device's peak",
    ]
    return NodesPlan(stages, verdicts, notes)


def plan_stage(config: UrbanConfig, name: str, task: NodeDataset, model: Forecaster) -> StagePlan:
    """One stage on the first learner, which no other one exceeds by more than a node."""
    learners, nodes, node_ranks = config.learners, len(task.nodes), config.nodes.ranks
    data_ranks = learners.num_workers // node_ranks
    part = model.part(nodes_of(0, node_ranks, nodes))
    zero = learners.zero_stage if learners.engine == "deepspeed" else 0
    ranks = Ranks(data_ranks, zero, learners.offload_optimizer)
    rows = {id(row) for row in part.node_parameters()}
    weights = [
        Weights(ROWS if of_nodes else SHARED, sum(p.numel() for p in some), FLOAT, trainable)
        for of_nodes in (False, True)
        for trainable in (False, True)
        if (some := [p for p in part.parameters() if (id(p) in rows, p.requires_grad) == (of_nodes, trainable)])
    ]
    state = sum(memory_plan.state_bytes(each, ranks).device for each in weights)
    share = NodeLearners(nodes, node_ranks, ProcessGroup(0, learners.num_workers)).share(
        config.training.train_batch_size
    )
    kept, flops = _of_a_batch(part, task, share)
    sent = sum(memory_plan.traffic(weights, ranks, {}, {ROWS: 1, SHARED: 1}).values())
    if isinstance(model, UrbanPG) and node_ranks > 1:
        # The sums of Eq. 6 forward, their gradient backward, and the gradient of what all learners have.
        spec = model.backbone.spec
        sums = share * (spec.d + 1) * (spec.history + 1) * FLOAT if spec.stca else 0
        sent += 2 * sums + sum(each.bytes for each in weights if each.trainable and each.kind == SHARED)
    return StagePlan(
        name,
        nodes,
        len(task.train),
        len(task.train) // config.training.train_batch_size,
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        int(state + memory_plan.bucket_bytes(weights, ranks)),
        kept,
        flops,
        int(sent),
    )


def _of_a_batch(model: Forecaster, task: NodeDataset, windows: int) -> tuple[int, int]:
    """What :func:`_measured` would say of so many windows: something once, and the same of every window."""
    one, two = _measured(model, task, 1), _measured(model, task, 2)
    kept, flops = (first + (windows - 1) * (second - first) for first, second in zip(one, two, strict=True))
    return kept, flops


def _measured(model: Forecaster, task: NodeDataset, windows: int) -> tuple[int, int]:
    """Bytes that autograd keeps of a forward pass, and operations of it and the backward pass, but for products with a
    sparse graph."""
    nodes = model.nodes or len(task.nodes)
    kept: dict[int, int] = {}
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_sparse and (storage := tensor.untyped_storage()).data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    zero = torch.zeros(windows, dtype=torch.int64)
    history = torch.full((windows, task.train.S, nodes), task.statistics.mean)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), FlopCounterMode(display=False) as flops:
        model.train()(history, zero, zero, noise_seed=0).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    total = sum(kept.values())
    if model.block_nodes and isinstance(model, UrbanPG):
        # What blocks keep beside the hooks: the hidden layer, and the maps, each window's own where P_t is.
        spec, of_x = model.backbone.spec, model.backbone.spec.history + 1
        maps = (spec.d + of_x + 2 * spec.horizon) * (windows if model.prompts.spec.temporal else 1)
        total += (windows * (nodes + of_x * spec.stca) + maps) * spec.d * FLOAT
    return total, flops.get_total_flops()


def _verdict(plan: StagePlan, device_memory: int) -> str:
    of = f"{plan.stage}: {plan.device_bytes / MIB:,.0f} MiB of {device_memory / MIB:,.0f}"
    if plan.device_bytes <= device_memory:
        return f"{of}, fits"
    return f"{of}, does not fit: set nodes.block_nodes, raise nodes.ranks or lower training.train_batch_size"
