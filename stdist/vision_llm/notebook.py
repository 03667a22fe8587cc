"""The policy for notebooks: ``from stdist.vision_llm import Policy``."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from stdist.errors import InputError
from stdist.training.checkpoint import require_undamaged_part
from stdist.training.inference import inference
from stdist.vision_llm.policy.checkpoints import build_policy, load_policy
from stdist.vision_llm.policy.city_windows import encode_windows
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.policy.presets import SHAPES
from stdist.vision_llm.policy.spec import PolicySpec, Setting
from stdist.vision_llm.rollout.sampler import Decoding, Sampler


class Policy:
    """A policy that forecasts arrays. ``model`` is the torch module."""

    def __init__(self, model: PolicyModel):
        self.model = model

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> "Policy":
        """A checkpoint folder of a run; or, by a preset's name, an untrained policy of that shape.

        Raises InputError where there is neither, DamageError where the checkpoint is not as it was written.
        """
        if str(name_or_path) not in SHAPES:
            require_undamaged_part(Path(name_or_path))
            return cls(load_policy(Path(name_or_path)))
        setting = Setting(city="a city", channel="traffic", cadence=10, history=12, horizon=12)
        spec = PolicySpec(base=str(name_or_path), setting=setting, base_is_trained=True)
        return cls(build_policy(spec, seed=0).eval())

    def forecast(
        self,
        frames: Float[np.ndarray, "S H W"],
        cells: Sequence[tuple[int, int]],
        origin: np.datetime64,
        decoding: Decoding = "median",
    ) -> Float[np.ndarray, "cells K"]:
        """The next K values of some cells, in the data's units.

        Args:
            frames: the last S grids in the data's units, without missing values.
            cells: (row, col) positions in the grid.
            origin: local time of the last frame.
            decoding: ``greedy``, ``median``, ``sample`` (one draw) or ``direct``.

        Raises InputError where ``frames`` has another shape than the policy's task, or a value has no numeral.
        """
        model, spec = self.model, self.model.spec
        grid = (spec.frames.height, spec.frames.width) if spec.frames else frames.shape[1:]
        expected = (spec.setting.history, *grid)
        if frames.shape != expected:
            raise InputError(f"frames are {frames.shape}, this policy reads {expected} (S, H, W)")
        positions = np.array(cells, dtype=np.int64).reshape(-1, 2)
        history = np.asarray(frames, np.float32)[None]
        shared, grids, prompts = encode_windows(
            model, history, [origin], positions, positions + spec.setting.first_cell
        )
        uniforms = None
        if decoding == "sample":
            uniforms = torch.rand(len(prompts), spec.setting.horizon, device=model.device)
        with inference(model):
            prefix = model.prefix(shared, grids)
        values = Sampler(model, decoding).forecast(prefix, prompts, uniforms)
        return values[:, 0].cpu().numpy()
