"""Sizes of micro-batches: the sequences of each depth of a prefix tree that a budget for activations allows."""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from stdist.vision_llm.kernels.prefix import Prefix
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.tree.prefix_tree import Tree


class MicroBatches:
    """Sizes for :func:`prefix_tree.backward`, from bytes that autograd keeps for one sequence, measured, not guessed.

    Args:
        policy: as it trains; what is frozen or recomputed changes what autograd keeps.
        memory: bytes for the activations of a path through the tree, shared out evenly to its depths.
    """

    def __init__(self, policy: PolicyModel, memory: int):
        self.policy, self.memory = policy, memory
        self._bytes: dict[tuple[torch.Size, ...], list[int]] = {}

    def halve(self) -> None:
        """Gives the next trees half the memory."""
        self.memory //= 2

    def sizes(self, tree: Tree) -> list[int]:
        """For the windows and for each level; at least 1, whatever one sequence takes. The same for the same shapes."""
        shapes = tuple(x.shape[1:] for x in (tree.shared, tree.grids, *(level.ids for level in tree.levels)))
        if shapes not in self._bytes:
            self._bytes[shapes] = activation_bytes(self.policy, tree)
        return sizes_within(self.memory, self._bytes[shapes])


def sizes_within(memory: int, sequence_bytes: list[int]) -> list[int]:
    """Sequences of each depth at once, where every depth may fill the same share of ``memory``; at least 1."""
    share = memory // len(sequence_bytes)
    return [max(1, share // size) for size in sequence_bytes]


def activation_bytes(policy: PolicyModel, tree: Tree) -> list[int]:
    """Bytes kept for one window and for one sequence of each level, by autograd and for their children to read,
    parameters not counted. With gradient checkpointing, also one layer's worth of what it recomputes."""
    kept = _kept(policy, tree)
    if not policy.spec.gradient_checkpointing:
        return kept
    mode = policy.training
    policy.eval()  # layers are recomputed in training mode only
    whole = _kept(policy, tree)
    policy.train(mode)
    layers = policy.base_model.config.get_text_config().num_hidden_layers
    return [a + b // layers for a, b in zip(kept, whole, strict=True)]


def _kept(policy: PolicyModel, tree: Tree) -> list[int]:
    """Bytes that autograd would keep of each depth, and does not: of a window of a 7B they may be 8 GB."""
    # Storages by their address, which is nobody else's while somebody refers to them, if only weakly.
    seen: dict[int, StorageWeakRef] = {}
    total = 0

    # Sharded weights have their storage only while their module is at work: they are asked when one is met.
    held, sharded = set(), []
    for parameter in policy.parameters():
        storage = parameter.untyped_storage()
        held.add(storage._cdata) if storage.nbytes() else sharded.append(parameter)

    def is_weight(storage: torch.UntypedStorage) -> bool:
        return storage._cdata in held or any(p.untyped_storage()._cdata == storage._cdata for p in sharded)

    def count(tensor: Tensor) -> None:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in seen and not is_weight(storage):
            seen[storage._cdata] = StorageWeakRef(storage)
            total += storage.nbytes()

    sums: list[int] = []
    nodes: list[Prefix] = []
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda nothing: nothing):
        nodes.append(policy.prefix(tree.shared[:1], tree.grids[:1]))
        for level in (*tree.levels, None):
            for tensor in nodes[-1].tensors:  # a layer that is recomputed has not saved its keys and values
                count(tensor)
            sums.append(total)
            if level:
                nodes.append(policy.branch(nodes[-1], level.ids[:1])[1])
    return [max(1, after - before) for before, after in zip([0, *sums[:-1]], sums, strict=True)]
