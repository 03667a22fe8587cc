"""t-SNE of the prompts of a city, as in UrbanPG's case study (Fig. 6): for the run's report."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from torch import Tensor

from stdist.evaluation import Embeddings, Projection
from stdist.urbanpg.prompts import ContextPrompts

PERPLEXITY = 30.0
NODES = 5000
"""Nodes that are projected; of a larger city so many are drawn."""
FEWEST = 3
WEEKDAYS = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]


def project_embeddings(prompts: ContextPrompts, node_mean: Float[np.ndarray, " N"], seed: int) -> Embeddings:
    """E_tod coloured by the hour, E_dow by the weekday and E_s by each node's mean, in two dimensions.

    ``node_mean``: of the training span, in the data's units; NaN where a node has no value there.
    The same arguments give the same points on the same machine. Embeddings that the prompts do not have, and those of
    fewer than ``FEWEST`` rows or dimensions, are left out.
    """
    spec, caption = prompts.spec, f"t-SNE of the prompts of {prompts.spec.scenario}"
    embeddings: list[tuple[str, Tensor, np.ndarray, dict[str, Any]]] = []
    if spec.temporal:
        hours = np.arange(spec.slots) * spec.cadence / 60
        embeddings.append(("Time of day", prompts.time_of_day, hours, {"quantity": "hour", "cyclic": True}))
    if spec.temporal and spec.weekdays:
        days = {"quantity": "weekday", "cyclic": True, "names": WEEKDAYS}
        embeddings.append(("Day of week", prompts.day_of_week, np.arange(7), days))
    if spec.spatial:
        rows, means = torch.cat(list(prompts.node_rows)), node_mean
        if len(rows) > NODES:
            chosen = np.sort(np.random.default_rng(seed).choice(len(rows), NODES, replace=False))
            rows, means = rows[torch.from_numpy(chosen)], means[chosen]
            caption += f"; {NODES:,} of {spec.nodes:,} nodes, drawn at random"
        embeddings.append(("Nodes", rows, means, {"quantity": "mean in the training days"}))
    projections = [
        Projection(title=title, points=_in_plane(rows, seed).tolist(), values=values.tolist(), **rest)
        for title, rows, values, rest in embeddings
        if min(rows.shape) >= FEWEST
    ]
    return Embeddings(projections=projections, caption=f"{caption}; what lies close is alike, axes mean nothing")


def _in_plane(rows: Float[Tensor, "n d"], seed: int) -> Float[np.ndarray, "n 2"]:
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    with threadpool_limits(1):  # sums of several threads come out in any order, and t-SNE magnifies that
        points = TSNE(perplexity=perplexity, random_state=seed).fit_transform(rows.detach().float().cpu().numpy())
    return np.round(points.astype(np.float64), 4)
