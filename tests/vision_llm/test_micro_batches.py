"""What a prefix tree computes and what it keeps in memory: tokens and bytes, counted."""

import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stdist.vision_llm.policy.adapters import train_only
from stdist.vision_llm.policy.city_windows import PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.sampler import Completions
from stdist.vision_llm.stages.grpo import candidate_tree
from stdist.vision_llm.stages.sft import sft_tree
from stdist.vision_llm.tree import prefix_tree
from stdist.vision_llm.tree.micro_batches import MicroBatches, activation_bytes
from stdist.vision_llm.tree.prefix_tree import Level, Tree

MakePolicy = Callable[..., PolicyModel]
G = 3


def window_cell_candidate(policy: PolicyModel, batch: PolicyBatch) -> Tree:
    """Three candidates of K + 1 choices for every cell."""
    choices = torch.randint(
        len(policy.vocabulary), (len(batch.prompts) * G, 4), generator=torch.Generator().manual_seed(0)
    )
    nothing = torch.zeros(choices.shape)
    written = Completions(choices, nothing == 0, nothing, nothing, nothing[:, 0].long())
    return candidate_tree(policy, batch, written)


def mean_square(rows: slice, states: Tensor) -> Tensor:
    return states.square().mean(-1).sum()


# --- what is computed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size", [1, 4])
def test_every_node_is_computed_once_and_the_tower_runs_once_a_window(
    make_policy: MakePolicy,
    make_batch: Callable[..., PolicyBatch],
    plain_inputs: Callable[..., dict[str, Tensor]],
    checkpointing: bool,
    size: int,
) -> None:
    """V + C·(T + G·K) decoder tokens a window, where one sequence per candidate computes C·G·(V + T + K)."""
    policy = make_policy(gradient_checkpointing=checkpointing)
    train_only(policy, "full")
    batch = make_batch(policy)
    tree = window_cell_candidate(policy, batch)
    v, t = batch.shared.shape[1], batch.prompts.shape[1]
    assert tree.tokens == 2 * (v + 3 * (t + G * 3))

    decoder: list[int] = []
    images: list[int] = []
    base = policy.base_model.model
    # Inside a layer: recomputation calls its parts again.
    base.language_model.layers[0].mlp.register_forward_pre_hook(
        lambda _, inputs: decoder.append(inputs[0].shape[:-1].numel())
    )
    base.visual.register_forward_pre_hook(
        lambda _, inputs, named: images.append(len(named["grid_thw"])), with_kwargs=True
    )
    prefix_tree.backward(policy, tree, mean_square, Tensor.backward, [size] * 3)
    assert sum(decoder) == tree.tokens * (2 if checkpointing else 1)
    assert sum(images) == 2 * 4, "four frames of each window"

    per_sample = [
        plain_inputs(policy, batch, child, ids)["input_ids"] for child in range(6) for ids in tree.levels[1].ids[:G]
    ]
    assert tree.tokens_per_sample == sum(ids.numel() for ids in per_sample) == 2 * 3 * G * (v + t + 3)

    decoder.clear()
    images.clear()
    prefix_tree.forward(policy, tree, mean_square, [size] * 3)
    assert sum(decoder) == tree.tokens and sum(images) == 8, "without gradients nothing is recomputed"


# --- what is kept --------------------------------------------------------------------------------------------------


class Held:
    """What autograd was given to keep; without its history, or a node that keeps its own output would never die."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()


class LiveBytes:
    """Bytes that autograd keeps now and at most, every storage counted once while anything holds it."""

    def __init__(self, policy: PolicyModel):
        self._ignored = {p.untyped_storage().data_ptr() for p in policy.parameters()}
        self._holders: dict[int, int] = {}
        self.now = self.peak = 0

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def _pack(self, tensor: Tensor) -> Held:
        held, storage = Held(tensor), tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self._ignored:
            self._holders[key] = self._holders.get(key, 0) + 1
            if self._holders[key] == 1:
                self.now += size
                self.peak = max(self.peak, self.now)
            weakref.finalize(held, self._release, key, size)
        return held

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if self._holders[key] == 0:
            self.now -= size


def peak_bytes(policy: PolicyModel, tree: Tree, sizes: list[int]) -> int:
    live = LiveBytes(policy)
    with live.hooks():
        prefix_tree.backward(policy, tree, mean_square, Tensor.backward, sizes)
    assert live.now == 0, "a step leaves nothing behind"
    return live.peak


class Living(TorchDispatchMode):
    """Bytes of what operations made that are alive at the same time, at most."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for x in tree_leaves(result):
            if torch.is_tensor(x) and (storage := x.untyped_storage())._cdata not in given:
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))
        return result


@pytest.fixture(scope="module")
def trained(make_policy: MakePolicy) -> PolicyModel:
    policy = make_policy()
    train_only(policy, "full")
    return policy


@pytest.fixture(scope="module")
def tree(trained: PolicyModel, make_batch: Callable[..., PolicyBatch]) -> Tree:
    return window_cell_candidate(trained, make_batch(trained, windows=(0, 9, 31), cells=(1, 7, 10, 18)))


def test_the_peak_stays_within_the_budget_and_one_path(trained: PolicyModel, tree: Tree) -> None:
    path = sum(activation_bytes(trained, tree))
    peaks, all_sizes = [], []
    for budget in (64 * path, 6 * path, 3 * path, path // 100):
        sizes = MicroBatches(trained, budget).sizes(tree)
        peaks.append(peak_bytes(trained, tree, sizes))
        all_sizes.append(sizes)
        # The states a loss is made of are its own: here their squares and means.
        states = sizes[2] * 4 * trained.rows.input.shape[1] * 4 * 3
        assert peaks[-1] <= budget + path + states
    assert all_sizes[0] == [max(s, n) for s, n in zip(all_sizes[0], (3, 12, 36), strict=True)], "all at once"
    assert all_sizes[-1] == [1, 1, 1]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 2 * peaks[-1]
    counted = sum(n * each for n, each in zip((3, 12, 36), activation_bytes(trained, tree), strict=True))
    assert peaks[0] == pytest.approx(counted, rel=0.02), "many sequences keep as much as one, many times"


def test_smaller_micro_batches_keep_less(trained: PolicyModel, tree: Tree) -> None:
    """At every depth: windows, cells and candidates."""
    for depth in range(3):
        peaks = []
        for size in (100, 4, 1):
            sizes = [100, 100, 100]
            sizes[depth] = size
            peaks.append(peak_bytes(trained, tree, sizes))
        assert peaks[0] > peaks[1] >= peaks[2] if depth else peaks[0] == peaks[1] > peaks[2], (depth, peaks)


def saved_by(roots: list[Tensor]) -> Iterator[Tensor]:
    """All tensors that the nodes of an autograd graph say they saved."""
    nodes = [tensor.grad_fn for tensor in roots if tensor.grad_fn is not None]
    visited: set[Node] = set()
    while nodes:
        node = nodes.pop()
        if node in visited:
            continue
        visited.add(node)
        for name in dir(node):
            if name.startswith("_saved_") or name == "saved_tensors":
                value = getattr(node, name)
                yield from (x for x in (value if isinstance(value, (list, tuple)) else [value]) if torch.is_tensor(x))
        nodes += [before for before, _ in node.next_functions if before is not None]


@pytest.mark.parametrize("part", ["full", "rows"])
def test_activation_bytes_are_what_graphs_and_their_ends_hold(
    make_policy: MakePolicy, make_batch: Callable[..., PolicyBatch], part: str
) -> None:
    """Counted a second time, from the graphs: every storage that a node of theirs saved or that a child will read."""
    policy = make_policy()
    train_only(policy, part)
    tree = window_cell_candidate(policy, make_batch(policy))
    parameters = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    node = policy.prefix(tree.shared[:1], tree.grids[:1])
    nodes = [node]
    for level in tree.levels:
        _, node = policy.branch(node, level.ids[:1])
        nodes.append(node)
    expected, seen = [], parameters
    for node in nodes:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved_by(node.tensors)}
        storages |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in node.tensors}
        expected.append(sum(size for storage, size in storages.items() if storage not in seen))
        seen |= storages.keys()
    assert min(expected) > 10_000
    assert activation_bytes(policy, tree) == expected


def test_less_is_kept_with_checkpointing_and_of_a_frozen_backbone(
    make_policy: MakePolicy, make_batch: Callable[..., PolicyBatch]
) -> None:
    counts = {}
    for name, part, checkpointing in (("full", "full", False), ("recomputed", "full", True), ("frozen", "rows", False)):
        policy = make_policy(gradient_checkpointing=checkpointing)
        train_only(policy, part)
        tree = window_cell_candidate(policy, make_batch(policy))
        counts[name] = activation_bytes(policy, tree)
        assert policy.training, "counting changes nothing"
        assert all(parameter.grad is None for parameter in policy.parameters())
    for full, recomputed, frozen in zip(*counts.values(), strict=True):
        assert recomputed < 0.7 * full and frozen < 0.9 * full
    # Recomputed or not, four layers' inputs, their keys and values (2 heads of 32) and the hidden states stay; and one
    # layer's worth of the rest comes back for a while.
    for level, full, recomputed in zip(tree.levels, counts["full"][1:], counts["recomputed"][1:], strict=True):
        assert recomputed > level.ids.shape[1] * (4 * (128 + 2 * 64) + 128) * 4 + full // 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_counting_keeps_nothing_of_what_it_counts(
    make_policy: MakePolicy, make_batch: Callable[..., PolicyBatch], checkpointing: bool
) -> None:
    """A window without checkpointing is many times what checkpointing keeps, and outside of any budget."""
    policy = make_policy(gradient_checkpointing=checkpointing)
    train_only(policy, "full")
    tree = window_cell_candidate(policy, make_batch(policy))
    whole = make_policy()
    train_only(whole, "full")
    one_path = sum(activation_bytes(whole, tree))
    with Living() as living:
        activation_bytes(policy, tree)
    assert living.peak < one_path / 3


def test_sizes_share_the_budget_evenly_and_are_at_least_one(trained: PolicyModel, tree: Tree) -> None:
    each = activation_bytes(trained, tree)
    assert MicroBatches(trained, 0).sizes(tree) == [1, 1, 1]
    assert MicroBatches(trained, 3 * max(each) - 3).sizes(tree)[each.index(max(each))] == 1
    for memory in (3 * 7 * max(each), 10**8):
        assert MicroBatches(trained, memory).sizes(tree) == [memory // 3 // bytes_of_one for bytes_of_one in each]
    one_level = Tree(tree.shared, tree.grids, tree.levels[:1])
    memory = 2 * 5 * each[0]
    assert MicroBatches(trained, memory).sizes(one_level)[0] == 5, "two depths share"


def test_sizes_are_the_same_for_the_same_shapes_whatever_ran_before(
    trained: PolicyModel, tree: Tree, make_batch: Callable[..., PolicyBatch]
) -> None:
    memory = 4 * sum(activation_bytes(trained, tree))
    fresh = MicroBatches(trained, memory).sizes(tree)
    used = MicroBatches(trained, memory)
    other = sft_tree(trained, make_batch(trained), torch.zeros(6, dtype=torch.bool))
    longer = Tree(tree.shared, tree.grids, (Level(tree.levels[0].ids.repeat(1, 2)), *tree.levels[1:]))
    assert used.sizes(longer)[1] < fresh[1], "another shape, another size"
    used.sizes(other)
    prefix_tree.backward(trained, tree, mean_square, Tensor.backward, fresh)
    assert used.sizes(tree) == fresh == used.sizes(tree)
    fewer = Tree(
        tree.shared[:1], tree.grids[:1], (Level(tree.levels[0].ids[:2].flip(1)), Level(tree.levels[1].ids[:6]))
    )
    assert used.sizes(fewer) == fresh == MicroBatches(trained, memory).sizes(fewer), "neither count nor content matters"
