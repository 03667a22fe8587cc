"""The data of a run: its store, and the windows of its training, validation and test days."""

from dataclasses import dataclass

from stdist.config import DataConfig
from stdist.config.base import SplitConfig
from stdist.data import DaySpan, GridStore, Split, Statistics, Windows
from stdist.data.spans import AnyRegion


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
    be."""
    spans = {"train": training_span(data, store, split)} | {name: split.named(name) for name in ("validation", "test")}
    train, validation, test = (
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
    return train, validation, test
