"""Warm starts: a run that goes on from another one's policy, for another channel, city, horizon or reward."""

from pathlib import Path

from stdist.config.base import RunConfig
from stdist.data.integrity import sha256_of
from stdist.errors import InputError
from stdist.files import write_atomically
from stdist.runs.forecasting import finished_stage
from stdist.runs.recipes import read_run_config
from stdist.training.checkpoint import STATE
from stdist.vision_llm.config import VisionLLMConfig
from stdist.vision_llm.policy.adapters import adapter_names, add_lora
from stdist.vision_llm.policy.checkpoints import ADAPTER, load_weights
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.policy.spec import PolicySpec, read_spec

SOURCE = "init_from"
"""File of a run that has the digest of its ``init_from``: of the state that names all of its files' sums."""
SAME = {
    "base": "policy.base",
    "base_is_trained": "a stage with trainable: full, or none",
    "mantissa_digits": "numerals.mantissa_digits",
    "lora_r": "policy.lora_r",
    "lora_alpha": "policy.lora_alpha",
}
"""Fields that two policies must have in common, by the key that says them."""


def initial_checkpoint(config: VisionLLMConfig, spec: PolicySpec) -> Path | None:
    """The checkpoint that ``init_from`` names, None where the run begins anew. ``spec``: of the policy that will have
    its weights.

    Raises InputError where there is none, its stage is not finished, its policy is another one, or it has been trained
    again since the run began with it; DamageError where a file of it is not as it was written.
    """
    if config.init_from is None:
        return None
    source, stage = _run_and_stage(config.init_from)
    checkpoint, _ = finished_stage(source.run_dir, stage)
    other = read_spec(checkpoint)
    for name, key in SAME.items():
        theirs, ours = getattr(other, name), getattr(spec, name)
        if theirs != ours:
            raise InputError(f"init_from {config.init_from} has {key} {theirs}, this run {ours}; give both the same")
    noted = config.run_dir / SOURCE
    if noted.exists() and noted.read_text() != sha256_of(checkpoint / STATE):
        raise InputError(
            f"init_from {config.init_from} was trained again since {config.run_dir} began with it; choose another name="
        )
    return checkpoint


def note_source(config: VisionLLMConfig, checkpoint: Path) -> None:
    """Notes what the run began with, once."""
    noted = config.run_dir / SOURCE
    if not noted.exists():
        write_atomically(noted, sha256_of(checkpoint / STATE))


def _run_and_stage(path: Path) -> tuple[RunConfig, str]:
    run_dir, stage = (path, None) if (path / "config.yaml").is_file() else (path.parent, path.name)
    if not (run_dir / "config.yaml").is_file():
        raise InputError(f"init_from {path} is neither a run nor one of its stages; give RUN or RUN/STAGE")
    config = read_run_config(run_dir)
    if not isinstance(config, VisionLLMConfig):
        raise InputError(f"init_from {path} is a run of recipe {config.recipe}; give one of {VisionLLMConfig.recipe}")
    if stage not in (None, *config.stages):
        raise InputError(f"init_from {path}: {run_dir} has the stages {', '.join(config.stages)}")
    # The run knows its folder by where it was made, and may have been moved since.
    return config.model_copy(update={"name": run_dir.name, "output_dir": run_dir.parent}), stage or config.stages[-1]


def begin_from(policy: PolicyModel, checkpoint: Path) -> None:
    """Gives ``policy`` the weights of ``checkpoint``."""
    if (checkpoint / ADAPTER).is_dir() and not adapter_names(policy):
        add_lora(policy)
    load_weights(policy, checkpoint)


def what_it_took(policy: PolicyModel, checkpoint: Path) -> str:
    """A line about what ``policy`` began with."""
    theirs, ours = read_spec(checkpoint).setting, policy.spec.setting
    taken = ["base"] * policy.spec.base_is_trained + ["adapter"] * bool(adapter_names(policy))
    return (
        f"began with {', '.join(taken)} and {len(policy.vocabulary):,} numerals of {checkpoint}, trained on "
        f"{theirs.channel} of {theirs.city}; this run is on {ours.channel} of {ours.city}, with t_max of its own"
    )
