"""Alignment stages that another run has finished already: they read no traffic, so that any city's run can have them.

Where a run of the same ``output_dir`` began with the same base and seed and went through the same stages up to one of
these, its result is taken over instead of being trained again.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stdist.errors import InputError
from stdist.runs.forecasting import finished_stage
from stdist.runs.recipes import read_run_config
from stdist.training.checkpoint import StageCheckpoints
from stdist.vision_llm.config import VisionLLMConfig
from stdist.vision_llm.dataset import stage_config
from stdist.vision_llm.policy.spec import PolicySpec, read_spec

STAGES = ("alignment", "arithmetic")
POLICY = "base", "base_sha256", "base_is_trained", "dtype", "load_in_4bit", "mantissa_digits", "lora_r", "lora_alpha"
"""Fields of the policy that these stages begin with; the rest of its spec is the city's."""


def take_over(config: VisionLLMConfig, spec: PolicySpec, stage: str, checkpoints: StageCheckpoints) -> str | None:
    """Makes ``stage``, which has not begun, a finished one by another run's result; a line that says whose.

    None where there is none, where ``reuse_alignment`` is off, and for a run's last stage: its checkpoint says which
    city it forecasts.
    """
    own = stage not in STAGES or stage == config.stages[-1] or config.init_from is not None
    if own or not config.reuse_alignment or checkpoints.begun:
        return None
    for run_dir, other in _other_runs(config):
        try:
            checkpoint, _ = finished_stage(run_dir, stage)
            same = _decisive(other, read_spec(checkpoint), stage) == _decisive(config, spec, stage)
        except InputError:  # it is not finished there, or damaged
            continue
        if same:
            checkpoints.take_over(StageCheckpoints(checkpoint.parent))
            return f"{stage}: taken from {run_dir}, which began with the same base, seed and stages (reuse_alignment)"
    return None


def _other_runs(config: VisionLLMConfig) -> Iterator[tuple[Path, VisionLLMConfig]]:
    for path in sorted(config.output_dir.glob("*/config.yaml")):
        try:
            other = read_run_config(path.parent)
        except InputError:  # a recipe that is not installed here, say
            continue
        if path.parent != config.run_dir and isinstance(other, VisionLLMConfig) and other.init_from is None:
            yield path.parent, other


def _decisive(config: VisionLLMConfig, spec: PolicySpec, stage: str) -> dict[str, Any]:
    """All that the weights behind ``stage`` follow from, but for rounding, which differs with the learners."""
    stages = config.stages[: config.stages.index(stage) + 1] if stage in config.stages else ()
    return {
        "seed": config.seed,
        "stages": {name: stage_config(config, name).model_dump() for name in stages},
        "policy": [getattr(spec, name) for name in POLICY],
    }
