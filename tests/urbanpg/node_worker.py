"""What test_node_parallel.py reads: UrbanPG with its nodes on learners, by processes that live once.

    python node_worker.py RANK WORLD FOLDER

writes FOLDER/WORLD-RANK.json: for each case the largest relative difference from one process with all nodes and all
windows, for each number of nodes the bytes sent in a step, and what trainings in the real loop went through. As a
module it has the same trainings for one process with plain torch.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stdist.config import LearnersConfig
from stdist.nodes.learners import NodeLearners
from stdist.training.checkpoint import StageCheckpoints, checksums
from stdist.training.engine import Engine, ParameterGroup, TorchEngine, cosine_schedule
from stdist.training.loop import LoopSettings, Trainer
from stdist.training.loop import Stage as LoopStage
from stdist.urbanpg import Backbone, BackboneSpec, ContextPrompts, PromptSpec, UrbanPG
from stdist.urbanpg.node_parallel import NodeParallel

S, K, D, SAMPLES, NODES = 6, 4, 16, 4, 41
CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "sum": {"backbone": {"stca_normalizer": "sum"}},
    "no residual": {"backbone": {"residual": False}},
    "no stca": {"backbone": {"stca": False}},
    "no temporal context": {"prompts": {"temporal": False}},
    "no spatial context": {"prompts": {"spatial": False}},
    "blocks": {"block_nodes": 10},  # some learners have one block less than others
    "frozen backbone": {"frozen": True},
}
CONTINUAL = {"frozen": True, "frozen_rows": True, "block_nodes": 10}
"""Of four learners the first has rows of the first period alone, which are frozen."""
STEPS, SAVED_AT, WAITS = 6, 3, 100
FIRST_BATCH = 40
"""From here on no step has as many forecasts above the truth as below it: where it has, the last bias's gradient is
nothing but rounding, and AdamW takes a whole step of its sign."""
TRAININGS: dict[str, tuple[int, bool, float, dict[str, Any]]] = {
    "zero1": (1, False, 20.0, {}),
    "zero2": (2, False, 20.0, {}),
    "zero2-offload": (2, True, 20.0, {}),
    "zero1 continual": (1, False, 5.0, CONTINUAL),
    # The first learner's part of the sums then depends on nothing that trains.
    "zero1 continual without noise": (1, False, 5.0, CONTINUAL | {"prompts": {"p": 0.0}}),
    "zero3": (3, False, 20.0, {}),  # with every node on every learner
}
"""By name: stage of ZeRO, optimizer in CPU memory, the largest norm of a gradient (some steps are clipped and some are
not) and the case."""


def make(nodes: int, case: dict, seed: int = 3) -> UrbanPG:
    torch.manual_seed(seed)
    spec = PromptSpec(
        **{"scenario": "a", "periods": (nodes // 3, nodes - nodes // 3), "cadence": 60, "d": D, "p": 0.4}
        | case.get("prompts", {})
    )
    backbone = Backbone(BackboneSpec(**{"history": S, "horizon": K, "d": D} | case.get("backbone", {})))
    prompts = ContextPrompts(spec, 100.0, 40.0)
    with torch.no_grad():
        for rows in prompts.parameters():
            rows.mul_(30)
    if case.get("frozen_rows"):
        prompts.node_rows[0].requires_grad_(False)
    return UrbanPG(backbone.requires_grad_(not case.get("frozen")), prompts)


def batch(nodes: int, seed: int = 11) -> tuple[Tensor, ...]:
    """History, slot, weekday, target, observed of all nodes and windows; learners have unequal numbers of points."""
    g = torch.Generator().manual_seed(seed)
    history, target = (100 + 40 * torch.randn(SAMPLES, length, nodes, generator=g) for length in (S, K))
    slot, weekday = torch.randint(24, (SAMPLES,), generator=g), torch.randint(7, (SAMPLES,), generator=g)
    observed = torch.rand(target.shape, generator=g) < torch.linspace(0.1, 1, nodes)
    return history, slot, weekday, target, observed


def part(learners: NodeLearners, history, slot, weekday, target, observed) -> tuple[Tensor, ...]:
    """This learner's of a batch."""
    each = learners.share(SAMPLES)
    mine, here = slice(learners.data_rank * each, (learners.data_rank + 1) * each), learners.node_slice
    return history[mine, :, here], slot[mine], weekday[mine], target[mine, :, here], observed[mine, :, here]


def forward(model: UrbanPG, case: dict, *inputs: Tensor, noise_seed: int | None) -> Tensor:
    model.block_nodes = case.get("block_nodes")
    return model(*inputs, noise_seed=noise_seed)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


def compare(learners: NodeLearners, case: dict) -> dict[str, float]:
    """Values, every gradient and the prompts gathered again, against one process."""
    nodes = learners.nodes
    history, slot, weekday, target, observed = batch(nodes)
    whole = make(nodes, case)
    value = forward(whole, case, history, slot, weekday, noise_seed=6)
    ((value - target).abs() * observed).sum().div(observed.sum()).backward()

    other = make(
        nodes, case, seed=3 if learners.group.is_main else 90
    )  # what learners have at first is the first one's
    if case.get("prompts", {}).get("spatial", True):
        for mine, its in zip(other.prompts.node_rows, whole.prompts.node_rows, strict=True):
            mine.data.copy_(its.data)  # but for the rows, which only their own learners have
    model = NodeParallel(other.backbone, other.prompts, learners)
    hooks = model.sum_gradients()
    *inputs, my_target, seen = part(learners, history, slot, weekday, target, observed)
    mine = forward(model, case, *inputs, noise_seed=6)
    error = ((mine - my_target).abs() * seen).sum() / learners.total(seen.sum())
    (error * learners.data_ranks).backward()
    for parameter in model.parameters():  # as the engine does
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=learners.along_data)
            parameter.grad /= learners.data_ranks
    for hook in hooks:
        hook.remove()

    expected_value = part(learners, history, slot, weekday, value, observed)[3]
    found = {"values": difference(mine, expected_value)}
    rows = {f"prompts.node_rows.{period}" for period in range(2)}
    expected = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        if name in rows:
            continue
        if parameter.grad is None or expected[name].grad is None:
            assert parameter.grad is expected[name].grad, name
        else:
            found[name] = difference(parameter.grad, expected[name].grad)
    if len(model.prompts.node_rows):
        all_rows = torch.cat([rows.grad for rows in whole.prompts.node_rows])
        here = torch.cat([rows.grad for rows in model.prompts.node_rows])
        found["rows"] = difference(here, all_rows[learners.node_slice])
    gathered, originals = model.whole_prompts(), whole.prompts.state_dict()
    assert gathered.spec == whole.prompts.spec
    found["gathered"] = float(not all(torch.equal(t, originals[n]) for n, t in gathered.state_dict().items()))
    return found


@contextmanager
def counted(sent: list[int]) -> Iterator[None]:
    """Bytes handed to torch.distributed by this learner."""
    originals = {name: getattr(dist, name) for name in ("all_reduce", "broadcast")}

    def count(name: str):
        def call(tensor: Tensor, *args, **kwargs):
            sent.append(tensor.numel() * tensor.element_size())
            return originals[name](tensor, *args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, count(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def sent_in_a_step(learners: NodeLearners) -> int:
    """Of the forward and backward pass; with one learner along ``data`` the engine adds the gradient's norm alone."""
    history, slot, weekday, target, _ = batch(learners.nodes)
    whole, sent = make(learners.nodes, {}), []
    model = NodeParallel(whole.backbone, whole.prompts, learners)
    model.sum_gradients()
    with counted(sent):
        error = (model(history[..., learners.node_slice], slot, weekday) - target[..., learners.node_slice]).abs()
        (error.sum() / learners.total(torch.tensor(error.numel()))).backward()
    return sum(sent)


class Stage(LoopStage):
    """See stdist.training.loop.Stage: the masked mean absolute error of random windows."""

    name, monitor, headline = "toy", None, ("mae",)

    def __init__(self, model: NodeParallel, case: dict) -> None:
        self.model, self.case, self.learners = model, case, model.learners

    def _error(self, number: int, noise_seed: int) -> Tensor:
        *inputs, target, observed = part(self.learners, *batch(self.learners.nodes, FIRST_BATCH + number))
        error = ((forward(self.model, self.case, *inputs, noise_seed=noise_seed) - target).abs() * observed).sum()
        return error / self.learners.total(observed.sum())

    def step(self, step: int, backward: Callable[[Tensor], None]) -> dict[str, float]:
        error = self._error(step, noise_seed=step)
        backward(error * self.learners.data_ranks)
        return {"loss": float(self.learners.total(error))}

    def evaluate(self) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad():
            error = self.learners.total(self._error(1000, noise_seed=0))
        self.model.train()
        return {"mae": float(error)}

    def describe_batch(self, step: int) -> str:
        return f"batch {step}"


def train(name: str, folder: Path, steps: int, learners: NodeLearners) -> dict[str, Any]:
    """Up to ``steps`` steps in the real loop, from the newest checkpoint in ``folder``. One process uses torch."""
    zero_stage, offload, max_grad_norm, case = TRAININGS[name]
    whole = make(learners.nodes, case)
    model = NodeParallel(whole.backbone, whole.prompts, learners)

    def make_engine() -> Engine:
        groups = [ParameterGroup(model.trained_parameters(), 0.01, 0.1)]
        schedule = cosine_schedule(2, STEPS)
        if learners.group.size == 1:
            return TorchEngine(groups, schedule, max_grad_norm)
        from stdist.training.deepspeed_engine import DeepSpeedEngine
        from stdist.training.deepspeed_json import deepspeed_json
        from stdist.urbanpg.node_engine import NodeEngine

        config = LearnersConfig(engine="deepspeed", zero_stage=zero_stage, offload_optimizer=offload)
        configuration = deepspeed_json(config, max_grad_norm, False, learners.data_ranks)
        if zero_stage == 3:  # nothing is kept whole for being small: the toy would never be sharded
            configuration["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        kind = NodeEngine if learners.node_ranks > 1 else DeepSpeedEngine
        return kind(model, groups, schedule, configuration)

    scalars: list[dict[str, float]] = []
    trainer = Trainer(folder, learners.group, on_metrics=scalars.append)
    trainer.checkpoints = lambda stage: StageCheckpoints(folder, learners.group)  # type: ignore[method-assign]
    summary = trainer.fit(
        Stage(model, case),
        model,
        make_engine,
        LoopSettings(max_steps=steps, logging_steps=1, save_steps=SAVED_AT, eval_steps=steps),
    )
    learners.group.all_gather_object(None)
    if learners.group.is_main:
        (folder / "finished.json").unlink()  # more steps may follow
    learners.group.all_gather_object(None)
    return {
        "losses": [each["loss"] for each in scalars],
        "norms": [each["grad_norm"] for each in scalars],
        "mae": summary["after"]["mae"],
        "rows": sum(rows.numel() for rows in model.prompts.node_rows),
        "shared": checksums({str(i): p for i, p in enumerate(model.shared_parameters())}),
        "hooks": [name for name, p in model.named_parameters() if p._backward_hooks],
    }


def at_checkpoint(folder: Path, copy: Path, learners: NodeLearners) -> Path:
    """A copy of a run's checkpoint of step SAVED_AT, to go on from."""
    if learners.group.is_main:
        shutil.copytree(folder / f"step-{SAVED_AT}", copy / f"step-{SAVED_AT}")
    learners.group.all_gather_object(None)
    return copy


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    store = dist.FileStore(str(folder / f"store-{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=WAITS))
    results: dict[str, Any] = {}
    for data in (1, 2) if world == 4 else (1,):
        learners = NodeLearners.current(NODES, world // data)
        layout = f"{data}x{world // data}"
        axes = (learners.along_data, learners.along_nodes)
        results[f"{layout} waits"] = [axis._get_backend(torch.device("cpu")).options._timeout.seconds for axis in axes]
        for name, case in CASES.items():
            results[f"{layout} {name}"] = compare(learners, case)
        if data == 1:
            results["sent"] = {nodes: sent_in_a_step(learners.of_nodes(nodes)) for nodes in (40, 400, 4000)}
        for name in [each for each in TRAININGS if each != "zero3"]:
            results[f"{layout} {name}"] = train(name, folder / f"{layout} {name}", STEPS, learners)
        # Of another number of learners along both axes, of one process, and its own.
        for saved in {"1x4": ["torch", "1x4"], "2x2": ["1x4"], "1x2": ["2x2"]}[layout]:
            name = "zero1"
            path = at_checkpoint(folder / f"{saved} {name}", folder / f"{saved} to {layout}", learners)
            results[f"{saved} to {layout}"] = train(name, path, STEPS, learners)
    results[f"{world}x1 zero3"] = train("zero3", folder / f"{world}x1 zero3", STEPS, NodeLearners.current(NODES))
    (folder / f"{world}-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
