"""A trained policy as the forecaster of a run: ``stdist forecast`` and a run's own test forecasts."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from jaxtyping import Float, Int

from stdist.data import GridStore, Region, Windows
from stdist.data.audit import Fitted, data_digest, leaks
from stdist.data.spans import AnyRegion
from stdist.errors import InputError
from stdist.evaluation import Chunk, ChunkGrid
from stdist.evaluation.forecast_header import QUANTILES
from stdist.evaluation.levels import LEVELS
from stdist.runs.forecast_request import ForecastRequest
from stdist.runs.forecasting import Predictor
from stdist.scalars import figure
from stdist.vision_llm.config import VisionLLMConfig
from stdist.vision_llm.dataset import T_MAX, cadence_minutes, first_cell
from stdist.vision_llm.numeral_range import find_unwritable
from stdist.vision_llm.policy.city_windows import CityWindows
from stdist.vision_llm.policy.frames import clipped, pixels_per_cell
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.forecaster import candidates_per_cell, forecast_pieces, plan_pieces, summarise


class PolicyPredictor(Predictor):
    """``policy`` with the decoding of ``config``; also for another city's grid or another channel."""

    def __init__(self, policy: PolicyModel, config: VisionLLMConfig):
        self.policy, self.config, self.fitted = policy, config, policy.spec.fitted
        self._trained = policy.spec
        self.num_generations = candidates_per_cell(config.forecast)
        self.levels = QUANTILES if self.num_generations > 1 else ()
        self.own_levels = LEVELS if config.forecast.decoding == "direct" else ()
        self.clamp = config.numerals.out_of_range == "clamp"
        self.settings = {
            "decoding": config.forecast.decoding,
            "num_generations": self.num_generations,
            "seed": config.seed,
            "out_of_range": config.numerals.out_of_range,
        }

    def regions(
        self, store: GridStore, request: ForecastRequest, log: Callable[[str], None]
    ) -> tuple[AnyRegion, AnyRegion]:
        """The cells asked for, the run's own by default, seen in the whole grid; points the policy at the store."""
        region, grid = request.region or self.config.data.region, store.region()
        channel = store.require_channel(request.channel or self.config.data.channel)
        self.policy.set_task(self._trained)  # whatever it forecast before
        retarget(self.policy, store, channel)
        return (store.region(Region.parse(region)) if region else grid), grid

    def check(self, windows: Windows) -> list[str]:
        notes = []
        if (fitted := fit_frames(self.policy, windows)) is not None:
            assert self.policy.spec.frames is not None
            t_max = self.policy.spec.frames.t_max
            self.settings = {**self.settings, "t_max": t_max}
            self.fitted = (*(item for item in self.fitted if item.what != T_MAX), fitted)
            notes.append(f"t_max of the frames: {figure(t_max)}, of this data's training days {fitted.span}")
        clamped = find_unwritable([windows], self.policy.vocabulary, self.clamp)
        return [*notes, clamped] if clamped else notes

    def grid(self, windows: Windows) -> tuple[ChunkGrid, Int[np.ndarray, " cells"]]:
        cells = self._city(windows).cells
        return plan_pieces(len(windows), len(cells), self.config.forecast.windows_per_batch), cells

    def predict(
        self, windows: Windows, chunks: Iterable[Chunk]
    ) -> Iterator[tuple[Chunk, Float[np.ndarray, "quantities windows K cells"], dict[str, int]]]:
        """Counts values ``clipped``: drawn as white in the windows' frames because they exceed t_max."""
        city, encoder = self._city(windows), self.policy.encoder
        for chunk, batch, values in forecast_pieces(
            self.policy,
            city,
            np.arange(len(city)),
            chunks,
            self.config.forecast.decoding,
            self.num_generations,
            self.config.seed,
            self.levels if self.own_levels else (),
        ):
            first_of_windows = chunk.cells.start == 0
            white = clipped(batch.grids.numpy(), encoder.t_max) if encoder and first_of_windows else 0
            quantities = values.transpose(2, 0, 3, 1) if self.own_levels else summarise(values)
            yield chunk, quantities, {"clipped": white}

    def _city(self, windows: Windows) -> CityWindows:
        city = CityWindows(self.policy, windows, self.clamp)
        city.cells = self.wanted(city.cells)
        return city

    def notes(self, counts: Mapping[str, int]) -> list[str]:
        white = counts.get("clipped", 0)
        return [f"{white} values in the windows' frames exceed t_max and were drawn as t_max"] if white else []


def retarget(policy: PolicyModel, store: GridStore, channel: str) -> None:
    """Points a policy at a store's city, channel, cadence and grid."""
    spec, (height, width) = policy.spec, store.shape
    frames = spec.frames
    if frames and (frames.height, frames.width) != (height, width):
        # An enlargement chosen for another grid could make frames of thousands of tokens.
        scale = pixels_per_cell(height, width)
        frames = frames.model_copy(update={"height": height, "width": width, "pixels_per_cell": scale})
    task = {"city": store.city, "channel": channel, "cadence": cadence_minutes(store), "first_cell": first_cell(store)}
    setting = spec.setting.model_copy(update=task)
    policy.set_task(spec.model_copy(update={"setting": setting, "frames": frames}))


def fit_frames(policy: PolicyModel, windows: Windows) -> Fitted | None:
    """Gives the frames of a city or channel that the policy was not trained on its own t_max, of the training days of
    the store's own split, and returns on what that was fitted. None where the frames keep the policy's: on the data it
    was trained on, where ``windows`` are of these days, and where they have no value above zero."""
    spec, store, channel = policy.spec, windows.store, windows.channel
    assert isinstance(store, GridStore)
    data, span = data_digest(store, channel), store.default_split.named("train")
    fitted = Fitted.on(T_MAX, span, data)
    own = [item.data for item in spec.fitted if item.what == T_MAX]
    if spec.frames is None or data in own or not own or leaks([fitted], windows.span, data):
        return None
    try:
        t_max = store.statistics(channel, span).maximum
    except InputError:  # nothing observed
        return None
    if t_max <= 0:
        return None
    policy.set_task(spec.model_copy(update={"frames": spec.frames.model_copy(update={"t_max": t_max})}))
    return fitted
