"""Nodes in blocks: the same forecasts and gradients, in memory that a block bounds."""

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stdist.errors import InputError
from stdist.runs.devices import Device
from stdist.training.process_group import ProcessGroup
from stdist.urbanpg.opening import open_run
from stdist.urbanpg.plan import plan_run
from stdist.urbanpg.prompts import _replacements


def in_blocks(model, *inputs, block_nodes, noise_seed=None) -> Tensor:
    model.block_nodes = block_nodes
    value = model(*inputs, noise_seed=noise_seed)
    model.block_nodes = None
    return value


def gradients(model, forward) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    value = forward()
    (value * torch.linspace(-1, 1, value.numel()).view_as(value)).sum().backward()
    return value, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("block_nodes", [1, 7, 30, 100])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "ablation",
    [
        {"backbone": {"stca_normalizer": "sum"}},
        {"backbone": {"stca": False}},
        {"backbone": {"residual": False}},
        {"prompts": {"p": 0.6, "periods": (20, 10)}},
        {"prompts": {"temporal": False}},
        {"prompts": {"spatial": False}},
    ],
    ids=str,
)
def test_values_and_gradients_equal_the_plain_ones(model, batch, block_nodes, training, ablation):
    ours, inputs = model(**ablation).train(training), batch()
    value, expected = gradients(ours, lambda: ours(*inputs, noise_seed=5))
    blocks_value, found = gradients(ours, lambda: in_blocks(ours, *inputs, block_nodes=block_nodes, noise_seed=5))
    torch.testing.assert_close(blocks_value, value, rtol=1e-5, atol=1e-3)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    with torch.no_grad():
        without_graph = in_blocks(ours, *inputs, block_nodes=block_nodes, noise_seed=5)
    torch.testing.assert_close(without_graph, value, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("frozen", ["backbone", "prompts.node_rows.0"])
def test_what_is_frozen_has_no_gradient_in_blocks_either(model, batch, frozen):
    ours, inputs = model(prompts={"periods": (20, 10)}), batch()
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    _, expected = gradients(ours, lambda: ours(*inputs, noise_seed=5))
    _, found = gradients(ours, lambda: in_blocks(ours, *inputs, block_nodes=7, noise_seed=5))
    assert found.keys() == expected.keys() == {name for name, p in ours.named_parameters() if p.requires_grad}
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_block_needs_a_node(model, batch):
    with pytest.raises(InputError, match="block_nodes 0"):
        in_blocks(model(), *batch(), block_nodes=0)


def saved_bytes(forward) -> int:
    """What autograd keeps between forward and backward, storages counted once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = forward()  # noqa: F841 the graph lives while it is counted
    return sum(kept.values())


class Live(TorchDispatchMode):
    """The most bytes that were alive at once of all that was made inside; ``there`` was there before."""

    def __init__(self, there: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, storage: int, size: int) -> None:
        self.seen.discard(storage)
        self.now -= size


def step_peak(model, inputs, forward) -> int:
    model.zero_grad()
    with Live([*model.parameters(), *model.buffers(), *inputs]) as live:
        forward(model, *inputs).sum().backward()
    return live.peak


def test_activations_are_of_one_block_whatever_the_number_of_nodes(model, batch):
    def blocks(model, *inputs):
        return in_blocks(model, *inputs, block_nodes=250)

    def plain(model, *inputs):
        return model(*inputs)

    d, peaks = 32, {}
    for nodes in (2_000, 4_000):
        ours, inputs = model(nodes, backbone={"d": d}, prompts={"d": d}), batch(nodes, 1)
        peaks[nodes] = [step_peak(ours, inputs, forward) for forward in (plain, blocks)]
    per_node = [(peaks[4_000][i] - peaks[2_000][i]) / 2_000 for i in range(2)]
    # A node's hidden layer and the gradient of its row, its four forecasts and theirs, and a bool for each frame.
    assert per_node[1] <= 2 * 4 * d + 4 * 4 * 3 + 6
    assert per_node[0] > 6 * 4 * d
    forwards = (lambda: ours(*inputs)), (lambda: in_blocks(ours, *inputs, block_nodes=250))
    kept_plain, kept_blocks = (saved_bytes(forward) for forward in forwards)
    rows_and_history = 4_000 * 4 * (d + 6)
    hidden = 4_000 * 4 * d
    assert kept_plain > rows_and_history + 4 * hidden
    assert kept_blocks < rows_and_history + hidden + 3 * 4 * d * d, "what is there anyway, the sums and their maps"


@pytest.mark.parametrize("block_nodes", [None, 4])
@pytest.mark.parametrize("ablation", [{}, {"temporal": False}, {"stca": False}], ids=str)
def test_a_plan_counts_what_a_whole_batch_keeps(city, make_config, tmp_path, block_nodes, ablation):
    """Against every tensor that is alive behind the forward pass of a batch, be it known to autograd or not."""
    model, nodes = {"d": 64} | ablation, {"block_nodes": block_nodes}
    config = make_config(city, tmp_path, model=model, nodes=nodes, training={"train_batch_size": 8})
    (planned,) = plan_run(config, Device()).stages
    _, model, _, _ = open_run(config, ProcessGroup(0, 1))
    zero, history = torch.zeros(8, dtype=torch.int64), torch.full((8, 6, 9), 100.0)
    model.train()
    spec = model.prompts.spec
    stays = _replacements(0, 0, spec.p, spec.q, spec.d, history.device)  # stay for the next steps
    with Live([*model.parameters(), *model.buffers(), history, zero, *stays]) as live:
        forecast = model(history, zero, zero, noise_seed=0)
        kept = live.now + stays[-1].nbytes
        del forecast
    assert planned.phases["training"]["activations"] == pytest.approx(kept, rel=0.02)
