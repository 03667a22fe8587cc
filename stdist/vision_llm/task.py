"""The data side of a run: its store, its windows, and the policy they call for."""

from dataclasses import dataclass

import numpy as np

from stdist.data import DaySpan, GridStore, Region, Split, Statistics, Windows, open_store
from stdist.data.audit import Fitted, data_digest
from stdist.errors import InputError
from stdist.vision_llm.config import StageConfig, VisionLLMConfig
from stdist.vision_llm.policy.frames import pixels_per_cell
from stdist.vision_llm.policy.presets import SHAPES
from stdist.vision_llm.policy.spec import FrameSpec, PolicySpec, Setting

ASSUMED_GRID = (100, 100)


@dataclass
class Task:
    """The data side of a run: windows of the three splits and what the training span says of the channel."""

    store: GridStore
    train: Windows
    validation: Windows
    test: Windows
    statistics: Statistics


def open_task(config: VisionLLMConfig) -> Task:
    """Opens the store and its windows. Raises InputError for a region, channel, split or window that cannot be."""
    data = config.data
    store = open_store(data.store)
    split = Split.parse(**data.split.model_dump(mode="json")) if data.split else store.default_split
    region = Region.parse(data.region) if data.region else Region(0, store.shape[0], 0, store.shape[1])
    fitted_on = span_of(split, "train", store).fraction(data.fraction)

    def windows(name: str) -> Windows:
        span = fitted_on if name == "train" else span_of(split, name, store)
        return store.windows(
            span,
            data.history,
            data.horizon,
            channel=data.channel,
            region=region,
            history_inside=name == "train",
            name=name,
        )

    return Task(
        store,
        train=windows("train"),
        validation=windows("validation"),
        test=windows("test"),
        statistics=store.statistics(data.channel, fitted_on),
    )


def span_of(split: Split, name: str, store: GridStore) -> DaySpan:
    span = getattr(split, name) if name in ("train", "validation", "test") else None
    if span is None:
        raise InputError(f"{store.path} has no {name} days; set data.split, or give local days A:B")
    return span


def policy_spec(config: VisionLLMConfig, task: Task) -> PolicySpec:
    maximum = task.statistics.maximum
    if maximum <= 0:
        raise InputError(
            f"{task.store.path}: {config.data.channel} is zero all over {task.statistics.span}; train on other days"
        )
    spec = unfitted_spec(config, task.store)
    frames = spec.frames and spec.frames.model_copy(update={"t_max": maximum})
    return spec.model_copy(update={"frames": frames, "fitted": fitted_on_data(config, task)})


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


def fitted_on_data(config: VisionLLMConfig, task: Task) -> tuple[Fitted, ...]:
    """What a run fits on its training days, for the leak audit; the alignment stages read no traffic."""
    of_stage = {"sft": {"weights"}, "grpo": {"weights", "reward normalizer"}}
    whats = {"t_max of the frames"} if config.frames.enabled else set()
    whats = whats.union(*(of_stage.get(name, set()) for name in config.stages))
    data = data_digest(task.store, config.data.channel)
    return tuple(Fitted.on(what, task.statistics.span, data) for what in sorted(whats))


def cadence_minutes(store: GridStore) -> int:
    return int(store.cadence / np.timedelta64(1, "m"))


def first_cell(store: GridStore) -> tuple[int, int]:
    """The data's own row and column id of the grid's first cell."""
    return int(store.dataset["row"][0]), int(store.dataset["col"][0])


def stage_config(config: VisionLLMConfig, name: str) -> StageConfig:
    return getattr(config, name)
