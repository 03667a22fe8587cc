"""A node of the prefix tree: encoded prompts, whose keys and values any number of children read.

window → cells → candidates: a child knows its parent, and through it everything it continues. Nothing is copied for a
child; ``part`` and ``leaves`` are views.
"""

from dataclasses import dataclass, field, replace

from jaxtyping import Float, Int
from torch import Tensor

from stdist.vision_llm.kernels.attention import Attention
from stdist.vision_llm.kernels.tree_attention import Segment, tree_attention


@dataclass(frozen=True)
class Prefix:
    """``sequences`` encoded prompts of as many tokens each.

    Attributes:
        keys, values: one ``[sequences, kv_heads, tokens, head_dim]`` a layer.
        last: final hidden state of each prompt's last token; it predicts a child's first token.
        position: M-RoPE position at which every child starts, whatever its siblings hold.
        parent: what these prompts continue; consecutive sequences share a parent.
    """

    keys: list[Float[Tensor, "sequences kv_heads tokens head_dim"]]
    values: list[Float[Tensor, "sequences kv_heads tokens head_dim"]]
    last: Float[Tensor, "sequences d"]
    position: Int[Tensor, "sequences"]
    parent: "Prefix | None" = None

    @property
    def sequences(self) -> int:
        return len(self.last)

    @property
    def families(self) -> tuple[int, ...]:
        """Sequences of each parent, parents of each grandparent, and so on up to the windows."""
        return (self.sequences // self.parent.sequences, *self.parent.families) if self.parent else ()

    def segments(self, layer: int) -> list[Segment]:
        """A layer's keys and values of this node and its ancestors, nearest first."""
        ancestors = self.parent.segments(layer) if self.parent else []
        return [Segment(self.keys[layer], self.values[layer]), *ancestors]

    def part(self, start: int, stop: int) -> "Prefix":
        """Sequences ``start`` to ``stop`` and what they continue: complete families, or a part of one."""
        parent = self.parent
        if parent:
            first, last = parents_of(start, stop, self.families[0])
            parent = parent.part(first, last)
        keys, values = [x[start:stop] for x in self.keys], [x[start:stop] for x in self.values]
        return Prefix(keys, values, self.last[start:stop], self.position[start:stop], parent)

    def with_tensors(self, tensors: list[Tensor], parent: "Prefix | None") -> "Prefix":
        """The same node with other keys, values and last states, in the order of ``tensors``."""
        layers = len(self.keys)
        keys, values = tensors[:layers], tensors[layers:-1]
        return replace(self, keys=keys, values=values, last=tensors[-1], parent=parent)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything a gradient can flow through."""
        return [*self.keys, *self.values, self.last]


def parents_of(start: int, stop: int, children: int) -> tuple[int, int]:
    """The range of parents of sequences ``start`` to ``stop``, where each parent has ``children`` of them."""
    first, last = start // children, -(-stop // children)
    assert last - first == 1 or (start % children == 0 and stop % children == 0), "families must stay together"
    return first, last


@dataclass
class Branching:
    """Passed down a decoder call as ``tree``: attends to the parent, and keeps keys and values for children to come."""

    attention: Attention
    parent: Prefix | None
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        # Gradient checkpointing comes here a second time, when the node has its keys: those are not kept alive.
        self.keys.setdefault(layer, key)
        self.values.setdefault(layer, value)
        ancestors = self.parent.segments(layer) if self.parent else []
        return tree_attention(self.attention, scale, query, Segment(key, value), ancestors)

    def prefix(self, hidden: Float[Tensor, "sequences tokens d"], position: Int[Tensor, " sequences"]) -> Prefix:
        """The node that this call encoded, from its final hidden states; its children start at ``position``."""
        layers = sorted(self.keys)
        keys, values = [self.keys[i] for i in layers], [self.values[i] for i in layers]
        return Prefix(keys, values, hidden[:, -1], position, self.parent)
