"""Continual learning (UrbanPG, Eq. 9–10): the model of the next period, and errors of old and new nodes."""

import copy
from collections.abc import Sequence

import torch

from stdist.data import NodeRange
from stdist.errors import InputError
from stdist.nodes.dataset import NodeDataset
from stdist.nodes.interface import Forecaster
from stdist.nodes.learners import NodeLearners, nodes_of
from stdist.nodes.stage import WindowForecasts
from stdist.scalars import defined
from stdist.urbanpg.config import ContinualConfig, UrbanConfig
from stdist.urbanpg.model import UrbanPG
from stdist.urbanpg.models import UrbanPGModelConfig

TITLE = "Periods: errors on each one's test days, the model of the period before and its own"
COLUMNS = ["period", "nodes", "new", "MAE of old nodes, before", "after", "MAE of new nodes", "MAE", "RMSE", "MAPE"]


def expanded(model: Forecaster, dataset: NodeDataset, config: ContinualConfig, seed: int) -> UrbanPG:
    """A copy of ``model`` as the period of ``dataset`` begins: backbone and old nodes frozen unless the configuration
    trains them, new nodes at the end. Where this period is the first that tells weekdays apart, those begin alike."""
    assert isinstance(model, UrbanPG)
    old_nodes = model.nodes
    torch.manual_seed(seed + old_nodes)
    backbone = copy.deepcopy(model.backbone).requires_grad_(config.train_backbone)
    if joined := len(dataset.nodes) - old_nodes:
        prompts = model.prompts.expand(joined, train_old_rows=config.train_old_rows)
    else:
        prompts = copy.deepcopy(model.prompts)
        for rows in prompts.node_rows:
            rows.requires_grad_(config.train_old_rows)
    if dataset.holds_weeks and not prompts.weekdays:
        prompts.weekdays, prompts.spec = True, prompts.spec.model_copy(update={"weekdays": True})
        if prompts.spec.temporal:
            with torch.no_grad():  # until now every day had the first row
                prompts.day_of_week.copy_(prompts.day_of_week[0].clone())
    grown = UrbanPG(backbone, prompts)
    grown.block_nodes = model.block_nodes
    return grown


def require_gradients(config: UrbanConfig, names: Sequence[str], datasets: Sequence[NodeDataset]) -> None:
    """Raises InputError where a stage on a frozen backbone has a learner none of whose weights gets a gradient: P_t
    and E_d are every learner's, a row of E_s is its own node's. Without p, or without q, E_d gets none (Eq. 4)."""
    model, continual, ranks = config.model, config.continual, config.nodes.ranks
    if config.recipe == "urbanpg-train" or (continual and continual.train_backbone):
        return
    assert isinstance(model, UrbanPGModelConfig)
    if model.temporal or (model.spatial and model.p > 0 and model.q > 0):
        return
    first = 1 if continual else 0
    for name, dataset, before in zip(names[first:], datasets[first:], datasets, strict=False):
        nodes, old = len(dataset.nodes), len(before.nodes) if continual and not continual.train_old_rows else 0
        if model.spatial and nodes_of(0, ranks, nodes).stop > old:
            continue
        alone = f" on the first of nodes.ranks {ranks}" if model.spatial and nodes > old else ""
        rows = "model.p or model.q is 0 and no node there is new" if model.spatial else "model.spatial is false"
        raise InputError(
            f"stage {name} trains nothing{alone}: the backbone is frozen, model.temporal is false, and {rows}; change "
            f"one of these{', or set continual.train_backbone' if continual else ''}"
        )


def period_row(
    number: int, dataset: NodeDataset, before: Forecaster | None, after: Forecaster, batch_size: int
) -> list[str | float | None]:
    """The line of period ``number``, from 1, in the table of ``COLUMNS``; ``before``: the model of the one before.
    Errors are pooled over observed points."""

    def error(model: Forecaster, count: int, scored: slice = slice(None)) -> dict[str, float | None]:
        windows = dataset.test.of_region(NodeRange(0, count))
        return defined(WindowForecasts(model, windows, NodeLearners(count)).errors(batch_size, scored).pooled())

    nodes = len(dataset.nodes)
    all_nodes = error(after, nodes)
    row: list[str | float | None] = [str(number), nodes]
    if before is None or before.nodes is None:
        row += [nodes, None, None, all_nodes["mae"]]
    else:
        old = before.nodes
        mae = error(before, old)["mae"], error(after, nodes, slice(old))["mae"]
        row += [nodes - old, *mae, error(after, nodes, slice(old, None))["mae"] if nodes > old else None]
    return [*row, all_nodes["mae"], all_nodes["rmse"], all_nodes["mape"]]
