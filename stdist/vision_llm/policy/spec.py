"""A policy but for its weights: saved as ``policy.json`` in every checkpoint."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from stdist.data.audit import Fitted
from stdist.errors import DamageError, InputError


class Setting(BaseModel):
    """The forecasting task: names, S (``history``) and K (``horizon``) in frames, ``cadence`` in minutes.

    ``first_cell``: the data's own row and column id of the grid's first cell; prompts name cells by these ids.
    """

    model_config = ConfigDict(frozen=True)

    city: str
    channel: str
    cadence: int
    history: int
    horizon: int
    first_cell: tuple[int, int] = (0, 0)


class FrameSpec(BaseModel):
    """Eq. 8–11 for one city: grid size in cells, pixels per cell, p, and t_max in the data's units."""

    model_config = ConfigDict(frozen=True)

    height: int
    width: int
    pixels_per_cell: int
    power: float
    t_max: float


class PolicySpec(BaseModel):
    """``base``: a preset's name, a folder in Qwen2.5-VL's format, or a hub name. ``frames`` None: a policy that sees
    none. ``base_is_trained``: checkpoints carry the whole model, not an adapter on the named base. ``load_in_4bit``:
    the decoder of a frozen base is NF4, computing in ``dtype``. ``gradient_checkpointing``: its layers keep their
    inputs alone and are recomputed in the backward pass; training mode only. ``fitted``: what was fitted on which days
    of which data. ``base_sha256``: the digests of the base's files, by name; of a preset there are none. Both are empty
    in a checkpoint older than them."""

    model_config = ConfigDict(frozen=True)

    base: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False
    mantissa_digits: int = 4
    setting: Setting
    frames: FrameSpec | None = None
    base_is_trained: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    fitted: tuple[Fitted, ...] = ()
    base_sha256: tuple[tuple[str, str], ...] = ()


def read_spec(checkpoint: Path) -> PolicySpec:
    """The spec of a saved policy. Raises InputError where ``checkpoint`` holds none."""
    try:
        return PolicySpec.model_validate_json((checkpoint / "policy.json").read_text())
    except FileNotFoundError:
        raise InputError(f"{checkpoint} is no checkpoint of stdist: it has no policy.json") from None
    except ValidationError as error:
        raise DamageError(f"{checkpoint}/policy.json is damaged: {error.errors()[0]['msg']}") from None
