"""The forecast of all places of a run, made once for each state of the store and of the run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from stdist.data.integrity import ROOT_METADATA, Identity, identity
from stdist.data.next_window import NextWindow
from stdist.data.stored_arrays import StoredArrays
from stdist.errors import InputError
from stdist.evaluation import ForecastHeader
from stdist.runs.calibration_file import CALIBRATION
from stdist.runs.forecast_request import ForecastRequest
from stdist.runs.forecasting import Sweep, forecast_in_memory, local_targets, of_next, sweep_with
from stdist.runs.recipes import read_run_config, recipe_of
from stdist.training.checkpoint import StageCheckpoints

TRIES = 5
"""Times that a forecast is begun anew because the store or the run changed meanwhile."""


class State(NamedTuple):
    """Tells a store and a run from what they become; cheap to look at."""

    store: Identity
    calibration: Identity
    training: dict[str, Any] | None


@dataclass(frozen=True, eq=False)
class CityForecast:
    """The next K steps of P places, all of one ``state``, and the last S frames before them.

    ``values`` [quantities, K, P]: the point forecast, then the quantiles of ``header.levels``. ``history`` [S, P]: NaN
    where nothing was observed. ``of_next``: what it rests on (:func:`stdist.runs.forecasting.of_next`). ``location``:
    of each place the row and column ids of a grid, degrees where they are known.
    """

    state: State
    header: ForecastHeader
    ids: Shaped[np.ndarray, " P"]
    values: Float[np.ndarray, "quantities K P"]
    history: Float[np.ndarray, "S P"]
    target_local: Shaped[np.ndarray, " K"]
    history_times: Shaped[np.ndarray, " S"]
    history_local: Shaped[np.ndarray, " S"]
    of_next: dict[str, Any]
    location: Mapping[str, np.ndarray]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The places' numbers by their ids, written out."""
        return {str(place): number for number, place in enumerate(self.ids.tolist())}

    @property
    def origin(self) -> np.datetime64:
        """UTC of the last frame that was looked at."""
        return self.header.origins[0]


class CityForecaster:
    """Forecasts of ``request``, the next steps of some places by a finished run. The model stays loaded, while the run
    is what it was. Raises InputError as ``stdist forecast --next`` does."""

    def __init__(self, request: ForecastRequest, log: Callable[[str], None]) -> None:
        self._request, self._log = request, log
        self._config = read_run_config(request.run_dir)
        self._recipe = recipe_of(self._config)
        self._last_stage = self._recipe.stages(self._config)[-1]
        self._loaded: tuple[State, Sweep] | None = None

    def state(self) -> State:
        """The store and the run as they are now."""
        run = self._request.run_dir
        checkpoints = StageCheckpoints(run / "checkpoints" / self._last_stage)
        return State(identity(self._request.store / ROOT_METADATA), identity(run / CALIBRATION), checkpoints.finished)

    def make(self) -> CityForecast:
        """All of it is of one state: what is read of a store is compared with the digests that it had when it was
        opened. Where days are appended meanwhile it begins anew."""
        for _ in range(TRIES - 1):
            state = self.state()
            try:
                return self._make(state)
            except (InputError, OSError):
                if self.state() == state:
                    raise
        return self._make(self.state())

    def _make(self, state: State) -> CityForecast:
        if self._loaded is not None and self._loaded[0][1:] == state[1:]:
            old = self._loaded[1]
            sweep = sweep_with(self._config, old.predictor, old.checkpoint, old.summary, self._request, self._log)
        else:
            self._loaded = None  # not two models at a time
            sweep = self._recipe.open_sweep(self._config, self._request, self._log)
        self._loaded = state, sweep
        header, values = forecast_in_memory(self._config, sweep)
        window = sweep.windows
        assert isinstance(window, NextWindow)
        store, region = window.store, window.region
        served = np.flatnonzero(np.isfinite(values[0, 0, 0]).ravel())
        frames = slice(window.origin + 1 - window.S, window.origin + 1)
        history = store.values(window.channel, frames.start, frames.stop, region)
        observed = store.observed(window.channel, frames.start, frames.stop, region)
        return CityForecast(
            state=state,
            header=header,
            ids=header.cell_ids.ravel()[served],
            values=values.reshape(header.quantities, window.K, -1)[:, :, served],
            history=np.where(observed, history, np.float32(np.nan)).reshape(window.S, -1)[:, served],
            target_local=local_targets(window)[0],
            history_times=store.times[frames],
            history_local=store.local_times[frames],
            of_next=of_next(window),
            location=_location(store, region.slices, served),
        )


def _location(store: StoredArrays, slices: tuple[slice, ...], served: Int[np.ndarray, " P"]) -> dict[str, np.ndarray]:
    dataset, shape = store.dataset, store.shape
    found: dict[str, np.ndarray] = {}
    if len(shape) == 2:
        axes = np.meshgrid(dataset["row"].values, dataset["col"].values, indexing="ij")
        found = {"row": axes[0], "col": axes[1]}
    for name in ("latitude", "longitude"):
        if name in dataset.variables:
            found[name] = dataset[name].values
    return {name: values[slices].ravel()[served] for name, values in found.items()}
