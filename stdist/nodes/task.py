"""The data side of a run on nodes: its store, the windows of the three splits, and what the training days say."""

from dataclasses import dataclass
from datetime import date

import numpy as np

from stdist.config import DataConfig
from stdist.data import GridStore, NodeRange, Split, Statistics, Windows, open_store
from stdist.errors import InputError
from stdist.nodes.config import PeriodConfig

DAYS_PER_WEEK = 7


@dataclass(frozen=True, eq=False)
class Task:
    """Windows of one range of nodes; ``statistics`` of these nodes in the training span."""

    store: GridStore
    nodes: NodeRange
    train: Windows
    validation: Windows
    test: Windows
    statistics: Statistics

    @property
    def cadence(self) -> int:
        """In minutes."""
        return int(self.store.cadence / np.timedelta64(1, "m"))

    @property
    def holds_weeks(self) -> bool:
        """Whether the training days hold every weekday twice: from one alone a weekday and that day look the same."""
        return len(self.train.span) >= 2 * DAYS_PER_WEEK


def open_task(data: DataConfig) -> Task:
    """What ``urbanpg-train`` and ``few-shot`` read. Raises InputError for a store of a grid, a channel, node range,
    split or window that cannot be, nodes without a value, and data that is the same all over."""
    store = open_store(data.store)
    split = Split.parse(**data.split.model_dump(mode="json")) if data.split else store.default_split
    nodes = NodeRange.parse(data.region) if data.region else NodeRange(0, store.shape[0])
    return _open(store, data, split, nodes, "leave them out with data.region", ", or use recipe continual")


def open_period(data: DataConfig, period: PeriodConfig) -> Task:
    """What ``continual`` reads of one period: the nodes that are there by then. Raises InputError as ``open_task``."""

    def days(span: tuple[date, date]) -> list[str]:
        return [day.isoformat() for day in span]

    split = Split.parse(days(period.train), days(period.validation), days(period.test))
    return _open(open_store(data.store), data, split, NodeRange(0, period.nodes), "give the period fewer nodes")


def _open(
    store: GridStore, data: DataConfig, split: Split, nodes: NodeRange, without_them: str, or_else: str = ""
) -> Task:
    """``without_them``: how this recipe leaves nodes out; ``or_else``: what else serves where nodes join later."""
    if len(store.shape) != 1:
        raise InputError(f"{store.path} holds a grid; this recipe is for stores of nodes, recipe vision-llm for grids")
    nodes = nodes.within(store.shape)
    absent = np.flatnonzero(~store.inside[nodes.slices])
    if absent.size:
        raise InputError(
            f"{absent.size} of the {nodes.shape[0]} nodes of {store.path} have no value at all, first "
            f"{nodes.n0 + int(absent[0])} (id {store.cell_ids[nodes.n0 + absent[0]]}); {without_them}, "
            "or prepare the store without them"
        )
    fitted_on = split.named("train").fraction(data.fraction)
    if store.since is not None and (late := np.flatnonzero(store.since[nodes.slices] > fitted_on.first_day)).size:
        first = nodes.n0 + int(late[0])
        raise InputError(
            f"{late.size} nodes of {store.path} join after {fitted_on.first_day}, the first training day: node {first} "
            f"(id {store.cell_ids[first]}) on {store.since[first]}; train on later days, or {without_them}{or_else}"
        )

    def windows(name: str) -> Windows:
        span = fitted_on if name == "train" else split.named(name)
        whole = store.windows(
            span, data.history, data.horizon, channel=data.channel, history_inside=name == "train", name=name
        )
        return whole.of_region(nodes)

    task = Task(
        store,
        nodes,
        windows("train"),
        windows("validation"),
        windows("test"),
        store.statistics(data.channel, fitted_on, nodes),
    )
    if not task.statistics.std > 0:
        raise InputError(
            f"{store.path}: {data.channel} is {task.statistics.mean:g} all over {fitted_on}; train on other days"
        )
    return task
