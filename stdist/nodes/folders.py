"""Modules as folders: ``config.json``, the spec, and ``model.safetensors``, the weights. Nothing here is pickled."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from stdist.errors import DamageError, InputError, is_damage
from stdist.files import write_atomically
from stdist.training.checkpoint import require_undamaged_part

CONFIG, WEIGHTS = "config.json", "model.safetensors"
Spec = TypeVar("Spec", bound=BaseModel)
Module = TypeVar("Module", bound=nn.Module)


def save_module(module: nn.Module, spec: BaseModel, folder: Path) -> None:
    """Writes both files, each whole or not at all; makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{WEIGHTS}.partial"
    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
        save_file(tensors, partial, {"format": "pt"})
        os.replace(partial, folder / WEIGHTS)
    finally:
        partial.unlink(missing_ok=True)
    write_atomically(folder / CONFIG, spec.model_dump_json(indent=1))


def load_spec(kind: type[Spec], folder: Path) -> Spec:
    """The spec of a saved module. Raises InputError where the folder holds none of this kind."""
    try:
        return kind.model_validate_json((folder / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        if not is_damage(error):
            raise
        raise InputError(f"{folder} has no {CONFIG} that can be read; give a folder that was saved") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamageError(f"{folder / CONFIG} is not of a {kind.__name__}: {where}: {first['msg']}") from None


def load_module(kind: Callable[[Spec], Module], spec_kind: type[Spec], folder: Path) -> Module:
    """A saved module, made of its spec. Raises InputError where the folder does not hold one of this kind, DamageError
    where it lies in a checkpoint and is not as it was written."""
    require_undamaged_part(folder)
    spec = load_spec(spec_kind, folder)
    with torch.device("meta"):
        module = kind(spec)
    _load_weights(module, folder)
    return module


def _load_weights(module: nn.Module, folder: Path) -> None:
    """Gives ``module``, made on the meta device or not, the saved weights. Raises InputError where they do not fit."""
    path = folder / WEIGHTS
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        if not is_damage(error):
            raise
        raise DamageError(f"{path} cannot be read ({str(error).splitlines()[0]}); copy the folder again") from None
    wanted = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in saved.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise InputError(
                f"{path}: {name} is {found.get(name, 'missing')}, {CONFIG} says {wanted.get(name, 'none')}; "
                "the two files are of different models"
            )
    # In memory of their own: where a tensor begins in the file decides the last bits of products with it.
    module.load_state_dict({name: tensor.clone() for name, tensor in saved.items()}, assign=True)
