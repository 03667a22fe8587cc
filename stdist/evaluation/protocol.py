"""The evaluation contract, and the one function that scores forecasts by it."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from stdist.data import DaySpan, GridStore, Windows, open_store
from stdist.data.audit import data_digest, refuse_leaks
from stdist.data.spans import AnyRegion
from stdist.errors import InputError
from stdist.evaluation.contract import EvaluationContract, ForecastContract
from stdist.evaluation.forecast_header import ForecastHeader
from stdist.evaluation.forecasts import open_forecasts
from stdist.evaluation.metrics import ErrorState
from stdist.evaluation.quantile_scores import QuantileErrors


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """Errors of one set of forecasts, with the contract they were scored under."""

    contract: EvaluationContract
    state: ErrorState
    quantiles: QuantileErrors | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns ``contract``, and ``pooled``, ``mean_of_horizons`` and ``per_horizon`` errors; ``quantiles`` where
        the forecasts have some (``QuantileErrors.summary``)."""
        scores = {"contract": self.contract.model_dump(mode="json"), **self.state.summary()}
        return scores if self.quantiles is None else scores | {"quantiles": self.quantiles.summary()}


def forecast_contract(windows: Windows) -> ForecastContract:
    """The contract of forecasts that are about to be made of ``windows``, or of some of them."""
    store = windows.store
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
        region=astuple(windows.region),
    )


def evaluate(forecasts: Path | str, store: GridStore | Path | str) -> EvaluationResult:
    """Scores a file of forecasts against the store they were made on, observed points only.

    MAE, RMSE, MAPE and NRMSE in the data's units (Vision-LLMs for Spatiotemporal Traffic Forecasting, Eq. 21-23),
    pooled and per horizon. The file is read block by block (``ForecastHeader.blocks``), and the truth through the
    store's ``frame_cache``: neither the number of windows nor that of cells decides what is in memory. Raises
    InputError where the forecasts were made on other data, reach past it, name cells or times it does not have,
    repeat a window, or leave the split they claim, and where their forecaster was fitted on the days to be scored.
    """
    source = open_forecasts(forecasts)
    store = store if isinstance(store, GridStore) else open_store(Path(store))
    header = source.header
    contract = header.metadata.contract
    split, origins = match_windows(header, store)
    refuse_leaks(header.metadata.fitted, split.span, data_digest(store, contract.channel))
    state = ErrorState.empty(contract.K)
    quantiles = QuantileErrors.empty(header.levels, contract.K, header.cell_ids.size) if header.levels else None
    numbers = np.arange(header.cell_ids.size).reshape(header.cell_ids.shape)
    for windows, tile in header.blocks():
        first = header.origins[windows][0]
        values, *of_levels = source.read(windows, tile, quantiles=True)
        truth, observed = read_targets(split, tile, origins[windows])
        cells = header.place(windows, tile)[2:]
        observed &= header.asked[cells]
        try:
            state += ErrorState.of(values, truth, observed)
            if quantiles is not None:
                hours = local_hours(store, origins[windows], contract.K)
                quantiles = quantiles.add(np.stack(of_levels), truth, observed, hours, numbers[cells])
        except InputError as error:
            raise InputError(f"windows from origin {_utc(first)} on, cells {tile}: {error}") from error
    if not state.count.any():
        raise InputError(
            f"{store.path}: no value that these forecasts are of was observed, from {_utc(header.origins.min())} on; "
            "there is nothing to score, forecast other days"
        )
    steps = np.timedelta64(contract.cadence_seconds, "s")
    return EvaluationResult(
        EvaluationContract(
            **contract.model_dump(),
            windows=len(origins),
            windows_in_split=len(split),
            cells=int(header.asked.sum()),
            points=int(state.count.sum()),
            first_target=_utc(header.origins.min() + steps),
            last_target=_utc(header.origins.max() + contract.K * steps),
            horizons=list(range(1, contract.K + 1)),
        ),
        state,
        quantiles,
    )


def local_hours(store: GridStore, origins: Int[np.ndarray, " N"], K: int) -> Int[np.ndarray, "N K"]:
    """The hour of the city's day of each target of the windows with these origins (frame indices)."""
    local = store.local_times[origins[:, None] + np.arange(1, K + 1)]
    return ((local - local.astype("datetime64[D]")) // np.timedelta64(1, "h")).astype(np.int64)


def match_windows(header: ForecastHeader, store: GridStore) -> tuple[Windows, Int[np.ndarray, " N"]]:
    """Returns the windows that the forecasts claim to be of, and the store's frame index of each forecast's origin.

    Raises InputError as ``evaluate`` does.
    """
    contract = header.metadata.contract
    if not store.is_or_was(contract.store_digest):
        raise InputError(
            f"forecasts were made on a store of digest {contract.store_digest} ({contract.city}), but "
            f"{store.path} has {store.digest} ({store.city}): score them on the store they were made on"
        )
    if contract.channel not in store.channels:
        raise InputError(f"forecasts are of channel '{contract.channel}', {store.path} has {', '.join(store.channels)}")
    foreign = ~np.isin(header.cell_ids, store.cell_ids)
    if foreign.any():
        raise InputError(
            f"{int(foreign.sum())} forecast cells are not in {store.path}, first "
            f"{header.cell_ids[foreign][0]}: score them on the store they were made on"
        )
    if not np.array_equal(store.cell_ids[store.region(header.region).slices], header.cell_ids):
        raise InputError(f"the forecast cells are not those of region {header.region} of {store.path}")
    if not len(header.origins):
        raise InputError("the forecasts hold no window; there is nothing to score")
    index = np.searchsorted(store.times, header.origins)
    last_target = header.origins.max() + contract.K * np.timedelta64(contract.cadence_seconds, "s")
    if last_target > store.times[-1]:
        raise InputError(
            f"forecasts reach to {_utc(last_target)}, past the data of {store.path}, which ends at "
            f"{_utc(store.times[-1])}: there is no truth to score them by"
        )
    off_clock = store.times[index] != header.origins
    if off_clock.any():
        raise InputError(f"origin {_utc(header.origins[off_clock][0])} is not a time of {store.path}")
    if len(np.unique(index)) != len(index):
        raise InputError("some origins appear more than once in the forecasts; a window counts once")
    split = store.windows(
        DaySpan.parse([contract.first_day, contract.last_day]),
        contract.S,
        contract.K,
        channel=contract.channel,
        region=header.region,
        history_inside=contract.history_inside,
    )
    outside = ~np.isin(index, split.origins)
    if outside.any():
        stamp = _utc(header.origins[outside][0])
        raise InputError(
            f"{int(outside.sum())} forecasts, first at origin {stamp}, are no windows of the split "
            f"'{contract.split}' ({contract.first_day} to {contract.last_day}) that they claim"
        )
    return split, index


def read_targets(
    windows: Windows, tile: AnyRegion, origins: Int[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, "N K *cells"], Bool[np.ndarray, "N K *cells"]]:
    """Returns the true values of the K frames after each origin (a frame index), and True where one was observed."""
    targets = replace(windows, S=1, region=tile, history_region=tile)  # the truth needs no history
    batch = targets.read(np.searchsorted(targets.origins, origins))
    return batch.target, batch.target_observed


def _utc(stamp: np.datetime64) -> str:
    return f"{np.datetime_as_string(stamp, unit='m')}Z"
