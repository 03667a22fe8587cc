"""What a run's policy and prompts are made of, counted from its configuration: no weights are loaded, no data read.

Parameters are counted on a model without memory, tokens on the run's own prompts.
"""

import re
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from stdist.data import Region, open_store
from stdist.errors import InputError
from stdist.numerals import Vocabulary
from stdist.runs.memory_plan import Weights
from stdist.vision_llm.config import VisionLLMConfig
from stdist.vision_llm.dataset import stage_config
from stdist.vision_llm.policy.adapters import LORA_TARGETS
from stdist.vision_llm.policy.frames import MERGE, FrameGeometry, pixels_per_cell
from stdist.vision_llm.policy.presets import SHAPES, build_model, build_tokenizer
from stdist.vision_llm.policy.prompts import PromptEncoder
from stdist.vision_llm.policy.spec import Setting

NF4_BYTES = 4.127 / 8
"""Of a weight with its doubly quantised scale (QLoRA, arXiv 2305.14314, Section 3)."""
ASSUMED_GRID = (100, 100)
VISION, EMBEDDINGS, HEAD, DECODER, NORMS = "vision tower", "embeddings", "head", "decoder", "decoder's vectors"
LORA, ROWS, REFERENCE_LORA, REFERENCE_ROWS = "LoRA", "numeral rows", "reference LoRA", "reference rows"


@dataclass(frozen=True)
class Base:
    """A base model's shape. ``counts``: its parameters by kind, a tied head's none; ``lora``: Σ (inputs + outputs) of
    what LoRA adapts."""

    config: Qwen2_5_VLConfig
    counts: dict[str, int]
    lora: int


@dataclass(frozen=True)
class Shape:
    """Tokens of a run: ``shared`` prompt of a window, of which frames are ``patches`` before they are merged; own
    prompt of a ``cell``, ``horizon`` answers, and how many ``cells`` there are to draw from."""

    shared: int
    patches: int
    cell: int
    horizon: int
    cells: int
    notes: tuple[str, ...] = ()


@cache
def read_base(name: str) -> Base:
    """The shape of a preset, a folder or a hub name, from its configuration alone."""
    with torch.device("meta"):
        if name in SHAPES:
            model = build_model(name, seed=0)
        else:
            model = Qwen2_5_VLForConditionalGeneration(_pretrained_config(name))
    counts = dict.fromkeys((VISION, EMBEDDINGS, HEAD, DECODER, NORMS), 0)
    for path, parameter in model.named_parameters():
        inside = path.startswith("model.language_model.layers")
        kind = NORMS
        if path.startswith("model.visual"):
            kind = VISION
        elif "embed_tokens" in path:
            kind = EMBEDDINGS
        elif path.startswith("lm_head"):
            kind = HEAD
        elif inside and parameter.ndim > 1:
            kind = DECODER
        counts[kind] += parameter.numel()
    adapted = [m for path, m in model.named_modules() if re.fullmatch(LORA_TARGETS, path) and isinstance(m, nn.Linear)]
    return Base(model.config, counts, sum(m.in_features + m.out_features for m in adapted))


def _pretrained_config(name: str) -> Qwen2_5_VLConfig:
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"policy.base {name} has no configuration to plan with ({reason}); "
            f"give a folder with its config.json or one of {', '.join(SHAPES)}"
        ) from None
    if config.model_type != "qwen2_5_vl":
        raise InputError(f"policy.base {name} is a {config.model_type}; stdist needs a Qwen2.5-VL")
    return config


def read_shape(config: VisionLLMConfig) -> Shape:
    """Prompts of the run's own wording on its store's grid. Where there is no store yet, on a grid of 100 × 100 cells;
    text is counted by the presets' tokenizer, which knows the wording's words and digits as Qwen's does."""
    data = config.data
    notes: tuple[str, ...] = ()
    grid, city, cadence, inside = ASSUMED_GRID, "city", 10, np.ones(ASSUMED_GRID, bool)
    if data.store.exists():
        store = open_store(data.store)
        if len(store.shape) != 2:
            raise InputError(f"{data.store} holds nodes, the vision-LLM reads grids; choose a store of a grid")
        grid, city, inside = (store.shape[0], store.shape[1]), store.city, store.inside
        cadence = int(store.cadence / np.timedelta64(1, "m"))
    else:
        notes = (f"{data.store} does not exist yet: a grid of {grid[0]} x {grid[1]} cells is assumed",)
    region = Region.parse(data.region) if data.region else Region(0, grid[0], 0, grid[1])
    scale = config.frames.pixels_per_cell
    geometry = FrameGeometry(*grid, pixels_per_cell(*grid) if scale == "auto" else scale)
    patches = geometry.patches if config.frames.enabled else 0
    tokenizer, vocabulary = build_tokenizer(), vocabulary_of(config.numerals.mantissa_digits)
    setting = Setting(city=city, channel=data.channel, cadence=cadence, history=data.history, horizon=data.horizon)
    prompts = PromptEncoder(tokenizer, vocabulary, len(tokenizer), setting, patches // MERGE**2)
    nowhere = np.zeros(1, np.int64)
    return Shape(
        shared=len(prompts.shared(np.datetime64("2013-11-04T00:00"))),
        patches=data.history * patches,
        cell=prompts.cells(nowhere, nowhere, np.zeros((1, data.history))).shape[1],
        horizon=data.horizon,
        cells=int(inside[region.within(grid).slices].sum()),
        notes=notes,
    )


def stage_weights(config: VisionLLMConfig, stage: str, base: Base) -> list[Weights]:
    """Everything a learner has at a stage, and what of it trains (``train_only``).

    Numeral rows and LoRA are float32 (peft keeps adapters of a half-precision base so), unless DeepSpeed trains the
    whole policy in bfloat16, with float32 copies of all of it.
    """
    policy, trainable = config.policy, stage_config(config, stage).trainable
    before = config.stages[: config.stages.index(stage)]
    each = itemsize(config)
    own = each if config.learners.engine == "deepspeed" and trainable == "full" else 4
    trained_base = policy.base in SHAPES or any(stage_config(config, s).trainable == "full" for s in config.stages)
    had_lora = not trained_base or any(stage_config(config, s).trainable == "lora" for s in before)
    full = trainable == "full"
    numerals = len(vocabulary_of(config.numerals.mantissa_digits))
    lora, rows = policy.lora_r * base.lora, 2 * numerals * base.config.get_text_config().hidden_size
    weights = [
        Weights(VISION, base.counts[VISION], each, full and stage == "sft" and config.frames.enabled),
        # ZeRO-3 leaves whole what PolicyModel.read_in_place names: a tied head is the embeddings.
        Weights(EMBEDDINGS, base.counts[EMBEDDINGS], each, full, whole=not base.counts[HEAD]),
        Weights(HEAD, base.counts[HEAD], each, full, whole=True),
        Weights(DECODER, base.counts[DECODER], NF4_BYTES if policy.load_in_4bit else each, full),
        Weights(NORMS, base.counts[NORMS], each, full),
        Weights(ROWS, rows, own, True, whole=True),
    ]
    if had_lora or trainable == "lora":
        weights.append(Weights(LORA, lora, own, trainable != "rows"))
    if stage == "grpo":
        weights.append(Weights(REFERENCE_ROWS, rows, own, whole=True))
        if had_lora:
            weights.append(Weights(REFERENCE_LORA, lora, own))
    return [w for w in weights if w.count]


@cache
def vocabulary_of(mantissa_digits: int) -> Vocabulary:
    return Vocabulary(mantissa_digits)


def itemsize(config: VisionLLMConfig) -> int:
    return 2 if config.policy.dtype == "bfloat16" else 4
