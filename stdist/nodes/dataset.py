"""The data side of a run on nodes: its store, the windows of the three splits, and statistics of the training days."""

from dataclasses import dataclass

import numpy as np

from stdist.config import DataConfig
from stdist.config.base import SplitConfig
from stdist.data import GridStore, NodeRange, Split, open_store
from stdist.data.spans import AnyRegion
from stdist.errors import InputError
from stdist.nodes.config import PeriodConfig
from stdist.nodes.node_set import NodeSet
from stdist.runs.dataset import Dataset, open_windows, split_of, training_span

DAYS_PER_WEEK = 7


@dataclass(frozen=True, eq=False)
class NodeDataset(Dataset):
    """Windows of ``nodes``; ``statistics`` of their region in the training span."""

    nodes: NodeSet

    @property
    def cadence(self) -> int:
        """In minutes."""
        return int(self.store.cadence / np.timedelta64(1, "m"))

    @property
    def holds_weeks(self) -> bool:
        """True where the training days hold every weekday twice: in one alone a weekday and that day look the same."""
        start, stop = self.store.step_range(self.train.span)
        slots = self.store.local_slots[[start, stop - 1]]  # days of 23 hours are whole days too
        return bool(slots[1] + 1 - slots[0] >= 2 * DAYS_PER_WEEK * self.store.slots_per_day)

    @property
    def node_means(self) -> np.ndarray:
        """Each node's mean in the training days, float32 [N]."""
        return self.statistics.cell_mean.ravel()[self.nodes.positions]


def open_dataset(data: DataConfig) -> NodeDataset:
    """The data of one training. Raises InputError for a channel, region, split or window that cannot be, nodes without
    a value, and data that is the same all over."""
    store = open_store(data.store)
    split = split_of(data.split, store)
    return _open(
        store, data, split, store.region(data.region), "leave them out with data.region", ", or use recipe continual"
    )


def open_period(data: DataConfig, period: PeriodConfig) -> NodeDataset:
    """The data of one period: the nodes that are there by then. Raises InputError as ``open_dataset``, and for a grid,
    whose cells do not join one after the other."""

    store = open_store(data.store)
    split = split_of(SplitConfig(train=period.train, validation=period.validation, test=period.test), store)
    return _open(store, data, split, NodeRange(0, period.nodes), "give the period fewer nodes")


def _open(
    store: GridStore, data: DataConfig, split: Split, region: AnyRegion, without_them: str, or_else: str = ""
) -> NodeDataset:
    """``without_them``: how this recipe leaves nodes out; ``or_else``: what else serves where nodes join later."""
    region = region.within(store.shape)
    fitted_on = training_span(data, store, split)
    if isinstance(region, NodeRange):
        _require_there(store, region, fitted_on.first_day, without_them, or_else)

    dataset = NodeDataset(
        store,
        *open_windows(data, store, split, region, region),
        store.statistics(data.channel, fitted_on, region),
        NodeSet.of(store, region),
    )
    if not dataset.statistics.std > 0:
        raise InputError(
            f"{store.path}: {data.channel} is {dataset.statistics.mean:g} all over {fitted_on}; train on other days"
        )
    return dataset


def _require_there(
    store: GridStore, nodes: NodeRange, first_day: np.datetime64, without_them: str, or_else: str
) -> None:
    """Raises InputError where one of a store's nodes never has a value, or joins after ``first_day``."""
    absent = np.flatnonzero(~store.inside[nodes.slices])
    if absent.size:
        raise InputError(
            f"{absent.size} of the {nodes.shape[0]} nodes of {store.path} have no value at all, first "
            f"{nodes.n0 + int(absent[0])} (id {store.cell_ids[nodes.n0 + absent[0]]}); {without_them}, "
            "or prepare the store without them"
        )
    if store.since is not None and (late := np.flatnonzero(store.since[nodes.slices] > first_day)).size:
        first = nodes.n0 + int(late[0])
        raise InputError(
            f"{late.size} nodes of {store.path} join after {first_day}, the first training day: node {first} "
            f"(id {store.cell_ids[first]}) on {store.since[first]}; train on later days, or {without_them}{or_else}"
        )
