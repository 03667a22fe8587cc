"""Forecasts of a region for many windows, piece by piece, and the validation errors of a stage."""

from collections.abc import Iterable, Iterator
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float, Int

from stdist.evaluation import Chunk, ChunkGrid, ErrorState
from stdist.evaluation.forecast_header import QUANTILES
from stdist.training.inference import inference
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import ForecastConfig
from stdist.vision_llm.policy.city_windows import CityWindows, PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.sampler import Decoding, Sampler

# Cells x windows of a piece: enough to fill a device, few enough that a killed forecast loses little.
PIECE_SIZE = 2048


def plan_pieces(windows: int, cells: int, windows_per_batch: int) -> ChunkGrid:
    """Pieces of ``windows_per_batch`` windows, and of all their cells if these are few."""
    together = min(windows, windows_per_batch)
    return ChunkGrid(windows, cells, together, max(1, min(cells, PIECE_SIZE // together)))


def candidates_per_cell(config: ForecastConfig) -> int:
    return config.num_generations if config.decoding == "sample" else 1


def forecast_pieces(
    policy: PolicyModel,
    city: CityWindows,
    indices: Int[np.ndarray, " N"],
    pieces: Iterable[Chunk],
    decoding: Decoding,
    num_generations: int = 1,
    seed: int = 0,
    levels: tuple[float, ...] = (),
) -> Iterator[tuple[Chunk, PolicyBatch, Float[np.ndarray, "windows cells G K"]]]:
    """Forecasts pieces of the windows number ``indices`` and the city's cells; values in the data's units.

    Windows are read and encoded once for all consecutive pieces of them. Uniform numbers of a piece depend on ``seed``,
    its first window and its first cell alone, so that it does not matter which pieces were forecast before it.
    """
    sampler = Sampler(policy, decoding, num_generations, levels=levels)
    for windows, blocks in groupby(pieces, key=lambda piece: piece.windows):
        read, prefix = city.read(indices[windows]), None
        for piece in blocks:
            cells = city.cells[piece.cells]
            batch = city.batch_of(read, cells)
            if prefix is None:
                with inference(policy):
                    prefix = policy.prefix(batch.shared, batch.grids)
            uniforms = None
            if decoding == "sample":
                generator = torch.Generator(device=policy.device)
                generator.manual_seed(_piece_seed(seed, int(indices[windows][0]), int(cells[0])))
                shape = len(batch.prompts) * num_generations, policy.spec.setting.horizon
                uniforms = torch.rand(shape, generator=generator, device=policy.device)
            values = sampler.forecast(prefix, batch.prompts, uniforms)
            yield piece, batch, values.view(len(batch.shared), len(cells), *values.shape[1:]).cpu().numpy()


def _piece_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def summarise(candidates: Float[np.ndarray, "windows cells G K"]) -> Float[np.ndarray, "quantity windows K cells"]:
    """The point forecast, which is the candidates' median; then, where G > 1, their 10, 50 and 90 % quantiles."""
    quantities = np.median(candidates, axis=2)[None]
    if candidates.shape[2] > 1:
        quantities = np.concatenate([quantities, np.quantile(candidates, QUANTILES, axis=2)])
    return quantities.transpose(0, 1, 3, 2).astype(np.float32)


def validation_errors(
    policy: PolicyModel,
    city: CityWindows,
    indices: np.ndarray,
    windows_per_batch: int,
    decoding: Decoding,
    group: ProcessGroup = ProcessGroup(),
) -> dict[str, float]:
    """Pooled MAE, RMSE and NRMSE (Eq. 21–23) of point forecasts on observed points of the windows ``indices``, which
    the learners of ``group`` forecast together."""
    state = ErrorState.empty(policy.spec.setting.horizon)
    pieces = plan_pieces(len(indices), len(city.cells), windows_per_batch).chunks()
    for _, batch, values in forecast_pieces(policy, city, indices, group.local_items(list(pieces)), decoding):
        horizon_first = (0, 2, 1)
        state += ErrorState.of(
            values[:, :, 0].transpose(horizon_first),
            batch.truth.transpose(horizon_first),
            batch.observed.transpose(horizon_first),
        )
    return sum(group.all_gather_object(state), ErrorState.empty(policy.spec.setting.horizon)).pooled()
