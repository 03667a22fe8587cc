"""The evaluation contract: what is scored, and the one function that scores it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from stdist.data import DaySpan, GridStore, Region, Windows, open_store
from stdist.data.audit import data_digest, refuse_leaks
from stdist.data.spans import AnyRegion
from stdist.errors import InputError
from stdist.evaluation.contract import EvaluationContract, ForecastContract
from stdist.evaluation.forecasts import Forecasts, read_forecasts
from stdist.evaluation.metrics import ErrorState

WINDOWS_PER_READ = 256


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """Errors of one set of forecasts, with the contract they were scored under."""

    contract: EvaluationContract
    state: ErrorState

    def to_json(self) -> dict[str, Any]:
        """``contract``, and ``pooled``, ``mean_of_horizons`` and ``per_horizon`` errors."""
        return {"contract": self.contract.model_dump(mode="json"), **self.state.summary()}


def forecast_contract(windows: Windows) -> ForecastContract:
    """The contract of forecasts that are about to be made of ``windows``, or of some of them.

    Raises InputError for a store of nodes.
    """
    store, region = windows.store, windows.region
    if not isinstance(region, Region):
        raise InputError(f"{store.path} holds nodes; forecasts are kept and scored of grids only")
    inside = "targets and history" if windows.history_inside else "targets"
    return ForecastContract(
        city=store.city,
        channel=windows.channel,
        units=store.units,
        store_digest=store.digest,
        split=windows.span_name,
        first_day=str(windows.span.first_day),
        last_day=str(windows.span.last_day),
        history_inside=windows.history_inside,
        split_rule=f"every window start whose {inside} lie inside the local days, none across a gap",
        cadence_seconds=int(store.cadence / np.timedelta64(1, "s")),
        S=windows.S,
        K=windows.K,
        region=(region.r0, region.r1, region.c0, region.c1),
    )


def evaluate(forecasts: Forecasts | Path | str, store: GridStore | Path | str) -> EvaluationResult:
    """Score forecasts (or a file of them) against the store they were made on, observed points only.

    MAE, RMSE and NRMSE in the data's units (Vision-LLMs for Spatiotemporal Traffic Forecasting, Eq. 21-23),
    pooled and per horizon. Raises InputError where the forecasts were made on other data, reach past it,
    name cells or times it does not have, repeat a window, or leave the split they claim, and where their forecaster
    was fitted on the days to be scored.
    """
    forecasts = forecasts if isinstance(forecasts, Forecasts) else read_forecasts(forecasts)
    store = store if isinstance(store, GridStore) else open_store(Path(store))
    contract = forecasts.metadata.contract
    region = Region(*contract.region)
    origin_index = match_origins(forecasts, store)
    span = DaySpan.parse([contract.first_day, contract.last_day])
    refuse_leaks(forecasts.metadata.fitted, span, data_digest(store, contract.channel))
    split = store.windows(
        span,
        contract.S,
        contract.K,
        channel=contract.channel,
        region=region,
        history_inside=contract.history_inside,
    )
    strangers = ~np.isin(origin_index, split.origins)
    if strangers.any():
        stamp = _utc(forecasts.origins[strangers][0])
        raise InputError(
            f"{int(strangers.sum())} forecasts, first at origin {stamp}, are no windows of the split "
            f"'{contract.split}' ({contract.first_day} to {contract.last_day}) that they claim"
        )
    state = ErrorState.empty(contract.K)
    for start in range(0, len(origin_index), WINDOWS_PER_READ):
        part = slice(start, start + WINDOWS_PER_READ)
        truth, observed = read_targets(store, contract.channel, region, contract.K, origin_index[part])
        state = state.update(forecasts.values[part], truth, observed)
    steps = np.timedelta64(contract.cadence_seconds, "s")
    return EvaluationResult(
        EvaluationContract(
            **contract.model_dump(),
            windows=len(origin_index),
            windows_in_split=len(split),
            cells=int(forecasts.cell_ids.size),
            points=int(state.count.sum()),
            first_target=_utc(forecasts.origins.min() + steps),
            last_target=_utc(forecasts.origins.max() + contract.K * steps),
            horizons=list(range(1, contract.K + 1)),
        ),
        state,
    )


def match_origins(forecasts: Forecasts, store: GridStore) -> Int[np.ndarray, " N"]:
    """The store's frame index of each forecast's origin. Raises InputError as ``evaluate`` does."""
    contract = forecasts.metadata.contract
    if contract.store_digest != store.digest:
        raise InputError(
            f"forecasts were made on a store of digest {contract.store_digest} ({contract.city}), but "
            f"{store.path} has {store.digest} ({store.city}): score them on the store they were made on"
        )
    if contract.channel not in store.channels:
        raise InputError(f"forecasts are of channel '{contract.channel}', {store.path} has {', '.join(store.channels)}")
    foreign = ~np.isin(forecasts.cell_ids, store.cell_ids)
    if foreign.any():
        raise InputError(
            f"{int(foreign.sum())} forecast cells are not in {store.path}, first "
            f"{forecasts.cell_ids[foreign][0]}: score them on the store they were made on"
        )
    r0, r1, c0, c1 = contract.region
    if not np.array_equal(store.cell_ids[r0:r1, c0:c1], forecasts.cell_ids):
        raise InputError(f"the forecast cells are not those of region {r0}:{r1},{c0}:{c1} of {store.path}")
    if not len(forecasts.origins):
        raise InputError("the forecasts hold no window; there is nothing to score")
    index = np.searchsorted(store.times, forecasts.origins)
    last_target = forecasts.origins.max() + contract.K * np.timedelta64(contract.cadence_seconds, "s")
    if last_target > store.times[-1]:
        raise InputError(
            f"forecasts reach to {_utc(last_target)}, past the data of {store.path}, which ends at "
            f"{_utc(store.times[-1])}: there is no truth to score them by"
        )
    unknown = store.times[index] != forecasts.origins
    if unknown.any():
        raise InputError(f"origin {_utc(forecasts.origins[unknown][0])} is not a time of {store.path}")
    if len(np.unique(index)) != len(index):
        raise InputError("some origins appear more than once in the forecasts; a window counts once")
    return index


def read_targets(
    store: GridStore, channel: str, region: AnyRegion, K: int, origins: Int[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, "N K h w"], Bool[np.ndarray, "N K h w"]]:
    """The true values of the K frames after each origin (a frame index), and which of them were observed."""
    first, stop = int(origins.min()) + 1, int(origins.max()) + K + 1
    frames = origins[:, None] + np.arange(1, K + 1) - first
    values = store.values(channel, first, stop, region)
    observed = store.observed(channel, first, stop, region)
    return values[frames], observed[frames]


def _utc(stamp: np.datetime64) -> str:
    return f"{np.datetime_as_string(stamp, unit='m')}Z"
