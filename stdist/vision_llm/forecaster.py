"""Forecasts of a region for many windows, and the errors a stage watches."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float

from stdist.config import ForecastConfig
from stdist.evaluation import ErrorState
from stdist.evaluation.forecasts import QUANTILES
from stdist.progress import Progress
from stdist.vision_llm.city_windows import CityWindows, PolicyBatch
from stdist.vision_llm.policy import Policy
from stdist.vision_llm.sampler import Decoding, Sampler

# Cells of a window are forecast in parts whose copies of the window's keys and values take at most this much.
PREFIX_BYTES = 2**29


def forecast_batches(
    policy: Policy,
    city: CityWindows,
    indices: np.ndarray,
    windows_per_batch: int,
    decoding: Decoding,
    num_generations: int = 1,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[PolicyBatch, Float[np.ndarray, "windows cells G K"]]]:
    """Forecasts every cell of the region for the windows ``indices``; values in the data's units."""
    sampler = Sampler(policy)
    for first in range(0, len(indices), windows_per_batch):
        batch = city.batch(indices[first : first + windows_per_batch], city.cells)
        with torch.no_grad():
            prefix = policy.prefix(batch.shared, batch.grids)
        windows, tokens = batch.shared.shape
        prompts = batch.prompts.view(windows, len(batch.cells), -1)
        size = max(1, PREFIX_BYTES // (windows * tokens * num_generations * policy.cache_bytes_per_token))
        values = torch.cat(
            [
                sampler.forecast(prefix, part.flatten(0, 1), decoding, num_generations, generator).view(
                    windows, part.shape[1], num_generations, -1
                )
                for part in prompts.split(size, dim=1)
            ],
            dim=1,
        )
        yield batch, values.cpu().numpy()


def forecast_windows(
    policy: Policy,
    city: CityWindows,
    config: ForecastConfig,
    seed: int,
    progress: Progress,
) -> tuple[Float[np.ndarray, "N K h w"], Float[np.ndarray, "3 N K h w"] | None]:
    """All windows, all cells: the point forecast, and the 10, 50 and 90 % quantiles where candidates were sampled.

    Cells outside the city (``inside`` is False) are NaN. ``progress`` counts windows.
    """
    shape = city.windows.region.shape
    generations = config.num_generations if config.decoding == "sample" else 1
    generator = torch.Generator(device=policy.device).manual_seed(seed)
    parts = []
    for _, values in forecast_batches(
        policy,
        city,
        np.arange(len(city)),
        config.windows_per_batch,
        config.decoding,
        generations,
        generator,
    ):
        parts.append(values)
        progress(sum(map(len, parts)), len(city))
    candidates = np.concatenate(parts)  # [N, C, G, K]

    def gridded(values: np.ndarray) -> np.ndarray:
        grid = np.full((len(values), values.shape[2], shape[0] * shape[1]), np.nan, np.float32)
        grid[:, :, city.cells] = values.transpose(0, 2, 1)
        return grid.reshape(len(values), -1, *shape)

    point = gridded(np.median(candidates, axis=2))
    if generations == 1:
        return point, None
    return point, np.stack([gridded(np.quantile(candidates, q, axis=2)) for q in QUANTILES])


def validation_errors(
    policy: Policy, city: CityWindows, indices: np.ndarray, windows_per_batch: int, decoding: Decoding
) -> dict[str, float]:
    """Pooled MAE, RMSE and NRMSE (Eq. 21–23) of point forecasts on observed points of the windows ``indices``."""
    state = ErrorState.empty(policy.spec.setting.horizon)
    for batch, values in forecast_batches(policy, city, indices, windows_per_batch, decoding):
        horizon_first = (0, 2, 1)
        state = state.update(
            values[:, :, 0].transpose(horizon_first),
            batch.truth.transpose(horizon_first),
            batch.observed.transpose(horizon_first),
        )
    return state.pooled()
