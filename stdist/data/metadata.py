"""The attributes of a grid store, read without any of its arrays."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stdist.data.integrity import ROOT_METADATA
from stdist.data.schema import FORMAT, FORMAT_VERSION, MINUTES_PER_DAY
from stdist.data.spans import DaySpan, Split
from stdist.errors import InputError


def read_attributes(root: Path) -> dict[str, Any]:
    """Returns the attributes of a finished store, reading nothing else. Raises InputError where there is none."""
    metadata = root / ROOT_METADATA
    if not metadata.is_file():
        what = "holds no zarr.json" if root.is_dir() else "is not a folder" if root.exists() else "does not exist"
        raise InputError(f"{root} is not a grid store: it {what}; make one with `stdist prepare`")
    try:
        attributes = json.loads(metadata.read_text())["attributes"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{root} is damaged: {ROOT_METADATA} is cut short; prepare or copy it again") from error
    if attributes.get("format") != FORMAT:
        raise InputError(f"{root} is a Zarr group but not a grid store; make one with `stdist prepare`")
    if attributes["format_version"] != FORMAT_VERSION:
        raise InputError(f"{root} has format version {attributes['format_version']}, this program reads 1")
    if "digest" not in attributes:
        raise InputError(f"{root} was never finished; remove it and prepare it again")
    return attributes


@dataclass(eq=False)
class StoreMetadata:
    """The attributes of the store in the folder ``path``, under their names and as numpy's types."""

    path: Path
    attributes: dict[str, Any]

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(self.attributes["channels"])

    @property
    def city(self) -> str:
        return self.attributes["city"]

    @property
    def units(self) -> str:
        return self.attributes["units"]

    @property
    def digest(self) -> str:
        """One sha256 over every file and attribute, as recorded; ``stdist check`` computes it again."""
        return self.attributes["digest"]

    @property
    def default_split(self) -> Split:
        return Split.parse(**self.attributes["split"])

    @property
    def cadence(self) -> np.timedelta64:
        return np.timedelta64(self.attributes["cadence_minutes"], "m")

    @property
    def slots_per_day(self) -> int:
        return MINUTES_PER_DAY // self.attributes["cadence_minutes"]

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the axes of space: ``("row", "col")`` or ``("node",)``."""
        return tuple(self.attributes.get("dims", ("row", "col")))

    @property
    def days(self) -> DaySpan:
        """All local days of the time axis."""
        return DaySpan(self.attributes["first_day"], self.attributes["last_day"])

    def date(self, day: int) -> np.datetime64:
        """The local day of that number, counted from the first."""
        return self.days.first_day + np.timedelta64(day, "D")

    @property
    def coverage(self) -> dict[str, dict[str, int]]:
        """Per channel, over present time steps and the cells that exist by then: ``missing`` (imputed) and
        ``true_zeros``."""
        return self.attributes["coverage"]

    def require_channel(self, channel: str) -> str:
        if channel not in self.channels:
            raise InputError(f"{self.path} has no channel {channel!r}; it has {', '.join(self.channels)}")
        return channel

    def step_range(self, span: DaySpan) -> tuple[int, int]:
        """Half-open time steps of a span; InputError where it leaves the store's days."""
        days = self.days
        if span.first_day < days.first_day or span.last_day > days.last_day:
            raise InputError(f"span {span} leaves the days of {self.path}, {days}; choose days within")
        start = int((span.first_day - days.first_day).astype(int)) * self.slots_per_day
        steps = len(span) * self.slots_per_day if span.steps is None else span.steps
        return start, start + steps
