"""Nodes of a store in one order: a range of a store of nodes, or the cells of a grid's region, row by row."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from stdist.data import NodeRange
from stdist.data.spans import AnyRegion
from stdist.data.stored_arrays import StoredArrays
from stdist.errors import InputError
from stdist.nodes.graphs import grid_graph


@dataclass(frozen=True, eq=False)
class NodeSet:
    """N nodes of ``store``. ``region``: the part of the store that holds them and is read; ``positions``: int64 [N],
    theirs in an array of the flattened region. Cells outside the city are no nodes."""

    store: StoredArrays
    region: AnyRegion
    positions: Int[np.ndarray, " N"]

    @classmethod
    def of(cls, store: StoredArrays, region: AnyRegion | None = None) -> "NodeSet":
        """All nodes of ``region``, of the whole store by default. Raises InputError where there is none."""
        region = store.region(region)
        positions = np.flatnonzero(store.inside[region.slices])
        if not len(positions):
            raise InputError(f"region {region} of {store.path} has no cell inside the city; choose another data.region")
        return cls(store, region, positions)

    def __len__(self) -> int:
        return len(self.positions)

    def part(self, nodes: slice) -> "NodeSet":
        """Some of them. Of a range no more is read than these."""
        if isinstance(self.region, NodeRange):
            first = self.region.n0
            return NodeSet.of(self.store, NodeRange(first + nodes.start, first + nodes.stop))
        return replace(self, positions=self.positions[nodes])

    def select(self, values: Shaped[Tensor, "B L *region"]) -> Shaped[Tensor, "B L N"]:
        """Values of these nodes from those of ``region``."""
        flat = values.flatten(2)
        return flat if flat.shape[2] == len(self) else flat[:, :, torch.from_numpy(self.positions)]

    @property
    def numbers(self) -> Int[np.ndarray, " N"]:
        """Positions in the flattened store."""
        everything = np.arange(self.store.inside.size).reshape(self.store.shape)
        return everything[self.region.slices].ravel()[self.positions]

    @property
    def adjacency(self) -> np.ndarray | Tensor | None:
        """Weights [N, N]: the store's own graph of these nodes if it has one; of a grid its neighbourhood graph."""
        if not isinstance(self.region, NodeRange):
            return grid_graph(self.store.inside[self.region.slices])
        graph, nodes = self.store.adjacency, self.region.slices[0]
        return None if graph is None else graph[nodes, nodes]
