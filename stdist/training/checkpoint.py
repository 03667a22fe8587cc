"""Checkpoints of a stage: ``checkpoints/STAGE/step-N/`` written in full or not at all, with an atomic ``latest``.

A checkpoint is the model in Hugging Face layout (written by the main learner) plus ``trainer_state/`` for exact resume:
every learner writes its part of the optimizer, under names that know no engine, stage of ZeRO or number of learners, so
that any of them goes on from it. Training waits while tensors are copied; files are written beside it, and the
checkpoint counts once all learners have written theirs. No pickle is ever read.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stdist.errors import DamageError, InputError, ResourceError
from stdist.files import own_file, to_json, write_atomically
from stdist.folders import copy_linked
from stdist.training.engine import Engine
from stdist.training.process_group import ProcessGroup

STATE = Path("trainer_state") / "state.json"
SUMMARY = {"before", "after", "steps", "checkpoint"}
"""Keys that every version's closing summary of a stage has."""
KEPT = 2
"""The newest checkpoints that are kept: where the last one is damaged, the one before serves."""


def damage_as_one_line(path: Path) -> AbstractContextManager[None]:
    """Turns all that a missing, cut or foreign file of the checkpoint ``path`` raises inside into one DamageError."""
    return own_file(path, f"delete {path.parent} to redo the stage", SafetensorError)


def require_undamaged_model(path: Path) -> None:
    """Reads every byte of a checkpoint's model. Raises DamageError where a file of it is not as it was written."""
    if (problem := _damage(path, _of_model)) is not None:
        raise DamageError(f"{path} is damaged ({problem}); delete {path.parent} to redo the stage")


def require_undamaged_part(folder: Path) -> None:
    """Reads every byte of ``folder``, a checkpoint or part of one. Raises DamageError where a file of its model is not
    as it was written; of a folder that lies in no checkpoint nothing is recorded."""
    root = next((path for path in (folder, *folder.parents[:2]) if (path / STATE).is_file()), None)
    if root is None:
        return
    part = folder.relative_to(root)
    if problem := _damage(root, lambda name: _of_model(name) and part in Path(name).parents):
        raise DamageError(f"{root} is damaged ({problem}); copy it again, or train it again")


def _of_model(name: str) -> bool:
    return STATE.parent.name not in Path(name).parts


def checksums(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Returns the sum of each tensor's bits, as integers: equal for equal weights, cheap on any device."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        name: int(tensor.detach().contiguous().view(kinds[tensor.element_size()]).sum(dtype=torch.int64))
        for name, tensor in parameters.items()
    }


@dataclass
class _Pending:
    """A checkpoint whose files this learner is writing."""

    step: int
    keep: set[int]
    state: dict[str, Any]
    thread: Thread
    files: dict[str, int] = field(default_factory=dict)
    error: Exception | None = None


class StageCheckpoints:
    """The checkpoints of one stage under ``folder``, a file system that all learners share. ``save``, ``wait``,
    ``newest`` and ``check`` are collectives of ``group``."""

    def __init__(self, folder: Path, group: ProcessGroup = ProcessGroup()):
        self.folder, self.group = folder, group
        self._pending: _Pending | None = None

    def save(
        self,
        step: int,
        snapshot: Callable[[], Callable[[Path], None]],
        engine: Engine,
        values: dict[str, Any],
        keep: Iterable[int] = (),
    ) -> None:
        """Begins to write step-N. ``snapshot`` copies the model and returns what writes the copy into a folder;
        ``values``: JSON-able trainer state of the loop; ``keep``: other steps not to delete for it. ``wait`` ends it.

        Raises ResourceError where the checkpoint before could not be written.
        """
        self.wait()
        with engine.gather_full_params():
            write_model = snapshot() if self.group.is_main else None
            weights = checksums(engine.parameters)
        tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in engine.state()}
        tensors["torch_rng"] = torch.get_rng_state()
        state = {"step": step, "engine": {"steps": engine.steps}, "loop": values, "weights": weights}
        partial = self._partial(step)
        if self.group.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / STATE.parent).mkdir(parents=True)
        self.group.all_gather_object(None)  # nobody writes before the folder is there
        pending = _Pending(step, {step, *keep}, state, Thread())
        pending.thread = Thread(target=self._write, args=(pending, partial, tensors, write_model), daemon=True)
        self._pending = pending
        pending.thread.start()

    def _write(
        self,
        pending: _Pending,
        partial: Path,
        tensors: dict[str, Tensor],
        write_model: Callable[[Path], None] | None,
    ) -> None:
        try:
            shard = partial / STATE.parent / f"shard-{self.group.rank:05}-of-{self.group.size:05}.safetensors"
            save_file(tensors, shard)
            paths = [shard]
            if write_model:
                write_model(partial)
                paths += [p for p in sorted(partial.rglob("*")) if p.is_file() and STATE.parent.name not in p.parts]
            pending.files = {str(path.relative_to(partial)): _crc32(path) for path in paths}
        except Exception as error:  # told to all learners when they wait
            pending.error = error

    def wait(self, block: bool = True) -> None:
        """Makes the checkpoint that is being written the latest, once all learners have written their part.

        ``block=False``: only if they have. Raises ResourceError, on every learner, where one could not write.
        """
        if (pending := self._pending) is None:
            return
        if block:
            pending.thread.join()
        if not all(self.group.all_gather_object(not pending.thread.is_alive())):
            return
        self._pending = None
        pending.thread.join()
        problem = " ".join(f"{type(pending.error).__name__}: {pending.error}".split()) if pending.error else None
        results = self.group.all_gather_object((pending.files, problem))
        if (failed := next((rank for rank, (_, error) in enumerate(results) if error), None)) is not None:
            if self.group.is_main:
                shutil.rmtree(self._partial(pending.step), ignore_errors=True)
            raise ResourceError(
                f"{self.step_dir(pending.step)} could not be written (learner {failed}: {results[failed][1]}); "
                "make room and run the same command to go on from the checkpoint before"
            )
        if self.group.is_main:
            files = {name: crc for part, _ in results for name, crc in part.items()}
            self._publish(pending, files)
        self.group.all_gather_object(None)  # nobody goes on before it is there

    def _publish(self, pending: _Pending, files: dict[str, int]) -> None:
        partial, final = self._partial(pending.step), self.step_dir(pending.step)
        state = pending.state | {"files": files}
        write_atomically(partial / STATE, json.dumps(state | {"crc32": _json_crc32(state)}))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        write_atomically(self.folder / "latest", final.name)
        # One with a higher number is damaged, or this run would have gone on from it.
        newest = self._newest_first()
        kept = {self.step_dir(step) for step in pending.keep} | set(newest[newest.index(final) :][:KEPT])
        for path in self.folder.glob("step-*"):
            if path not in kept:
                shutil.rmtree(path)

    def newest(self) -> tuple[Path, dict[str, Any], list[str]] | None:
        """Returns the newest undamaged checkpoint, its state, and the damage of newer ones; None before the first.

        Every byte is read. Raises DamageError, on every learner, where there are checkpoints and all are damaged.
        """
        path, damage = self.group.broadcast_object(self._newest_undamaged() if self.group.is_main else (None, []))
        if path is not None:
            return path, json.loads((path / STATE).read_text()), damage
        if damage:
            raise DamageError(f"{damage[0]}; delete {self.folder} to redo the stage")
        return None

    def check(self, path: Path) -> None:
        """Reads every byte. Raises DamageError, on every learner, where one is not as it was written."""
        problem = self.group.broadcast_object(_damage(path) if self.group.is_main else None)
        if problem is not None:
            raise DamageError(f"{path} is damaged ({problem}); delete {self.folder} to redo the stage")

    def _newest_undamaged(self) -> tuple[Path | None, list[str]]:
        damage: list[str] = []
        for path in self._newest_first():
            problem = _damage(path)
            if problem is None:
                return path, damage
            damage.append(f"{path} is damaged ({problem})")
        return None, damage

    def _newest_first(self) -> list[Path]:
        steps = [int(name) for p in self.folder.glob("step-*") if (name := p.name.removeprefix("step-")).isdigit()]
        return [self.step_dir(step) for step in sorted(steps, reverse=True)]

    def load(self, path: Path, engine: Engine, state: dict[str, Any]) -> None:
        """Restores optimizer and random state, for a model that has read its own files before.

        Raises InputError where its weights are not those that were saved.
        """
        with damage_as_one_line(path):
            shards = sorted((path / STATE.parent).glob("shard-*.safetensors"))
            tensors = _Shards(shards)
            engine.load_state(tensors, state["engine"]["steps"])
            torch.set_rng_state(_Shards([shards[self.group.rank % len(shards)]])["torch_rng"])
        with engine.gather_full_params():
            loaded = checksums(engine.parameters)
        if wrong := [name for name, saved in state["weights"].items() if loaded.get(name) != saved]:
            raise InputError(
                f"{path}: {len(wrong)} of {len(loaded)} weights did not arrive in the model as saved, first "
                f"{wrong[0]}; the checkpoint belongs to another model, or was trained in another precision"
            )

    def step_dir(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def _partial(self, step: int) -> Path:
        return self.folder / f"step-{step}.partial"

    @property
    def begun(self) -> bool:
        return self.folder.exists()

    def take_over(self, other: "StageCheckpoints") -> None:
        """Makes this stage, which has not begun, finished by the result of ``other``, whose files it shares where the
        file system lets it. Of the learner that writes alone."""
        summary = other.finished
        assert summary is not None and not self.begun
        made = self.folder.with_name(f"{self.folder.name}.partial")
        shutil.rmtree(made, ignore_errors=True)
        result = other.folder / summary["checkpoint"]
        files = sorted(str(file.relative_to(result)) for file in result.rglob("*") if file.is_file())
        copy_linked(result, made / result.name, files, lambda file: True)
        StageCheckpoints(made).finish(summary | {"seconds": 0.0, "taken_from": str(other.folder)})
        os.replace(made, self.folder)

    @property
    def finished(self) -> dict[str, Any] | None:
        """The stage's closing summary, with ``checkpoint`` naming its result; None while it is unfinished."""
        path = self.folder / "finished.json"
        if not path.exists():
            return None
        with own_file(path, "delete it, and `stdist train` writes it again from the newest checkpoint"):
            summary = json.loads(path.read_text())
            crc = summary.pop("crc32", None)  # of a stage that an older version finished there is none
            if absent := SUMMARY - summary.keys():
                raise KeyError(f"it has no {sorted(absent)[0]}")
            if crc not in (None, _json_crc32(summary)):
                raise ValueError("it is not as it was written")
        return summary

    def finish(self, summary: dict[str, Any]) -> None:
        if self.group.is_main:
            sealed = summary | {"crc32": _json_crc32(summary)}
            write_atomically(self.folder / "finished.json", to_json(sealed, indent=1))
        self.group.all_gather_object(None)


class _Shards(Mapping[str, Tensor]):
    """Tensors of several safetensors files, each read when it is asked for, and joined where learners had parts."""

    def __init__(self, paths: list[Path]):
        self._parts: dict[str, list[tuple[int, Any, str]]] = {}
        for path in paths:
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118
                name, _, start = key.partition("@")
                self._parts.setdefault(name, []).append((int(start or 0), file, key))

    def __getitem__(self, name: str) -> Tensor:
        parts = sorted(self._parts[name], key=lambda part: part[0])
        tensors = [file.get_tensor(key) for _, file, key in parts]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _damage(path: Path, concerns: Callable[[str], bool] = lambda name: True) -> str | None:
    """Returns the damage of a checkpoint, None where every file that ``concerns`` is as it was written."""
    try:
        state = json.loads((path / STATE).read_text())
        if state.pop("crc32") != _json_crc32(state):
            return f"{STATE} is not as it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "it has no trainer state"
    for name in filter(concerns, state["files"]):
        try:
            if _crc32(path / name) != state["files"][name]:
                return f"{name} is not as it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _json_crc32(state: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(state).encode())


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc
