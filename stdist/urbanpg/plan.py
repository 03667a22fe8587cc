"""The plan of a run on nodes. Weights are counted; memory and operations of a batch are measured on one window and on
two: what two cost more every other one costs too, and the rest (P_s, say, and maps that serve all windows) is there
once.
"""

import torch

from stdist.nodes.dataset import NodeDataset
from stdist.nodes.interface import Forecaster
from stdist.nodes.learners import NodeLearners, nodes_of
from stdist.runs import memory_plan
from stdist.runs.devices import Device
from stdist.runs.memory_plan import Ranks, Weights
from stdist.runs.meter import metered
from stdist.runs.plan import RunPlan, StagePlan, update_bytes, verdict
from stdist.training.engine import ParameterGroup
from stdist.training.process_group import ProcessGroup
from stdist.urbanpg.checkpoints import stage_names
from stdist.urbanpg.config import UrbanConfig
from stdist.urbanpg.continual import expanded
from stdist.urbanpg.model import UrbanPG
from stdist.urbanpg.opening import open_run

FLOAT = 4
ROWS, SHARED = "rows of nodes", "what every learner has"
OTHERWISE = "set nodes.block_nodes, raise nodes.ranks or lower training.train_batch_size"


def plan_run(config: UrbanConfig, device: Device) -> RunPlan:
    """``device``: one learner's. Raises InputError as training would before its first step."""
    datasets, model, _, notes = open_run(config, ProcessGroup(0, config.learners.num_workers))
    stages = []
    for number, (name, dataset) in enumerate(zip(stage_names(config), datasets, strict=True)):
        if number and config.continual:
            model = expanded(model, dataset, config.continual, config.seed)
        stages.append(plan_stage(config, name, dataset, model))
    if config.nodes.ranks > 1 and (rows := sum(row.nbytes for row in model.node_parameters())):
        notes.append(f"while a checkpoint is saved, every learner also holds the whole city's rows: {rows:,} bytes")
    verdicts = [
        verdict(stage, device.memory, (), lambda changes: None, OTHERWISE)
        for stage in stages
        if device.memory is not None
    ]
    notes += [
        "beside these a process holds Python, torch and up to 1 GiB of decoded frames",
        "no seconds: a step is bound by memory and calls, not by a device's peak",
    ]
    return RunPlan(stages, verdicts, notes)


def plan_stage(config: UrbanConfig, name: str, dataset: NodeDataset, model: Forecaster) -> StagePlan:
    """One stage on the first learner, which no other one exceeds by more than a node."""
    learners, nodes, node_ranks = config.learners, len(dataset.nodes), config.nodes.ranks
    part = model.part(nodes_of(0, node_ranks, nodes))
    zero = learners.zero_stage if learners.engine == "deepspeed" else 0
    ranks = Ranks(learners.num_workers // node_ranks, zero, learners.offload_optimizer)
    rows = {id(row) for row in part.node_parameters()}
    weights = [
        Weights(f"{kind}{'' if trains else ', frozen'}", sum(p.numel() for p in some), FLOAT, trains)
        for kind in (SHARED, ROWS)
        for trains in (False, True)
        if (some := [p for p in part.parameters() if (id(p) in rows, p.requires_grad) == (kind == ROWS, trains)])
    ]
    group = NodeLearners(nodes, node_ranks, ProcessGroup(0, learners.num_workers))
    windows = group.share(config.training.train_batch_size)
    one, two = _measured(part, dataset, 1), _measured(part, dataset, 2)
    kept, temporaries, flops = (a + (windows - 1) * (b - a) for a, b in zip(one, two, strict=True))
    sent = memory_plan.traffic(weights, ranks, dict.fromkeys((w.kind for w in weights), 0), {ROWS: 1, SHARED: 1})
    if isinstance(model, UrbanPG) and node_ranks > 1:
        # The sums of Eq. 6 forward, their gradient backward, and the gradient of what all learners have.
        spec = model.backbone.spec
        sums = windows * (spec.d + 1) * (spec.history + 1) * FLOAT if spec.stca else 0
        sent["sums along the nodes"] = 2 * sums + sum(w.bytes for w in weights if w.trainable and w.kind == SHARED)
    trained = {name: p for name, p in part.named_parameters() if p.requires_grad}
    return StagePlan(
        name,
        "all" if len(trained) == len(list(part.parameters())) else "some",
        ranks,
        weights,
        {
            "training": {"activations": kept, "temporaries": temporaries},
            "update": {"temporaries": update_bytes([ParameterGroup(trained, 0, 0)], ranks)},
        },
        flops,
        sent,
        {
            "nodes": nodes,
            "windows": len(dataset.train),
            "steps_per_epoch": len(dataset.train) // config.training.train_batch_size,
        },
    )


def _measured(model: Forecaster, dataset: NodeDataset, windows: int) -> tuple[int, int, int]:
    """Bytes that are alive between forward and backward pass, bytes that come and go beside them, and operations, but
    for products with a sparse graph."""
    nodes = model.nodes or len(dataset.nodes)
    zero = torch.zeros(windows, dtype=torch.int64)
    history = torch.full((windows, dataset.train.S, nodes), dataset.statistics.mean)
    with metered(model.train(), history) as meter:
        forecast = model(history, zero, zero, noise_seed=0)
        kept = meter.live
        forecast.sum().backward()
        return kept, meter.peak - kept, meter.flops
