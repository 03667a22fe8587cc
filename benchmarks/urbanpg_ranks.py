"""UrbanPG with its nodes on 1, 2 and 4 learners (gloo, processes of this machine): peak memory of a learner, bytes that
it sends in a step, and seconds, of training steps with a window of all nodes, against one process with plain torch.

The target is memory of 1 / learners and as many bytes whatever the nodes. Memory is what nodes take: resident bytes
above those of the same process with a model of FEW nodes, which holds torch, DeepSpeed and gloo alike. glibc is told to
give back what is freed, as a GPU's memory would be: left alone, a heap of tensors below its 32 MiB threshold keeps up
to as much again. Learners share the machine's cores, so more of them than cores gain no time; a thread each.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)  # of the learners' processes, which start with it

import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _harness import comparison, figure, parser, peak_bytes, publish, reset_peak, seconds

from stdist.config import LearnersConfig
from stdist.nodes.learners import NodeLearners
from stdist.training.deepspeed_json import deepspeed_json
from stdist.training.engine import Engine, ParameterGroup, TorchEngine
from stdist.urbanpg import Backbone, BackboneSpec, ContextPrompts, PromptSpec, UrbanPG
from stdist.urbanpg.node_parallel import NodeParallel

S = K = 12
FEW = 400


def measure(rank: int, ranks: int, folder: str, nodes: int, d: int, runs: int, torch_alone: bool) -> dict[str, Any]:
    """In a process of its own: the loss of the last step, and what the steps behind the first one took."""
    if ranks > 1:
        os.environ["LOCAL_RANK"] = str(rank)
        store = dist.FileStore(str(Path(folder) / f"{ranks}-{nodes}"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=10))
    learners = NodeLearners.current(FEW, ranks)
    train(learners, d, 2, torch_alone)
    before = reset_peak()
    return train(learners.of_nodes(nodes), d, runs, torch_alone) | {"peak": peak_bytes() - before}


def train(learners: NodeLearners, d: int, runs: int, torch_alone: bool) -> dict[str, Any]:
    nodes = learners.nodes
    model, engine = build(learners, nodes, d, torch_alone)
    generator = torch.Generator().manual_seed(1)
    history, target = (
        torch.randn(1, length, nodes, generator=generator)[:, :, learners.node_slice].clone() for length in (S, K)
    )
    slot = weekday = torch.zeros(1, dtype=torch.int64)
    points = learners.total(torch.tensor(float(target.numel())))
    losses: list[float] = []

    def step() -> None:
        loss = (model(history, slot, weekday, noise_seed=len(losses)) - target).abs().sum() / points
        engine.backward(loss)
        engine.step()
        losses.append(float(learners.total(loss)))

    step()
    times = [seconds(step) for _ in range(runs)]
    with counted() as sent:
        step()
    engine.close()
    return {"loss": losses, "seconds": times, "sent": sum(sent)}


def build(learners: NodeLearners, nodes: int, d: int, torch_alone: bool) -> tuple[UrbanPG, Engine]:
    torch.manual_seed(0)
    spec = BackboneSpec(history=S, horizon=K, d=d)
    whole = UrbanPG(Backbone(spec), ContextPrompts(PromptSpec(scenario="a", periods=(nodes,), cadence=60, d=d)))
    if torch_alone:
        return whole.train(), TorchEngine(
            [ParameterGroup(dict(whole.named_parameters()), 1e-3, 0.0)], lambda step: 1.0, 5.0
        )
    from stdist.urbanpg.node_engine import NodeEngine

    model = NodeParallel(whole.backbone, whole.prompts, learners).train()
    configuration = deepspeed_json(LearnersConfig(engine="deepspeed"), 5.0, False, 1)
    return model, NodeEngine(
        model, [ParameterGroup(model.trained_parameters(), 1e-3, 0.0)], lambda step: 1.0, configuration
    )


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes that this process hands to collectives of more than itself."""
    sent: list[int] = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "broadcast")}

    def counting(name: str) -> Any:
        def call(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
            group = named.get("group")
            if dist.is_initialized() and dist.get_world_size(group) > 1:
                sent.append(tensor.nbytes)
            return originals[name](tensor, *arguments, **named)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def on_learners(ranks: int, nodes: int, d: int, runs: int, folder: str, torch_alone: bool) -> list[dict[str, Any]]:
    with ProcessPoolExecutor(ranks, mp_context=get_context("spawn")) as pool:
        started = [pool.submit(measure, rank, ranks, folder, nodes, d, runs, torch_alone) for rank in range(ranks)]
        return [each.result() for each in started]


def main() -> None:
    arguments = parser(__doc__, runs=5)
    arguments.add_argument("--nodes", type=int, default=200_000)
    arguments.add_argument("--d", type=int, default=64)
    options = arguments.parse_args()
    table: dict[str, Any] = {}
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, ranks in (("plain torch", 1), ("1", 1), ("2", 2), ("4", 4)):
            alone = name == "plain torch"
            learners = on_learners(ranks, options.nodes, options.d, options.runs, folder, alone)
            fewer = on_learners(ranks, options.nodes // 4, options.d, 1, folder, alone)
            losses[name] = learners[0]["loss"]
            pairs = zip(losses[name], losses["plain torch"], strict=True)
            table[name] = {
                "peak_mb": [figure(each["peak"] / 1e6) for each in learners],
                "sent_kb_a_step": figure(learners[0]["sent"] / 1e3),
                "sent_kb_a_step_at_a_quarter_of_the_nodes": figure(fewer[0]["sent"] / 1e3),
                "seconds": [figure(each) for each in sorted(learners[0]["seconds"])],
                "largest_difference_of_losses": max(abs(ours - one) / abs(one) for ours, one in pairs),
            }
    publish(
        comparison(
            "urbanpg_ranks",
            "MB at the peak of one of four learners",
            table["4"]["peak_mb"],
            "one learner, of DeepSpeed too",
            table["1"]["peak_mb"],
            f"training steps of {options.nodes:,} nodes, batch 1, d {options.d}",
            "less",
            learners=table,
        ),
        options.json,
    )


if __name__ == "__main__":
    main()
