"""Bodies of answers: JSON and CSV of some places of a forecast, none larger than ``MOST_NUMBERS`` allow."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Int, Shaped

from stdist.errors import InputError
from stdist.evaluation.forecast_tables import quantile_column, to_csv
from stdist.runs.places import ALL, nearest_names
from stdist.serving.city import CityForecast

MOST_PLACES, MOST_NUMBERS = 1000, 2_000_000
"""Places that a request may name, and numbers that an answer may have, some 20 MB."""
SEARCHED = 50_000
"""Places among which the nearest names are looked for: more take too long."""


class UnknownPlace(InputError):
    """A place that is not served."""


def find(city: CityForecast, places: str) -> Int[np.ndarray, " n"]:
    """Numbers of the places named, in the order of the store; raises UnknownPlace, and InputError for too many."""
    if places.strip() == ALL:
        return np.arange(len(city.ids))
    names = list(dict.fromkeys(name for part in places.split(",") if (name := part.strip())))
    if not 0 < len(names) <= MOST_PLACES:
        raise InputError(f"places names {len(names)} places; name 1 to {MOST_PLACES}, as places=ID,ID, or places={ALL}")
    for name in names:
        if name not in city.numbers:
            near = nearest_names(name[:100], list(city.numbers)) if len(city.numbers) <= SEARCHED else []
            said = f"; the nearest names are {', '.join(near)}" if near else ""
            raise UnknownPlace(f"place {name[:100]!r} is not served{said}")
    return np.sort([city.numbers[name] for name in names])


def require_size(numbers: int) -> None:
    if numbers > MOST_NUMBERS:
        raise InputError(f"the answer would have {numbers} numbers, {MOST_NUMBERS} are most; ask for fewer places")


def as_json(city: CityForecast, some: Int[np.ndarray, " n"], quantiles: bool, history: bool, **marks: Any) -> bytes:
    """The forecast of ``some`` places; ``marks``: more to say of all of it."""
    header, levels = city.header, city.header.levels if quantiles else ()
    quantities, steps = 1 + len(levels), header.shape[1]
    require_size(len(some) * (quantities * steps + history * len(city.history)))
    metadata = header.metadata
    contract = metadata.contract
    head = {
        "run": metadata.run,
        "checkpoint": metadata.checkpoint,
        "calibration": metadata.calibration,
        "city": contract.city,
        "channel": contract.channel,
        "units": contract.units,
        "store_digest": contract.store_digest,
        "origin": _utc(header.origins)[0],
        "origin_local": _clock(city.history_local[-1:])[0],
        "frames_absent_behind_it": city.of_next["frames_absent_behind_it"],
        "imputed": city.of_next["imputed"],
        **marks,
        "levels": list(levels),
        "target": _utc(header.targets[0]),
        "target_local": _clock(city.target_local),
    }
    values = np.ascontiguousarray(city.values[:quantities, :, some].transpose(0, 2, 1))
    columns: dict[str, Any] = {"id": city.ids[some], "forecast": values[0]}
    if levels:
        names = [quantile_column(level) for level in levels]
        columns["quantiles"] = pl.DataFrame(dict(zip(names, values[1:], strict=True))).to_struct("quantiles")
    if history:
        head |= {"history_time": _utc(city.history_times), "history_time_local": _clock(city.history_local)}
        columns["history"] = np.ascontiguousarray(city.history[:, some].T)
    rows = pl.DataFrame(columns).write_json()  # shortest decimals of float32; NaN becomes null
    return f'{json.dumps(head)[:-1]}, "places": {rows}}}'.encode()


def as_csv(city: CityForecast, some: Int[np.ndarray, " n"], quantiles: bool) -> bytes:
    """The table that ``stdist forecast --next --out NAME.csv`` writes of these places."""
    levels = city.header.levels if quantiles else ()
    values = city.values[: 1 + len(levels), None][..., some]
    require_size(values.size)
    return to_csv(replace(city.header, cell_ids=city.ids[some], levels=levels), values).encode()


def places_json(city: CityForecast) -> bytes:
    """Ids of all places, and where they lie, one list each."""
    require_size(len(city.ids) * (1 + len(city.location)))
    where = {name: pl.Series(values).fill_nan(None).to_list() for name, values in city.location.items()}
    kind = "grid" if "row" in where else "nodes"
    return json.dumps({"kind": kind, "places": len(city.ids), "id": city.ids.tolist(), **where}).encode()


def _utc(stamps: Shaped[np.ndarray, " n"]) -> list[str]:
    return [f"{stamp}Z" for stamp in _clock(stamps)]


def _clock(stamps: Shaped[np.ndarray, " n"]) -> list[str]:
    return stamps.astype("datetime64[s]").astype(str).tolist()
