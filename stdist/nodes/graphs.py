"""Graphs as sparse matrices, and the operators that graph convolutions are made of: an edge costs what it costs, and
nothing here is [N, N] in memory. All take and give coalesced COO tensors [N, N], weights from row to column."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stdist.errors import InputError


def sparse_graph(weights: np.ndarray | Tensor) -> Float[Tensor, "N N"]:
    """``weights`` [N, N], dense or sparse. Raises InputError where they are not square, negative or not finite."""
    graph = torch.as_tensor(weights)
    if graph.ndim != 2 or graph.shape[0] != graph.shape[1]:
        raise InputError(f"the graph is {list(graph.shape)}; give weights [N, N], from node (row) to node (column)")
    graph = graph.to_sparse_coo().coalesce().float()
    if not (graph.values() >= 0).all() or graph.values().isinf().any():
        raise InputError("the graph has a weight that is negative or not finite; 0 means no edge")
    return graph


def grid_graph(inside: Bool[np.ndarray, "h w"]) -> Float[Tensor, "N N"]:
    """The neighbourhood graph of a grid's N cells that are ``inside``, row by row: weight 1 between cells that share a
    side."""
    number = np.full(inside.shape, -1)
    number[inside] = np.arange(inside.sum())
    neighbours = (number[1:], number[:-1]), (number[:, 1:], number[:, :-1])
    pairs = np.concatenate([np.stack([one.ravel(), other.ravel()]) for one, other in neighbours], 1)
    pairs = pairs[:, (pairs >= 0).all(0)]
    edges = torch.from_numpy(np.concatenate([pairs, pairs[::-1]], 1))
    nodes = int(inside.sum())
    return torch.sparse_coo_tensor(edges, torch.ones(edges.shape[1]), (nodes, nodes), check_invariants=False).coalesce()


def matrix(edges: Tensor, weights: Tensor, nodes: int) -> Float[Tensor, "N N"]:
    """A sparse matrix of edges int64 [2, E], sorted by row and column and each there once, and their weights [E]."""
    return torch.sparse_coo_tensor(edges, weights, (nodes, nodes), is_coalesced=True, check_invariants=False)


def transition(graph: Float[Tensor, "N N"]) -> Float[Tensor, "N N"]:
    """P = D⁻¹W: the weights a random walk leaves each node with; none where there is no edge."""
    edges, weights = graph.indices(), graph.values()
    degree = weights.new_zeros(len(graph)).index_add(0, edges[0], weights)
    return matrix(edges, weights / degree[edges[0]].clamp_min(torch.finfo(weights.dtype).tiny), len(graph))


def scaled_laplacian(graph: Float[Tensor, "N N"]) -> Float[Tensor, "N N"]:
    """L̃ = 2L / λ_max − I with L = I − D^(−1/2) W D^(−1/2) and λ_max = 2, no normalised Laplacian's being larger:
    −D^(−1/2) W D^(−1/2). W is made symmetric by the larger weight of each pair, and loses the edges of nodes to
    themselves, as in the authors' weights."""
    nodes, (rows, columns) = len(graph), graph.indices()
    other = rows != columns
    rows, columns, values = rows[other], columns[other], graph.values()[other]
    pair, place = torch.unique(torch.cat([rows * nodes + columns, columns * nodes + rows]), return_inverse=True)
    weights = values.new_zeros(len(pair)).scatter_reduce(0, place, values.repeat(2), "amax")
    edges = torch.stack([pair // nodes, pair % nodes])
    degree = weights.new_zeros(nodes).index_add(0, edges[0], weights)
    return matrix(edges, -weights * (degree[edges[0]] * degree[edges[1]]).rsqrt(), nodes)
