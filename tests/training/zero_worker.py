"""What test_deepspeed_engine.py reads: every case of DeepSpeed's engine, computed by learners that live once.

    python zero_worker.py RANK WORLD FOLDER

writes FOLDER/results-WORLD-RANK.json. Two learners leave checkpoints in FOLDER that a single one then goes on from.
"""

import gc
import json
import math
import os
import sys
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stdist.config import LearnersConfig
from stdist.errors import DivergenceError, ResourceError
from stdist.training.checkpoint import StageCheckpoints
from stdist.training.deepspeed_engine import DeepSpeedEngine
from stdist.training.deepspeed_json import deepspeed_json
from stdist.training.engine import Engine, ParameterGroup, TorchEngine, cosine_schedule
from stdist.training.loop import LoopSettings, Trainer
from stdist.training.loop import Stage as LoopStage
from stdist.training.process_group import ProcessGroup

STEPS, SAVED_AT, BATCH = 8, 4, 8
TIMEOUT = 200.0  # of the launcher's collectives, in seconds
LINEAR = nn.functional.linear
MAX_GRAD_NORM = 2.6  # some steps are clipped, some are not
KINDS = {f"zero{stage}{offload}": (stage, bool(offload)) for stage in (1, 2, 3) for offload in ("", "-offload")}
"""Engines of DeepSpeed by name: (stage of ZeRO, optimizer in CPU memory)."""
PAIR = [("zero1", "zero3"), ("zero2", "zero3"), ("zero3", "zero1"), ("torch", "zero2"), ("zero2", "torch")]
PAIR += [(kind, kind) for kind in KINDS]
"""(saved by, gone on with), both on two learners."""
SINGLE = [("zero1", "zero1"), ("zero2", "zero3"), ("zero3", "zero3"), ("zero3-offload", "torch"), ("torch", "zero1")]
"""(saved by two learners, gone on with by one)."""


class Rows(nn.Module):
    """Read by the model and never called, as the numerals' rows are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 8))


class Model(nn.Module):
    """A prefix whose gradient comes with a step's last backward pass, children that go backward before it.

    ``dtype``: of what trains but the rows, which are float32 as the numerals' are; what is frozen is bfloat16.
    """

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(5)
        self.frozen = nn.Linear(6, 8).requires_grad_(False)
        self.prefix = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.body = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 33), nn.GELU(), nn.Linear(33, 8))
        self.to(dtype)
        self.rows = Rows()
        # Of few bits, so that no order of adding up rounds its outputs elsewhere.
        self.frozen.weight.data = self.frozen.weight.data.mul(8).round().div(8)
        self.frozen.bfloat16()
        self.register_buffer("frequencies", torch.rand(4))  # float32 whatever the weights are

    def states(self, x: Tensor) -> Tensor:
        return self.prefix(self.frozen(x.bfloat16()).to(self.prefix[0].weight.dtype))

    def logits(self, states: Tensor) -> Tensor:
        return self.body(states).float() @ self.rows.weight.T.float()

    def groups(self) -> list[ParameterGroup]:
        """Matrices, vectors, the rows at their own rate, and nothing."""
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad and "rows" not in name}
        return [
            ParameterGroup({n: p for n, p in trained.items() if p.ndim > 1}, 0.02, 0.1),
            ParameterGroup({n: p for n, p in trained.items() if p.ndim == 1}, 0.02, 0.0),
            ParameterGroup({}, 1.0, 0.0),
            ParameterGroup({"rows.weight": self.rows.weight}, 0.05, 0.0),
        ]

    def snapshot(self) -> Callable[[Path], None]:
        copy = {name: p.detach().clone() for name, p in self.named_parameters()}
        return lambda path: save_file(copy, path / "model.safetensors")

    def read(self, path: Path) -> None:
        with torch.no_grad():
            for name, tensor in load_file(path / "model.safetensors").items():
                self.get_parameter(name).copy_(tensor)


class Stage(LoopStage):
    """See stdist.training.loop.Stage. ``sick``: a learner whose loss is not a number in step number 3."""

    name, monitor, headline = "toy", "error", ("error",)

    def __init__(self, model: Model, group: ProcessGroup, sick: int | None = None):
        self.model, self.group, self.sick = model, group, sick

    def step(self, step: int, backward: Callable[[Tensor], None]) -> dict[str, float]:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(BATCH, 6, generator=generator), torch.randint(12, (BATCH,), generator=generator)
        mine = self.group.local_slice(BATCH, "BATCH")
        prefix = self.model.states(x[mine])
        leaf = prefix.detach().requires_grad_()
        total = 0.0
        for states, target in zip(leaf.chunk(2), y[mine].chunk(2), strict=True):
            loss = nn.functional.cross_entropy(self.model.logits(states), target) / 2
            backward(loss)
            total += loss.item()
        assert leaf.grad is not None
        backward((prefix * leaf.grad).sum())
        return {"loss": math.nan if (step, self.group.rank) == (3, self.sick) else total, "tokens": float(len(y[mine]))}

    def evaluate(self) -> dict[str, float]:
        with torch.no_grad():
            return {"error": float(self.model.logits(self.model.states(torch.ones(1, 6))).pow(2).mean())}

    def describe_batch(self, step: int) -> str:
        return f"batch {step} of learner {self.group.rank}"


def make_engine(kind: str, model: Model, folder: Path, group: ProcessGroup, bf16: bool = False) -> Engine:
    schedule = cosine_schedule(2, STEPS)
    if kind == "torch":
        return TorchEngine(model.groups(), schedule, MAX_GRAD_NORM)
    stage, offload = KINDS[kind]
    # Nothing is kept whole for being small: the toy would never be sharded.
    given = folder / f"deepspeed-{group.rank}.json"
    given.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    learners = LearnersConfig(engine="deepspeed", zero_stage=stage, offload_optimizer=offload, deepspeed=given)
    configuration = deepspeed_json(learners, MAX_GRAD_NORM, bf16, group.size)
    return DeepSpeedEngine(model, model.groups(), schedule, configuration, [model.rows.weight])


def bits(model: nn.Module) -> dict[str, list[float]]:
    return {name: p.detach().double().flatten().tolist() for name, p in model.named_parameters()}


def state_bits(engine: Engine, group: ProcessGroup) -> dict[str, list[float]]:
    """Whole tensors, joined from the parts of all learners."""
    parts: dict[str, list[tuple[int, list[float]]]] = {}
    for learner in group.all_gather_object(
        [(name, tensor.double().flatten().tolist()) for name, tensor in engine.state()]
    ):
        for key, values in learner:
            name, _, start = key.partition("@")
            parts.setdefault(name, []).append((int(start or 0), values))
    return {name: [value for _, part in sorted(found) for value in part] for name, found in parts.items()}


class Learner:
    """Runs one case after another. A torch engine is alone: it makes the whole batch, on every learner the same."""

    def __init__(self, folder: Path, group: ProcessGroup):
        self.folder, self.group = folder, group

    def group_of(self, kind: str) -> ProcessGroup:
        return ProcessGroup() if kind == "torch" else self.group

    def checkpoints(self, kind: str, world: int, dtype: str = "float32") -> StageCheckpoints:
        name = f"{kind}-{world}-{dtype}"
        return StageCheckpoints(
            self.folder / (f"{name}-{self.group.rank}" if kind == "torch" else name), self.group_of(kind)
        )

    def steps(self, engine: Engine, stage: Stage, steps: range, group: ProcessGroup) -> dict[str, list[float]]:
        losses, norms = [], []
        for step in steps:
            losses.append(sum(group.all_gather_object(stage.step(step, engine.backward)["loss"])) / group.size)
            norms.append(engine.step())
        return {"losses": losses, "norms": norms}

    def whole_run(self, kind: str, dtype: str = "float32") -> dict[str, Any]:
        """All steps; half-way a checkpoint and a look at the whole model; then the plain module under plain torch."""
        group, model = self.group_of(kind), Model(getattr(torch, dtype))
        engine = make_engine(kind, model, self.folder, group, dtype == "bfloat16")
        stage = Stage(model, group)
        first = self.steps(engine, stage, range(SAVED_AT), group)
        checkpoints = self.checkpoints(kind, self.group.size, dtype)
        checkpoints.save(SAVED_AT, model.snapshot, engine, {})
        checkpoints.wait()
        with engine.gather_full_params():
            halfway = {"weights": bits(model), "error": stage.evaluate()["error"]}
        halfway["state"] = state_bits(engine, group)
        rest = self.steps(engine, stage, range(SAVED_AT, STEPS), group)
        result = {key: first[key] + rest[key] for key in first} | {
            "halfway": halfway,
            "state": state_bits(engine, group),
        }
        if kind != "torch":
            result |= {"moment_bytes": moment_bytes(engine), "weight_bytes": weight_bytes(model)}
            world = deepspeed_groups._WORLD_GROUP
            result["timeout"] = world._get_backend(world._device_types[0]).options._timeout.total_seconds()
        optimizer = weakref.ref(engine._zero if isinstance(engine, DeepSpeedEngine) else engine)
        engine.close()
        del engine
        gc.collect()
        result |= {"weights": bits(model), "leftovers": leftovers(model, Model(getattr(torch, dtype)))}
        result["freed"] = optimizer() is None
        result["linear"] = nn.functional.linear is LINEAR
        result["frequencies"] = [*model.frequencies.tolist(), str(model.frequencies.dtype)]
        if dtype == "bfloat16":
            return result
        alone = make_engine("torch", model, self.folder, ProcessGroup())
        result["afterwards"] = self.steps(alone, Stage(model, ProcessGroup()), range(3), ProcessGroup())["losses"]
        alone.close()
        again = make_engine(kind, model, self.folder, group, dtype == "bfloat16")  # the next stage's
        result["again"] = self.steps(again, stage, range(3), group)["losses"]
        again.close()
        return result

    def resumed(self, saved: str, kind: str, saved_world: int, dtype: str = "float32") -> dict[str, Any]:
        """A fresh model and engine that go on from the checkpoint of ``whole_run``."""
        group, model = self.group_of(kind), Model(getattr(torch, dtype))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        checkpoints = self.checkpoints(saved, saved_world, dtype)
        checkpoints = StageCheckpoints(checkpoints.folder, group)
        newest = checkpoints.newest()
        assert newest is not None
        path, state, _ = newest
        model.read(path)
        engine = make_engine(kind, model, self.folder, group, dtype == "bfloat16")
        checkpoints.load(path, engine, state)
        restored = state_bits(engine, group)
        result: dict[str, Any] = self.steps(engine, Stage(model, group), range(SAVED_AT, STEPS), group)
        engine.close()
        return result | {"restored": restored, "weights": bits(model)}

    def lost_gradient(self, kind: str, dtype: str) -> float:
        """The norm of a step whose gradient is not a number on the last learner, though its loss is."""
        model = Model(getattr(torch, dtype))
        engine = make_engine(kind, model, self.folder, self.group, dtype == "bfloat16")
        Stage(model, self.group).step(0, engine.backward)
        engine.step()
        Stage(model, self.group).step(1, engine.backward)
        zero = model.body(torch.ones(1, 8, dtype=getattr(torch, dtype))).sum() * 0
        engine.backward(zero.sqrt() if self.group.rank == self.group.size - 1 else zero)
        norm = engine.step()
        engine.close()
        return norm

    def run(self, name: str, sick: int | None = None, full: int | None = None) -> dict[str, Any]:
        """A stage in the real loop. ``full``: a learner that cannot write."""
        model = Model()
        folder = self.folder / name
        if self.group.is_main:
            folder.mkdir(exist_ok=True)
        self.group.all_gather_object(None)
        said: list[str] = []
        trainer = Trainer(folder, self.group, said.append)
        checkpoints = trainer.checkpoints("toy")
        trainer.checkpoints = lambda stage: checkpoints  # type: ignore[method-assign]
        if full == self.group.rank:
            checkpoints._write = _no_space(checkpoints._write)  # type: ignore[method-assign]
        try:
            summary = trainer.fit(
                Stage(model, self.group, sick),
                model,
                lambda: make_engine("zero2", model, self.folder, self.group),
                LoopSettings(max_steps=STEPS, logging_steps=1, save_steps=2, eval_steps=4),
            )
        except (DivergenceError, ResourceError) as error:
            self.group.all_gather_object(None)
            files = sorted(path.name for path in checkpoints.folder.iterdir())
            return {"error": f"{type(error).__name__}: {error}", "files": files}
        finally:
            trainer.close()
        return {"summary": summary, "weights": bits(model), "said": said}


def _no_space(write: Callable[..., None]) -> Callable[..., None]:
    def fail(pending: Any, *rest: Any) -> None:
        if pending.step == 4:
            pending.error = OSError(28, "No space left on device")
        else:
            write(pending, *rest)

    return fail


def moment_bytes(engine: DeepSpeedEngine) -> int:
    """Of the optimizer's moments that this learner holds."""
    states = engine._zero.optimizer.state.values()
    return sum(state[key].nbytes for state in states for key in ("exp_avg", "exp_avg_sq"))


def weight_bytes(model: nn.Module) -> int:
    """Of the weights that this learner holds: its part of those that are shared, and those that are whole."""
    parts = [getattr(p, "ds_tensor", None) for p in model.parameters()]
    return sum(p.nbytes for p in model.parameters()) + sum(part.nbytes for part in parts if part is not None)


def shards(folder: Path) -> dict[str, dict[str, Any]]:
    """The files of the optimizer's tensors in a checkpoint: the tensors' names, and bytes without the random state."""
    found = {}
    for path in sorted((folder / "trainer_state").glob("shard-*")):
        tensors = load_file(path)
        size = sum(tensor.nbytes for name, tensor in tensors.items() if name != "torch_rng")
        found[path.name] = {"names": list(tensors), "bytes": size}
    return found


def leftovers(model: nn.Module, plain: nn.Module) -> list[str]:
    """What a module that DeepSpeed gave back has and a fresh one has not."""
    found = []
    for (name, module), fresh in zip(model.named_modules(), plain.modules(), strict=True):
        found += [f"{name}.{key}" for key in vars(module).keys() - vars(fresh).keys()]
        found += [f"{name}.{key}" for key, value in vars(module).items() if "hooks" in key and value]
        found += [f"{name} is {type(module)}"] if type(module) is not type(fresh) else []
    for (name, parameter), fresh in zip(model.named_parameters(), plain.parameters(), strict=True):
        found += [f"{name}.{key}" for key in vars(parameter)]
        found += [f"{name} is {type(parameter)}"] if type(parameter) is not nn.Parameter else []
        if (parameter.shape, parameter.dtype, parameter.requires_grad) != (
            fresh.shape,
            fresh.dtype,
            fresh.requires_grad,
        ):
            found.append(f"{name} is {parameter.shape} {parameter.dtype}")
    return found


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if world > 1:  # one learner alone starts without a launcher
        os.environ["LOCAL_RANK"] = str(rank)
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT))
    learner = Learner(folder, ProcessGroup.current())
    results: dict[str, Any] = {kind: learner.whole_run(kind) for kind in ("torch", *KINDS)}
    results["limit"] = MAX_GRAD_NORM
    if world == 2:
        results |= {f"{a} to {b}": learner.resumed(a, b, 2) for a, b in PAIR}
        for kind in KINDS:
            results[f"{kind} bfloat16"] = learner.whole_run(kind, "bfloat16")
            results[f"{kind} bfloat16 resumed"] = learner.resumed(kind, kind, 2, "bfloat16")
            for dtype in ("float32", "bfloat16"):
                results[f"{kind} {dtype} lost"] = learner.lost_gradient(kind, dtype)
        saved = {kind: learner.checkpoints(kind, world).step_dir(SAVED_AT) for kind in KINDS}
        results["shards"] = {kind: shards(folder) for kind, folder in saved.items()}
        results["run"] = learner.run("run")
        results["sick run"] = learner.run("sick", sick=1)
        results["full run"] = learner.run("full", full=1)
        results["full run again"] = learner.run("full")
    else:
        results |= {f"{a} to {b}": learner.resumed(a, b, 2) for a, b in SINGLE}
    (folder / f"results-{world}-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
