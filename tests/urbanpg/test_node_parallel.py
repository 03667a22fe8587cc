"""UrbanPG with its nodes on 2 and 4 learners is UrbanPG in one process; ``node_worker.py`` computes every case."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stdist.errors import InputError
from stdist.nodes.learners import NodeLearners, check_grid
from stdist.training.process_group import ProcessGroup
from stdist.urbanpg.node_parallel import NodeParallel

pytest.importorskip("deepspeed")

SCRIPT = Path(__file__).with_name("node_worker.py")
TWO = pytest.param(2, "1x2", marks=pytest.mark.slow)
LAYOUTS = [TWO, (4, "1x4"), (4, "2x2")]
"""Learners, and how many of them along ``data`` and ``nodes``."""
CASES = [
    "paper",
    "sum",
    "no residual",
    "no stca",
    "no temporal context",
    "no spatial context",
    "blocks",
    "frozen backbone",
]
TRAININGS = ["zero1", "zero2", "zero2-offload", "zero1 continual", "zero1 continual without noise"]
ALONE = ["zero1", "zero1 continual", "zero1 continual without noise"]


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("node_worker", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def alone(worker, folder) -> dict[str, dict[str, Any]]:
    """The trainings in this process, with plain torch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {name: worker.train(name, folder / f"torch {name}", 6, NodeLearners(worker.NODES)) for name in ALONE}
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module")
def results(folder, alone) -> Callable[[int], list[dict[str, Any]]]:
    """By number of learners, what each of them found. They go on from what fewer and more of them have saved."""

    @cache
    def of(world: int) -> list[dict[str, Any]]:
        if world == 2:
            of(4)
        logs = [folder / f"{world}-{rank}.log" for rank in range(world)]
        ranks = []
        for rank, log in enumerate(logs):
            command = [sys.executable, str(SCRIPT), str(rank), str(world), str(folder)]
            with log.open("w") as output:
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                ranks.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment))
        try:
            for process, log in zip(ranks, logs, strict=True):
                assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
        finally:
            for process in ranks:
                process.kill()
        return [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]

    return of


# --- one step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_values_and_gradients_are_those_of_one_process(results, world, layout, case):
    for rank in results(world):
        differences = rank[f"{layout} {case}"]
        assert len(differences) > 5
        assert {name: value for name, value in differences.items() if not value <= 1e-5} == {}


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_bytes_sent_do_not_depend_on_the_number_of_nodes(results, world):
    d, S, K, samples, slots = 16, 6, 4, 4, 24
    backbone = (S + 1) * d + 3 * (d + 1) * d + 2 * (d + 1) * d + (d + 1) * K
    prompts = (slots + 7 + 1) * d
    sums = samples * (d + 1) * (S + 1)
    expected = 4 * (2 * sums + backbone + prompts) + 8 + 8  # and the number of points and of the draw
    for rank in results(world):
        assert set(rank["sent"].values()) == {expected}


# --- training in the real loop -------------------------------------------------------------------------------------


def test_the_trainings_would_show_a_wrong_norm(alone, worker):
    """Norms lie on both sides of the limit of clipping."""
    for name in ALONE:
        assert min(alone[name]["norms"]) < worker.TRAININGS[name][2] < max(alone[name]["norms"])


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_training_is_that_of_one_process_with_torch(results, alone, folder, world, layout, name):
    _assert_same_training(results(world), alone, folder, f"{layout} {name}")


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_zero_3_trains_where_every_learner_has_all_nodes(results, alone, folder, world):
    """UrbanPG reads weights outside of their own modules' calls."""
    _assert_same_training(results(world), alone, folder, f"{world}x1 zero3")


def _assert_same_training(ranks: list[dict[str, Any]], alone: dict[str, dict[str, Any]], folder: Path, run: str):
    """Losses, gradient norms, the evaluation behind the last step and the saved model of the whole city."""
    reference = next(name for name in reversed(ALONE) if name in run or name == "zero1")
    for rank in ranks:
        for what in ("losses", "norms", "mae"):
            assert rank[run][what] == pytest.approx(alone[reference][what], rel=1e-5), what
    saved, whole = (_model(folder / name / "step-6") for name in (run, f"torch {reference}"))
    assert saved.keys() == whole.keys()
    for key, tensor in whole.items():
        assert torch.allclose(saved[key], tensor, rtol=1e-4, atol=1e-4), key


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_shared_weights_are_the_same_bits_on_every_learner(results, world, layout, name):
    assert len({json.dumps(rank[f"{layout} {name}"]["shared"]) for rank in results(world)}) == 1


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_frozen_means_frozen(results, folder, worker, world, layout):
    results(world)
    before = worker.make(worker.NODES, worker.CONTINUAL).state_dict()
    after = _model(folder / f"{layout} zero1 continual" / "step-6")
    backbone = {key for key in before if key.startswith("backbone")}
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert same == backbone | {"prompts.node_rows.0", "prompts.mean", "prompts.std"}


@pytest.mark.parametrize(
    ("world", "saved", "layout"),
    [
        (4, "torch", "1x4"),
        (4, "1x4", "1x4"),
        (4, "1x4", "2x2"),
        pytest.param(2, "2x2", "1x2", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_serves_other_learners(results, alone, world, saved, layout):
    for rank in results(world):
        for what in ("losses", "norms"):
            assert rank[f"{saved} to {layout}"][what] == pytest.approx(alone["zero1"][what][3:], rel=1e-5)
            if saved == layout:
                assert rank[f"{saved} to {layout}"][what] == rank[f"{layout} zero1"][what][3:]


@pytest.mark.parametrize("saved", ["1x4", "2x2"])
def test_a_checkpoint_serves_one_process_with_torch(results, alone, worker, folder, saved):
    results(4)
    learners = NodeLearners(worker.NODES)
    copy = worker.at_checkpoint(folder / f"{saved} zero1", folder / f"{saved} to torch", learners)
    resumed = worker.train("zero1", copy, 6, learners)
    for what in ("losses", "norms"):
        assert resumed[what] == pytest.approx(alone["zero1"][what][3:], rel=1e-5)


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_rows_and_their_moments_are_shared(results, folder, worker, world, layout):
    """Each row is on one learner along ``nodes``; of every moment each element is in one learner's file, and those of
    rows as equally as nodes and ZeRO's layout allow."""
    results(world)
    elements, along = worker.NODES * worker.D, int(layout[-1])
    for rank in results(world):
        assert abs(rank[f"{layout} zero1"]["rows"] - elements / along) < worker.D
    shards = [load_file(path) for path in sorted((folder / f"{layout} zero1/step-6/trainer_state").glob("shard-*"))]
    moments: dict[str, list[int]] = {}
    for shard in shards:
        mine = {key: part.numel() for key, part in shard.items() if key.partition("@")[0].endswith("exp_avg")}
        for key, count in mine.items():
            name, _, start = key.partition("/exp_avg@")
            moments.setdefault(name, []).extend(range(int(start), int(start) + count))
        rows = sum(count for key, count in mine.items() if "node_rows" in key)
        assert rows <= elements / along + worker.D
    for name, parameter in worker.make(worker.NODES, {}).named_parameters():
        assert sorted(moments.pop(name)) == list(range(parameter.numel())), name
    assert not moments


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_closing_leaves_no_hook(results, world, layout):
    assert all(rank[f"{layout} {name}"]["hooks"] == [] for rank in results(world) for name in TRAININGS)


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_a_silent_learner_is_waited_for_as_long_as_the_launcher_says(results, worker, world, layout):
    assert all(rank[f"{layout} waits"] == [worker.WAITS] * 2 for rank in results(world))


# --- who holds what ------------------------------------------------------------------------------------------------


def test_every_node_and_window_is_some_learners_and_none_is_twos():
    for nodes, along, size in [(4, 4, 4), (41, 2, 6), (1_000_003, 7, 7)]:
        grid = [NodeLearners(nodes, along, ProcessGroup(rank, size)) for rank in range(size)]
        for row in range(size // along):
            held = [learners.node_slice for learners in grid if learners.data_rank == row]
            assert [h.start for h in held] + [nodes] == [0] + [h.stop for h in held]
            assert max(h.stop - h.start for h in held) - min(h.stop - h.start for h in held) <= 1
        assert [learners.share(12 * size) for learners in grid] == [12 * along] * size
        assert len({(learners.data_rank, learners.node_rank) for learners in grid}) == size


def test_one_process_alone_has_all_and_needs_no_group(model, batch):
    learners = NodeLearners.current(30)
    assert (learners.node_slice, learners.share(7), learners.mpu) == (slice(0, 30), 7, None)
    assert learners.total(torch.tensor(3)) == 3
    whole = model()
    parallel = NodeParallel(whole.backbone, whole.prompts, learners)
    assert torch.equal(parallel(*batch(), noise_seed=5), whole(*batch(), noise_seed=5))
    assert parallel.trained_parameters().keys() == dict(whole.named_parameters()).keys()


@pytest.mark.parametrize(
    ("grid", "line"),
    [
        ((6, 4, 100, 1), "learners.num_workers 6 is no multiple of nodes.ranks 4; change one of the two"),
        ((4, 4, 3, 1), "3 nodes cannot be shared by nodes.ranks 4; use at most 3"),
        ((4, 2, 30, 3), "learners.zero_stage 3 does not go with nodes.ranks; set it to 1 or 2"),
        ((4, 1, 30, 3, 10), "learners.zero_stage 3 does not go with nodes.block_nodes; set it to 1 or 2"),
    ],
)
def test_what_cannot_be_shared_is_refused_in_one_line(grid, line):
    for fits in ((4, 2, 30, 2, 10), (4, 4, 4, 1), (4, 1, 30, 3)):
        check_grid(*fits)
    with pytest.raises(InputError, match=f"^{line}[^\n]*$"):
        check_grid(*grid)


def test_prompts_of_other_nodes_are_refused(model):
    with pytest.raises(InputError, match="prompts of 30 nodes, learners of 31; give both the same"):
        NodeParallel(model().backbone, model().prompts, NodeLearners(31))


def test_windows_that_cannot_be_shared_evenly_are_refused():
    with pytest.raises(InputError, match=r"^training\.train_batch_size is 7, which 2 learners cannot share evenly"):
        NodeLearners(41, 2, ProcessGroup(1, 4)).share(7)


def _model(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor
        for part, folder in (("backbone", "backbone"), ("prompts", "prompts/a"))
        for name, tensor in load_file(checkpoint / folder / "model.safetensors").items()
    }
