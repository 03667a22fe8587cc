"""A forecaster of nodes as files: the model's own, and what it was fitted on."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from stdist.config import RunConfig
from stdist.data.audit import Fitted
from stdist.errors import InputError
from stdist.files import write_atomically
from stdist.nodes.backbones import NodeForecaster
from stdist.nodes.scaling import City
from stdist.runs.forecasting import finished_stage
from stdist.runs.recipes import read_run_config
from stdist.runs.run_folder import CONFIG
from stdist.training.checkpoint import StageCheckpoints, damage_as_input_error
from stdist.training.process_group import ProcessGroup
from stdist.urbanpg.config import UrbanConfig
from stdist.urbanpg.model import BACKBONE, PROMPTS, Backbone, UrbanPG
from stdist.urbanpg.node_parallel import NodeParallel

Model = UrbanPG | NodeForecaster
FITTED = "fitted.json"
FROZEN = "frozen_sha256"
"""Beside a stage's checkpoints: of the frozen weights that it began with."""


def city_of(model: Model) -> City:
    """What ``model`` knows of its city's data."""
    return model.prompts if isinstance(model, UrbanPG) else model


def nodes_of_model(model: Model) -> int | None:
    """How many nodes it forecasts, None where it fits any number."""
    return model.total_nodes if isinstance(model, UrbanPG) else model.nodes


@dataclass(frozen=True)
class ForecasterFiles:
    """See :class:`stdist.training.loop.Model`. ``fitted`` is kept beside the weights."""

    model: Model
    fitted: tuple[Fitted, ...]

    def snapshot(self) -> Callable[[Path], None]:
        model = self.model
        save = model.snapshot() if isinstance(model, NodeParallel) else copy.deepcopy(model).save_pretrained

        def write(folder: Path) -> None:
            save(folder)
            write_atomically(folder / FITTED, json.dumps([asdict(each) for each in self.fitted], indent=1))

        return write

    def read(self, path: Path) -> None:
        if isinstance(self.model, NodeParallel):
            self.model.read(path)
        else:
            self.model.load_state_dict(load_forecaster(path).state_dict())


def load_forecaster(folder: Path) -> Model:
    """What a checkpoint holds, in evaluation mode. Raises InputError where that is no forecaster."""
    if not (folder / BACKBONE).is_dir():
        return NodeForecaster.from_pretrained(folder)
    scenarios = sorted(path.name for path in (folder / PROMPTS).glob("*/"))
    if len(scenarios) != 1:
        raise InputError(f"{folder} has prompts of {len(scenarios)} scenarios; a checkpoint has those of one")
    return UrbanPG.from_pretrained(folder, scenarios[0])


def load_fitted(folder: Path) -> tuple[Fitted, ...] | None:
    """What was fitted of the forecaster in ``folder``, and on which data; None where nobody noted it."""
    path = folder / FITTED
    if not path.exists():
        return None
    with damage_as_input_error(folder):
        return tuple(Fitted(**each) for each in json.loads(path.read_text()))


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
    """Where a few-shot run's backbone is; a finished run whose ``few_shot.backbone`` is gone has it in its result."""
    assert config.few_shot
    given, checkpoints = config.few_shot.backbone, config.run_dir / "checkpoints" / stage_names(config)[0]
    if given.exists() or StageCheckpoints(checkpoints).finished is None:
        return given
    return result_of(config.run_dir, config)


def require_same_frozen(config: UrbanConfig, stage: str, digest: str, group: ProcessGroup) -> None:
    """Notes the ``digest_of`` what ``stage`` freezes where it begins. Raises InputError, on every learner, where it
    once began with other weights."""
    folder = config.run_dir / "checkpoints" / stage
    path = folder / FROZEN
    # One answer for all: a file system may show a new file to some machines first.
    known = group.broadcast_object(path.read_text() if path.exists() else None)
    if known is None and group.is_main:
        write_atomically(path, digest)
    if known not in (None, digest):
        source = f"the backbone {config.few_shot.backbone} is" if config.few_shot else "those of the stage before are"
        raise InputError(
            f"{folder} began with other frozen weights (sha256 {known[:12]}…) than {source} now ({digest[:12]}…); "
            "restore them, or choose another name="
        )


def digest_of(model: nn.Module, names: Iterable[str]) -> str:
    """One sha256 over the bytes of these parameters."""
    parameters, digest = dict(model.named_parameters()), hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(parameters[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
