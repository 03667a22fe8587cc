"""Checkpoints of a stage: ``checkpoints/STAGE/step-N/`` written whole or not at all, with an atomic ``latest``.

A checkpoint is the model in Hugging Face layout (written by the caller) plus ``trainer_state/`` for exact resume:
optimizer tensors as safetensors, everything else as JSON. No pickle is ever read.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stdist.errors import InputError
from stdist.files import write_atomically
from stdist.training.engine import Engine


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Inside, whatever a missing, cut or foreign file of the checkpoint ``path`` raises becomes one InputError."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is damaged ({reason}); delete {path.parent} to redo the stage") from error


@dataclass
class StageCheckpoints:
    """The checkpoints of one stage under ``folder``; the caller says which to keep."""

    folder: Path

    def save(self, step: int, write_model: Callable[[Path], None], engine: Engine, values: dict[str, Any]) -> None:
        """Writes step-N and points ``latest`` at it. ``values``: JSON-able trainer state of the loop."""
        final = self.at(step)
        partial = self.folder / f"step-{step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "trainer_state").mkdir(parents=True)
        write_model(partial)
        tensors, engine_values = engine.state()
        tensors["torch_rng"] = torch.get_rng_state()
        save_file(tensors, partial / "trainer_state" / "state.safetensors")
        (partial / "trainer_state" / "state.json").write_text(
            json.dumps({"step": step, "engine": engine_values, "loop": values})
        )
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        write_atomically(self.folder / "latest", final.name)

    def load(self, path: Path, engine: Engine) -> dict[str, Any]:
        """Restores the engine and the random state from a checkpoint; returns ``{"step", "loop"}``. Raises InputError
        where it is damaged."""
        with naming_damage(path):
            tensors = load_file(path / "trainer_state" / "state.safetensors")
            state = json.loads((path / "trainer_state" / "state.json").read_text())
            torch.set_rng_state(tensors.pop("torch_rng"))
            engine.load_state(tensors, state["engine"])
        return state

    @property
    def latest(self) -> Path | None:
        """The checkpoint to resume from, None before the first. Raises InputError where it is damaged."""
        pointer = self.folder / "latest"
        if not pointer.exists():
            return None
        path = self.folder / pointer.read_text().strip()
        if not (path / "trainer_state" / "state.json").exists():
            raise InputError(
                f"{path} is damaged (it has no trainer state, yet {pointer} names it); "
                f"delete {self.folder} to redo the stage"
            )
        return path

    def at(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def prune(self, keep: set[int]) -> None:
        """Deletes the checkpoints of every other step."""
        for path in self.folder.glob("step-*"):
            if path not in {self.at(step) for step in keep}:
                shutil.rmtree(path)

    @property
    def finished(self) -> dict[str, Any] | None:
        """The stage's closing summary, with ``checkpoint`` naming its result; None while it is unfinished."""
        path = self.folder / "finished.json"
        if not path.exists():
            return None
        with naming_damage(path):
            return json.loads(path.read_text())

    def finish(self, summary: dict[str, Any]) -> None:
        write_atomically(self.folder / "finished.json", json.dumps(summary, indent=1))
