"""Continual learning (UrbanPG, Eq. 9–10): what changes from one period to the next, and what that does to old nodes."""

import copy
from collections.abc import Sequence

import torch

from stdist.errors import InputError
from stdist.nodes.learners import NodeLearners, nodes_of
from stdist.nodes.stage import WindowForecasts
from stdist.nodes.task import Task
from stdist.urbanpg.checkpoints import Model
from stdist.urbanpg.config import ContinualConfig, UrbanConfig
from stdist.urbanpg.model import UrbanPG

TITLE = "Periods: errors on each one's test days, the model of the period before and its own"
COLUMNS = ["period", "nodes", "new", "MAE of old nodes, before", "after", "MAE of new nodes", "MAE", "RMSE", "MAPE"]


def expanded(model: Model, task: Task, config: ContinualConfig, seed: int) -> UrbanPG:
    """A copy of ``model`` as the period ``task`` begins: backbone and old rows frozen unless the configuration trains
    them, and new rows for new nodes. Where this period is the first that tells weekdays apart, they begin alike."""
    assert isinstance(model, UrbanPG)
    known = model.prompts.spec.nodes
    torch.manual_seed(seed + known)
    backbone = copy.deepcopy(model.backbone).requires_grad_(config.train_backbone)
    if joined := task.nodes.shape[0] - known:
        prompts = model.prompts.expand(joined, train_old_rows=config.train_old_rows)
    else:
        prompts = copy.deepcopy(model.prompts)
        for rows in prompts.node_rows:
            rows.requires_grad_(config.train_old_rows)
    if task.holds_weeks and not prompts.weekdays:
        prompts.weekdays, prompts.spec = True, prompts.spec.model_copy(update={"weekdays": True})
        if prompts.spec.temporal:
            with torch.no_grad():  # until now every day had the first row
                prompts.day_of_week.copy_(prompts.day_of_week[0].clone())
    return UrbanPG(backbone, prompts)


def require_gradients(config: UrbanConfig, names: Sequence[str], tasks: Sequence[Task]) -> None:
    """Raises InputError where a stage on a frozen backbone has a learner none of whose weights gets a gradient: P_t
    and E_d are every learner's, a row of E_s is its own node's. Without p, or without q, E_d gets none (Eq. 4)."""
    model, continual, ranks = config.model, config.continual, config.nodes.ranks
    if config.recipe == "urbanpg-train" or (continual and continual.train_backbone):
        return
    if model.temporal or (model.spatial and model.p > 0 and model.q > 0):
        return
    first = 1 if continual else 0
    for name, task, before in zip(names[first:], tasks[first:], tasks, strict=False):
        old = before.nodes.shape[0] if continual and not continual.train_old_rows else 0
        if model.spatial and nodes_of(0, ranks, task.nodes.shape[0]).stop > old:
            continue
        alone = f" on the first of nodes.ranks {ranks}" if model.spatial and task.nodes.shape[0] > old else ""
        rows = "model.p or model.q is 0 and no node there is new" if model.spatial else "model.spatial is false"
        raise InputError(
            f"stage {name} trains nothing{alone}: the backbone is frozen, model.temporal is false, and {rows}; change "
            f"one of these{', or set continual.train_backbone' if continual else ''}"
        )


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
