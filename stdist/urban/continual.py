"""Continual learning (UrbanPG, Eq. 9–10): what changes from one period to the next, and what that does to old nodes."""

import copy

import torch

from stdist.config import ContinualConfig
from stdist.urban.checkpoints import Model
from stdist.urban.node_learners import NodeLearners
from stdist.urban.stage import WindowForecasts
from stdist.urban.task import Task
from stdist.urban.urbanpg import UrbanPG

TITLE = "Periods: errors on each one's test days, the model of the period before and its own"
COLUMNS = ["period", "nodes", "new", "MAE of old nodes, before", "after", "MAE of new nodes", "MAE", "RMSE", "MAPE"]


def expanded(model: Model, task: Task, config: ContinualConfig, seed: int) -> UrbanPG:
    """A copy of ``model`` as the period ``task`` begins: backbone and old rows frozen unless the configuration trains
    them, and new rows for new nodes."""
    assert isinstance(model, UrbanPG)
    known = model.prompts.spec.nodes
    torch.manual_seed(seed + known)
    backbone = copy.deepcopy(model.backbone).requires_grad_(config.train_backbone)
    if joined := task.nodes.shape[0] - known:
        return UrbanPG(backbone, model.prompts.expand(joined, train_old_rows=config.train_old_rows))
    prompts = copy.deepcopy(model.prompts)
    for rows in prompts.node_rows:
        rows.requires_grad_(config.train_old_rows)
    return UrbanPG(backbone, prompts)


def period_row(
    number: int, task: Task, before: Model | None, after: Model, batch_size: int, block_nodes: int | None
) -> list[str | float | None]:
    """The line of period ``number``, from 1, in the table of ``COLUMNS``; ``before``: the model of the one before.
    Errors are pooled over observed points."""

    def error(model: Model, first: int, stop: int, nodes: slice = slice(None)) -> dict[str, float]:
        windows = task.test.of_region(type(task.nodes)(first, stop))
        forecasts = WindowForecasts(model, windows, NodeLearners(stop - first), block_nodes)
        return forecasts.errors(batch_size, nodes).pooled()

    n0, n1 = task.nodes.n0, task.nodes.n1
    all_nodes = error(after, n0, n1)
    row: list[str | float | None] = [str(number), n1 - n0]
    if before is None:
        row += [n1 - n0, None, None, all_nodes["mae"]]
    else:
        assert isinstance(before, UrbanPG)
        old = before.prompts.spec.nodes
        mae = error(before, n0, n0 + old)["mae"], error(after, n0, n1, slice(old))["mae"]
        row += [n1 - n0 - old, *mae, error(after, n0, n1, slice(old, None))["mae"] if n1 - n0 > old else None]
    return [*row, all_nodes["mae"], all_nodes["rmse"], all_nodes["mape"]]
