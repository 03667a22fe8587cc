"""Contracts of forecasts and of scores: the words that make two error figures comparable."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from stdist.data.audit import Fitted
from stdist.errors import InputError

Schema = TypeVar("Schema", bound=BaseModel)

MASK_RULE = "observed points only; inputs may be imputed"


class ForecastContract(BaseModel, extra="forbid", frozen=True):
    """The promise of a forecaster; travels with its forecasts.

    ``region`` is (r0, r1, c0, c1) of a grid, half-open, row 0 in the south, or (n0, n1) of nodes; ``split`` covers
    the local days ``first_day`` to ``last_day`` (ISO dates, both included), windows' history too where
    ``history_inside``; ``S`` and ``K`` count frames. ``places``: the ids that were forecast, where not all of
    ``region`` were.
    """

    city: str
    channel: str
    units: str
    store_digest: str
    split: str
    first_day: str
    last_day: str
    history_inside: bool
    split_rule: str
    cadence_seconds: int
    S: int
    K: int
    region: tuple[int, int, int, int] | tuple[int, int]
    places: tuple[int, ...] | tuple[str, ...] | None = None


class EvaluationContract(ForecastContract):
    """The protocol that every error figure carries.

    ``windows`` were scored of the ``windows_in_split`` that the split holds; ``points`` are observed
    (window, step, cell or node) values; ``first_target`` and ``last_target`` are UTC stamps.
    """

    windows: int
    windows_in_split: int
    cells: int
    points: int
    first_target: str
    last_target: str
    horizons: list[int]
    mask_rule: str = MASK_RULE
    pooling: str = "pooled over all points, and mean of the horizons' figures"


class ForecastMetadata(BaseModel, extra="forbid", frozen=True):
    """The origin of forecasts: the run's name, its checkpoint, and the contract they were made under.

    ``fitted``: the forecaster's parts that were fitted on data, and on which days: forecasts of these are never scored.
    ``calibration``: the digest of what their quantiles were calibrated by. ``cost_ratio``: of ``forecast_for_cost``.
    """

    run: str
    checkpoint: str
    contract: ForecastContract
    fitted: tuple[Fitted, ...] = ()
    calibration: str | None = None
    cost_ratio: float | None = None


def parsed(schema: type[Schema], content: Any, what: str, remedy: str) -> Schema:
    """Returns ``content`` (of JSON) as a ``schema``. An InputError names ``what``, the first wrong key, ``remedy``."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{what}: '{key}': {first['msg']}; {remedy}") from error
