"""The data of a run: its store, and the windows of its training, validation and test days."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from stdist.config import DataConfig
from stdist.config.base import SplitConfig
from stdist.data import DaySpan, GridStore, Split, Statistics, Windows
from stdist.data.spans import AnyRegion
from stdist.errors import InputError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Windows of one store; ``statistics`` of the channel in the training days."""

    store: GridStore
    train: Windows
    validation: Windows
    test: Windows
    statistics: Statistics


def split_of(config: SplitConfig | None, store: GridStore) -> Split:
    """The configured days, the store's own where there are none."""
    return Split.parse(**config.model_dump(mode="json")) if config else store.default_split


def training_span(data: DataConfig, store: GridStore, split: Split) -> DaySpan:
    """The first ``data.fraction`` of the training days' frames."""
    return store.first_part(split.named("train"), data.fraction)


def open_windows(
    data: DataConfig, store: GridStore, split: Split, region: AnyRegion, history_region: AnyRegion
) -> tuple[Windows, Windows, Windows]:
    """Windows of the training, validation and test days. Raises InputError for days, a channel or sizes that cannot
    be, and for days without an observed target."""
    spans = {"train": training_span(data, store, split)} | {name: split.named(name) for name in ("validation", "test")}
    opened = tuple(
        store.windows(
            span,
            data.history,
            data.horizon,
            channel=data.channel,
            region=region,
            history_region=history_region,
            history_inside=name == "train",
            name=name,
        )
        for name, span in spans.items()
    )
    for windows in opened:
        require_observed(windows)
    train, validation, test = opened
    return train, validation, test


def require_observed(windows: Windows, indices: Int[np.ndarray, " n"] | None = None, *, positive: bool = False) -> None:
    """Raises InputError where no target of the windows number ``indices`` (all by default) was observed, so that there
    is nothing to learn from or to score; with ``positive`` also where none is above zero, so that an error has no mean
    to be divided by."""
    store, channel, region = windows.store, windows.channel, windows.region
    origins = windows.origins if indices is None else windows.origins[indices]
    targets = np.zeros(len(store.present), bool)
    for step in range(1, windows.K + 1):
        targets[origins + step] = True
    for start in range(0, len(targets), store.slots_per_day):
        chosen = targets[start : start + store.slots_per_day]
        if not chosen.any():
            continue
        day = start, start + len(chosen)
        seen = store.observed(channel, *day, region)[chosen]
        if positive:
            seen &= store.values(channel, *day, region)[chosen] > 0
        if seen.any():
            return
    of = "" if indices is None else f"the {len(indices)} that are scored of "
    raise InputError(
        f"{store.path}: no target of {of}the {len(windows)} {windows.span_name} windows, {windows.span}, was observed"
        f"{' above zero' if positive else ''} in channel {channel}, region {region}; choose other days in data.split"
    )
