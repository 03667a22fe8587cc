"""Results of runs that later stages and runs begin with, above all frozen backbones."""

from pathlib import Path

from stdist.config import RunConfig
from stdist.data.audit import Fitted
from stdist.errors import InputError
from stdist.files import write_atomically
from stdist.nodes.checkpoints import load_fitted
from stdist.runs.forecasting import finished_stage
from stdist.runs.recipes import read_run_config
from stdist.runs.run_folder import CONFIG
from stdist.training.checkpoint import StageCheckpoints
from stdist.training.process_group import ProcessGroup
from stdist.urbanpg.backbone import Backbone
from stdist.urbanpg.config import UrbanConfig
from stdist.urbanpg.model import BACKBONE

FROZEN = "frozen_sha256"
"""A file beside a stage's checkpoints: the digest of the frozen weights that it began with."""


def stage_names(config: UrbanConfig) -> tuple[str, ...]:
    """A run's stages in order: one, or one for each period."""
    if config.continual:
        return tuple(f"period-{number}" for number in range(1, len(config.continual.periods) + 1))
    return ("prompts",) if config.recipe == "few-shot" else ("train",)


def result_of(run_dir: Path, config: RunConfig) -> Path:
    """The checkpoint that a finished run forecasts with. Raises InputError where it is not finished, or no such run."""
    if not isinstance(config, UrbanConfig):
        raise InputError(f"{run_dir} is a run of recipe {config.recipe}; name one of a forecaster of nodes")
    return finished_stage(run_dir, stage_names(config)[-1])[0]


def load_backbone(path: Path) -> tuple[Backbone, tuple[Fitted, ...] | None]:
    """The backbone of a run folder, a saved UrbanPG or a saved Backbone, and what it was fitted on if that is known.

    Raises InputError where ``path`` is none of these.
    """
    if (path / CONFIG).is_file():
        path = result_of(path, read_run_config(path))
    folder = path / BACKBONE if (path / BACKBONE).is_dir() else path
    if not folder.is_dir():
        raise InputError(f"backbone {folder} does not exist; name a run of recipe urbanpg-train, or a saved backbone")
    return Backbone.from_pretrained(folder), load_fitted(path)


def backbone_path(config: UrbanConfig) -> Path:
    """The folder of a few-shot run's backbone; where ``few_shot.backbone`` is gone, a finished run's own result."""
    assert config.few_shot
    path, checkpoints = config.few_shot.backbone, config.run_dir / "checkpoints" / stage_names(config)[0]
    if path.exists() or StageCheckpoints(checkpoints).finished is None:
        return path
    return result_of(config.run_dir, config)


def require_same_frozen(config: UrbanConfig, stage: str, digest: str, group: ProcessGroup) -> None:
    """Notes the ``digest`` of the weights that ``stage`` freezes as it begins. Raises InputError, on every learner,
    where it once began with others."""
    folder = config.run_dir / "checkpoints" / stage
    path = folder / FROZEN
    # One answer for all: a file system may show a new file to some machines first.
    noted = group.broadcast_object(path.read_text() if path.exists() else None)
    if noted is None and group.is_main:
        write_atomically(path, digest)
    if noted not in (None, digest):
        source = f"the backbone {config.few_shot.backbone} is" if config.few_shot else "those of the stage before are"
        raise InputError(
            f"{folder} began with other frozen weights (sha256 {noted[:12]}…) than {source} now ({digest[:12]}…); "
            "restore them, or choose another name="
        )
