"""The data of a run, and the policy that it calls for."""

from pathlib import Path

import numpy as np

from stdist.data import GridStore, Region, open_store
from stdist.data.audit import Fitted, data_digest
from stdist.errors import InputError
from stdist.numerals import Vocabulary
from stdist.runs.dataset import Dataset, open_windows, require_observed, split_of, training_span
from stdist.vision_llm.config import ForecastStageConfig, StageConfig, VisionLLMConfig
from stdist.vision_llm.numeral_range import find_unwritable
from stdist.vision_llm.policy.city_windows import evenly
from stdist.vision_llm.policy.frames import pixels_per_cell
from stdist.vision_llm.policy.presets import SHAPES
from stdist.vision_llm.policy.spec import FrameSpec, PolicySpec, Setting

ASSUMED_GRID = (100, 100)
T_MAX = "t_max of the frames"
"""What the leak audit calls it."""


def open_dataset(config: VisionLLMConfig) -> Dataset:
    """Opens the store and its windows. Raises InputError for a store of nodes, a region, channel, split or window that
    cannot be, and validation windows without traffic: their NRMSE tells the best step."""
    data, store = config.data, open_grid(config.data.store)
    split = split_of(data.split, store)
    region = Region.parse(data.region) if data.region else Region(0, store.shape[0], 0, store.shape[1])
    windows = open_windows(data, store, split, region.within(store.shape), store.region())
    dataset = Dataset(store, *windows, store.statistics(data.channel, training_span(data, store, split)))
    for stage in (stage_config(config, name) for name in config.stages):
        if isinstance(stage, ForecastStageConfig):
            require_observed(dataset.validation, evenly(dataset.validation, stage.eval_windows), positive=True)
    return dataset


def open_grid(path: Path) -> GridStore:
    """Opens a store. Raises InputError where it is none, or one of nodes."""
    store = open_store(path)
    if len(store.shape) != 2:
        raise InputError(f"{path} holds nodes, the vision-LLM reads grids; choose a store of a grid")
    return store


def check_values(config: VisionLLMConfig, dataset: Dataset) -> list[str]:
    """Reads every value of the run's windows; a line about those that are clamped. Raises InputError where a value has
    no numeral, and where the training days are zero all over."""
    if dataset.statistics.maximum <= 0:
        raise InputError(
            f"{dataset.store.path}: {config.data.channel} is zero all over {dataset.statistics.span}; "
            "train on other days"
        )
    parts = dataset.train, dataset.validation, dataset.test
    clamp = config.numerals.out_of_range == "clamp"
    clamped = find_unwritable(parts, Vocabulary(config.numerals.mantissa_digits), clamp)
    return [clamped] if clamped else []


def policy_spec(config: VisionLLMConfig, dataset: Dataset) -> PolicySpec:
    spec = unfitted_spec(config, dataset.store)
    frames = spec.frames and spec.frames.model_copy(update={"t_max": dataset.statistics.maximum})
    return spec.model_copy(update={"frames": frames, "fitted": fitted_on_data(config, dataset)})


def unfitted_spec(config: VisionLLMConfig, store: GridStore | None) -> PolicySpec:
    """The policy of a run on a store, or on a grid of the size that is assumed where there is none yet, without what is
    fitted on its values."""
    height, width = store.shape if store else ASSUMED_GRID
    scale = config.frames.pixels_per_cell
    frames = FrameSpec(
        height=height,
        width=width,
        pixels_per_cell=pixels_per_cell(height, width) if scale == "auto" else scale,
        power=config.frames.power,
        t_max=1,
    )
    return PolicySpec(
        base=config.policy.base,
        dtype=config.policy.dtype,
        load_in_4bit=config.policy.load_in_4bit,
        gradient_checkpointing=config.policy.gradient_checkpointing,
        mantissa_digits=config.numerals.mantissa_digits,
        setting=Setting(
            city=store.city if store else "city",
            channel=config.data.channel,
            cadence=cadence_minutes(store) if store else 10,
            history=config.data.history,
            horizon=config.data.horizon,
            first_cell=first_cell(store) if store else (0, 0),
        ),
        frames=frames if config.frames.enabled else None,
        # A preset's base is nowhere to be downloaded from: its checkpoints carry it, trained or not.
        base_is_trained=config.policy.base in SHAPES
        or any(stage_config(config, name).trainable == "full" for name in config.stages),
        lora_r=config.policy.lora_r,
        lora_alpha=config.policy.lora_alpha,
    )


def fitted_on_data(config: VisionLLMConfig, dataset: Dataset) -> tuple[Fitted, ...]:
    """The leak audit's record of what a run fits on its training days; the alignment stages read no traffic."""
    of_stage = {"sft": {"weights"}, "grpo": {"weights", "reward normalizer"}}
    whats = {T_MAX} if config.frames.enabled else set()
    whats = whats.union(*(of_stage.get(name, set()) for name in config.stages))
    data = data_digest(dataset.store, config.data.channel)
    return tuple(Fitted.on(what, dataset.statistics.span, data) for what in sorted(whats))


def cadence_minutes(store: GridStore) -> int:
    return int(store.cadence / np.timedelta64(1, "m"))


def first_cell(store: GridStore) -> tuple[int, int]:
    """The data's own row and column id of the grid's first cell."""
    return int(store.dataset["row"][0]), int(store.dataset["col"][0])


def stage_config(config: VisionLLMConfig, name: str) -> StageConfig:
    return getattr(config, name)
