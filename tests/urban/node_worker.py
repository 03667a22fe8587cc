"""What test_node_parallel.py reads: UrbanPG with its nodes on ranks, by processes that live once.

    python node_worker.py RANK WORLD FOLDER

writes FOLDER/WORLD-RANK.json: for each case the largest relative difference from one process with all nodes and all
samples, and for each number of nodes the bytes sent in a step.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from stdist.urban import Backbone, BackboneSpec, Prompts, PromptSpec, UrbanPG
from stdist.urban.blocks import forward_in_blocks
from stdist.urban.node_parallel import NodeParallel

S, K, D, SAMPLES = 6, 4, 16, 4
CASES = {
    "paper": {},
    "sum": {"backbone": {"stca_normalizer": "sum"}},
    "no stca": {"backbone": {"stca": False}},
    "no temporal context": {"prompts": {"temporal": False}},
    "no spatial context": {"prompts": {"spatial": False}},
    "blocks": {"block_nodes": 9},
    "frozen backbone": {"frozen": True},
}


def make(nodes: int, case: dict, seed: int = 3) -> UrbanPG:
    torch.manual_seed(seed)
    spec = PromptSpec(
        **{"scenario": "a", "periods": (nodes // 3, nodes - nodes // 3), "cadence": 60, "d": D, "p": 0.4}
        | case.get("prompts", {})
    )
    backbone = Backbone(BackboneSpec(**{"history": S, "horizon": K, "d": D} | case.get("backbone", {})))
    prompts = Prompts(spec, 100.0, 40.0)
    with torch.no_grad():
        for rows in prompts.parameters():
            rows.mul_(30)
    return UrbanPG(backbone.requires_grad_(not case.get("frozen")), prompts)


def batch(nodes: int) -> tuple[Tensor, ...]:
    """History, slot, weekday, target, observed of all nodes and samples; ranks have unequal numbers of points."""
    g = torch.Generator().manual_seed(11)
    history, target = (100 + 40 * torch.randn(SAMPLES, length, nodes, generator=g) for length in (S, K))
    slot, weekday = torch.randint(24, (SAMPLES,), generator=g), torch.randint(7, (SAMPLES,), generator=g)
    observed = torch.rand(target.shape, generator=g) < torch.linspace(0.1, 1, nodes)
    return history, slot, weekday, target, observed


def forward(model: UrbanPG, case: dict, *inputs: Tensor, draw: int | None) -> Tensor:
    if "block_nodes" in case:
        return forward_in_blocks(model, *inputs, block_nodes=case["block_nodes"], draw=draw)
    return model(*inputs, draw=draw)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


def compare(mesh, case: dict) -> dict[str, float]:
    """Values, every gradient and the prompts gathered again, against one process."""
    nodes = 41
    history, slot, weekday, target, observed = batch(nodes)
    whole = make(nodes, case)
    value = forward(whole, case, history, slot, weekday, draw=6)
    ((value - target).abs() * observed).sum().div(observed.sum()).backward()

    other = make(nodes, case, seed=3 if dist.get_rank() == 0 else 90)  # what ranks have at first is the first one's
    if case.get("prompts", {}).get("spatial", True):
        for mine, its in zip(other.prompts.node_rows, whole.prompts.node_rows, strict=True):
            mine.data.copy_(its.data)  # but for the rows, which only their own ranks have
    model = NodeParallel(other.backbone, other.prompts, mesh)
    here, data = model.here, mesh.get_local_rank("data")
    samples = slice(SAMPLES * data // mesh.size(0), SAMPLES * (data + 1) // mesh.size(0))
    mine = forward(model, case, history[samples, :, here], slot[samples], weekday[samples], draw=6)
    seen = observed[samples, :, here]
    ((mine - target[samples, :, here]).abs() * seen).sum().div(model.total(seen.sum())).backward()
    model.sum_gradients()

    found = {"values": difference(mine, value[samples, :, here])}
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
        found["rows"] = difference(torch.cat([rows.grad for rows in model.prompts.node_rows]), all_rows[here])
    gathered, originals = model.whole_prompts(), whole.prompts.state_dict()
    assert gathered.spec == whole.prompts.spec
    found["gathered"] = float(not all(torch.equal(t, originals[n]) for n, t in gathered.state_dict().items()))
    return found


@contextmanager
def counted(sent: list[int]) -> Iterator[None]:
    """Bytes handed to torch.distributed by this rank."""
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


def sent_in_a_step(mesh, nodes: int) -> int:
    history, slot, weekday, target, _ = batch(nodes)
    model, sent = make(nodes, {}), []
    model = NodeParallel(model.backbone, model.prompts, mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    with counted(sent):
        error = (model(history[..., model.here], slot, weekday) - target[..., model.here]).abs()
        (error.sum() / model.total(torch.tensor(error.numel()))).backward()
        model.sum_gradients()
        optimizer.step()
    return sum(sent)


def trained(mesh) -> bool:
    """Whether three steps, whose perturbations are drawn and not given, leave every rank with the same weights."""
    torch.manual_seed(dist.get_rank())
    model = make(41, {})
    model = NodeParallel(model.backbone, model.prompts, mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    history, slot, weekday, target, _ = batch(41)
    for _ in range(3):
        optimizer.zero_grad()
        (model(history[..., model.here], slot, weekday) - target[..., model.here]).abs().sum().backward()
        model.sum_gradients()
        optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in model.shared_parameters()])
    first = weights.clone()
    dist.broadcast(first, src=0)
    return torch.equal(first, weights)


def main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world)
    results = {}
    for data in (1, 2) if world == 4 else (1,):
        mesh = init_device_mesh("cpu", (data, world // data), mesh_dim_names=("data", "nodes"))
        for name, case in CASES.items():
            results[f"{data}x{world // data} {name}"] = compare(mesh, case)
        if data == 1:
            results["sent"] = {nodes: sent_in_a_step(mesh, nodes) for nodes in (40, 400, 4000)}
            results["agree"] = trained(mesh)
    (folder / f"{world}-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
