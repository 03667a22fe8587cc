"""A trained policy as the forecaster of a run: ``stdist forecast`` and a run's own test forecasts."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from jaxtyping import Float, Int

from stdist.data import GridStore, Region, Windows
from stdist.data.spans import AnyRegion
from stdist.evaluation import Chunk, ChunkGrid
from stdist.evaluation.forecast_header import QUANTILES
from stdist.evaluation.levels import LEVELS
from stdist.runs.forecast_request import ForecastRequest
from stdist.runs.forecasting import Predictor
from stdist.vision_llm.config import VisionLLMConfig
from stdist.vision_llm.dataset import cadence_minutes, first_cell
from stdist.vision_llm.numeral_range import find_unwritable
from stdist.vision_llm.policy.city_windows import CityWindows
from stdist.vision_llm.policy.frames import clipped, pixels_per_cell
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.forecaster import candidates_per_cell, forecast_pieces, plan_pieces, summarise


class PolicyPredictor(Predictor):
    """``policy`` with the decoding of ``config``; also for another city's grid, where its own t_max stays."""

    def __init__(self, policy: PolicyModel, config: VisionLLMConfig):
        self.policy, self.config, self.fitted = policy, config, policy.spec.fitted
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
        retarget(self.policy, store)
        return (store.region(Region.parse(region)) if region else grid), grid

    def check(self, windows: Windows) -> list[str]:
        clamped = find_unwritable([windows], self.policy.vocabulary, self.clamp)
        return [clamped] if clamped else []

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


def retarget(policy: PolicyModel, store: GridStore) -> None:
    """Points a policy at a store's city, cadence and grid; t_max, in the data's units, stays the training city's."""
    spec, (height, width) = policy.spec, store.shape
    frames = spec.frames
    if frames and (frames.height, frames.width) != (height, width):
        # An enlargement chosen for another grid could make frames of thousands of tokens.
        scale = pixels_per_cell(height, width)
        frames = frames.model_copy(update={"height": height, "width": width, "pixels_per_cell": scale})
    task = {"city": store.city, "cadence": cadence_minutes(store), "first_cell": first_cell(store)}
    setting = spec.setting.model_copy(update=task)
    policy.set_task(spec.model_copy(update={"setting": setting, "frames": frames}))
