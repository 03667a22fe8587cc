"""The leak audit: whatever is fitted on data remembers the days it was fitted on, and is not scored on them.

Fitted are a store's statistics, t_max and with it the clipping of frames, a policy's weights (few-shot training:
on the few days it saw), a graph drawn from the data, and baselines. Not fitted are numerals and their clamping.

The same data is told by its bytes (``data_digest``), so that a store prepared again with another split is still the
store that was trained on. Another store, a city never seen, is free to be scored: that is zero-shot.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from stdist.data.metadata import GROWN_FROM, StoreMetadata
from stdist.data.schema import observed_name
from stdist.data.spans import DaySpan
from stdist.errors import InputError


@dataclass(frozen=True)
class Fitted:
    """``what`` was fitted, for people, on the local days ``first_day`` … ``last_day`` (ISO) of the data ``data``."""

    what: str
    first_day: str
    last_day: str
    data: str

    @classmethod
    def on(cls, what: str, span: DaySpan, data: str) -> "Fitted":
        """``data``: the ``data_digest`` of what it was fitted on."""
        return cls(what, str(span.first_day), str(span.last_day), data)

    @property
    def span(self) -> DaySpan:
        return DaySpan.parse([self.first_day, self.last_day])


def data_digest(store: StoreMetadata, channel: str) -> str:
    """One sha256 over a channel's values and the times and places they belong to, whatever the split.

    Made of the recorded digests of files; reads none of them. A store that days were appended to keeps the one it had
    before: what was fitted on its days then was fitted on them.
    """
    if (grown := store.attributes.get(GROWN_FROM)) is not None:
        return grown["data"][channel]
    arrays = {channel, observed_name(channel), "time", "present", "cell_id", "node"}
    recorded = {name: entry["sha256"] for name, entry in store.attributes["files"].items()}
    chosen = {name: digest for name, digest in recorded.items() if name.split("/")[0] in arrays}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def leaks(fitted: Iterable[Fitted], evaluated: DaySpan, data: str) -> list[Fitted]:
    """Returns those of ``fitted`` that share a day with the span ``evaluated`` of the data ``data``."""
    return [
        item
        for item in fitted
        if item.data == data and item.span.first_day <= evaluated.last_day and evaluated.first_day <= item.span.last_day
    ]


def leak_line(leaked: list[Fitted], evaluated: DaySpan) -> str:
    """A line for people: what was fitted, on which days, and which days were to be scored."""
    spans = {str(item.span): [other.what for other in leaked if other.span == item.span] for item in leaked}
    fitted = "; ".join(f"{', '.join(names)} fitted on {span}" for span, names in spans.items())
    return f"{fitted} of this data, which shares days with {evaluated}"


def refuse_leaks(fitted: Iterable[Fitted], evaluated: DaySpan, data: str) -> None:
    """Raises InputError where something was fitted on days that are to be scored. There is no way around it."""
    if leaked := leaks(fitted, evaluated, data):
        raise InputError(f"leak: {leak_line(leaked, evaluated)}; score other days, or fit on other days")
