"""The attributes of a grid store, read without any of its arrays."""

import json
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from stdist.data.integrity import ROOT_METADATA
from stdist.data.schema import FORMAT, FORMAT_VERSION, MINUTES_PER_DAY
from stdist.data.spans import DaySpan, Split
from stdist.errors import DamageError, InputError
from stdist.files import own_file
from stdist.zones import wall_clock

GROWN_FROM = "grown_from"
"""Attribute of a store that was appended to: ``digests`` of the store before each time, and by channel the first
``data`` digest of ``audit.data_digest``."""


def read_attributes(root: Path) -> dict[str, Any]:
    """Returns the attributes of a finished store, reading nothing else. Raises InputError where there is none, and
    DamageError where they are not JSON, or lack what every store has."""
    metadata = root / ROOT_METADATA
    if not metadata.is_file():
        what = "holds no zarr.json" if root.is_dir() else "is not a folder" if root.exists() else "does not exist"
        raise InputError(f"{root} is not a grid store: it {what}; make one with `stdist prepare`")
    with own_file(metadata, "prepare or copy the store again"):
        content = json.loads(metadata.read_text())
        attributes = content["attributes"] if content["node_type"] == "group" else {}
        kind, version = attributes.get("format"), attributes.get("format_version")
    if kind != FORMAT:
        raise InputError(f"{root} is a Zarr group but not a grid store; make one with `stdist prepare`")
    if version != FORMAT_VERSION:
        raise InputError(f"{root} has format version {version!r}, this program reads {FORMAT_VERSION}")
    if "digest" not in attributes:
        raise InputError(f"{root} was never finished; remove it and prepare it again")
    try:
        Attributes.model_validate(attributes)
    except (ValidationError, InputError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        key = ".".join(map(str, first["loc"])) or "its days"
        raise DamageError(f"{metadata} is damaged: {key}: {first['msg']}; prepare or copy the store again") from None
    return attributes


class _File(BaseModel):
    bytes: NonNegativeInt
    sha256: str


class _Fitted(BaseModel):
    mean: float
    std: float
    maximum: float
    count: PositiveInt
    span: tuple[date, date]


class _Coverage(BaseModel):
    missing: NonNegativeInt
    true_zeros: NonNegativeInt


class Attributes(BaseModel):
    """The attributes of a store that ``open_store`` relies on; the arrays' shapes follow from them."""

    city: str
    dims: tuple[Literal["row", "col", "node"], ...] = Field(("row", "col"), min_length=1, max_length=2)
    channels: tuple[str, ...] = Field(min_length=1)
    units: str
    cadence_minutes: int = Field(ge=1, le=MINUTES_PER_DAY)
    utc_offset_minutes: int = Field(ge=-MINUTES_PER_DAY, le=MINUTES_PER_DAY)
    timezone: str | None = None
    first_day: date
    last_day: date
    split: dict[Literal["train", "validation", "test"], tuple[date, date] | None]
    train_statistics: dict[str, _Fitted]
    coverage: dict[str, _Coverage]
    files: dict[str, _File]
    digest: str

    @model_validator(mode="after")
    def _days_and_names(self) -> Self:
        if MINUTES_PER_DAY % self.cadence_minutes or self.last_day < self.first_day:
            raise ValueError(f"days {self.first_day} to {self.last_day} every {self.cadence_minutes} min cannot be")
        if self.coverage.keys() != set(self.channels) or not self.train_statistics.keys() <= set(self.channels):
            raise ValueError("coverage or statistics are of other channels")
        Split.parse(**{name: span and [str(day) for day in span] for name, span in self.split.items()})
        return self


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
    def earlier_digests(self) -> list[str]:
        """Digests that the store had before days were appended to it, the first one first."""
        return self.attributes.get(GROWN_FROM, {}).get("digests", [])

    def is_or_was(self, digest: str | None) -> bool:
        """True for the store's digest, and for one that it had before days were appended to it."""
        return digest in (self.digest, *self.earlier_digests)

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
    def timezone(self) -> str | None:
        """IANA name of the zone whose wall clock is the store's; None where the clock is never changed."""
        return self.attributes.get("timezone")

    @property
    def axis_days(self) -> DaySpan:
        """All days of the time axis, of 24 hours each, by the store's offset from UTC: its shards."""
        return DaySpan(self.attributes["first_day"], self.attributes["last_day"])

    @cached_property
    def local_days(self) -> np.ndarray:
        """Local day of every time step, datetime64[D] [T], never falling: a day begins with its first midnight."""
        midnight = self.axis_days.first_day - np.timedelta64(self.attributes["utc_offset_minutes"], "m")
        utc = midnight + np.arange(len(self.axis_days) * self.slots_per_day) * self.cadence
        return np.maximum.accumulate(self.local(utc).astype("datetime64[D]"))

    def local(self, utc: np.ndarray) -> np.ndarray:
        """Stamps of the store's clock, datetime64[ns], of those of UTC."""
        if self.timezone is not None:
            return wall_clock(utc, self.timezone)
        return utc + np.timedelta64(self.attributes["utc_offset_minutes"], "m")

    @property
    def coverage(self) -> dict[str, dict[str, int]]:
        """Per channel, over present time steps and the cells that exist by then: ``missing`` (imputed) and
        ``true_zeros``."""
        return self.attributes["coverage"]

    @property
    def unseen(self) -> dict[str, dict[str, int]]:
        """Per channel, cells ``never_observed``, and ``never_in_training`` though validation or test score them; empty
        where a store of an earlier version does not say."""
        return self.attributes.get("unseen", {})

    def require_channel(self, channel: str) -> str:
        if channel not in self.channels:
            raise InputError(f"{self.path} has no channel {channel!r}; it has {', '.join(self.channels)}")
        return channel
