"""DeepSpeed's engine is plain torch on the whole batch: losses, gradient norms, weights and state, on 1 and 2 learners.

``zero_worker.py`` computes all cases in processes that start once; the tests read what they found.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from stdist.errors import InputError

pytest.importorskip("deepspeed")
from stdist.training.deepspeed_engine import DeepSpeedEngine

SCRIPT = Path(__file__).with_name("zero_worker.py")
KINDS = [f"zero{stage}{offload}" for stage in (1, 2, 3) for offload in ("", "-offload")]
Results = dict[tuple[int, int], dict[str, Any]]
"""By (learners, rank)."""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    folder = tmp_path_factory.mktemp("zero")
    found: Results = {}
    for world in (2, 1):  # the single learner goes on from what the two have saved
        logs = [folder / f"{world}-{rank}.log" for rank in range(world)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment.pop("LOCAL_RANK", None)
        learners = []
        for rank, log in enumerate(logs):
            command = [sys.executable, str(SCRIPT), str(rank), str(world), str(folder)]
            with log.open("w") as output:
                learners.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment))
        for rank, (learner, log) in enumerate(zip(learners, logs, strict=True)):
            assert learner.wait(timeout=600) == 0, log.read_text()[-3000:]
            found[world, rank] = json.loads((folder / f"results-{world}-{rank}.json").read_text())
    return found


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("zero_worker", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _close(found: Any, expected: Any, relative: float = 1e-6, absolute: float = 1e-6) -> bool:
    """Whether two trees of numbers have the same names, lengths and numbers."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            _close(found[key], expected[key], relative, absolute) for key in expected
        )
    return found == pytest.approx(expected, rel=relative, abs=absolute)


LEARNERS = [(1, 0), (2, 0), (2, 1)]


@pytest.mark.parametrize("learner", LEARNERS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_is_plain_torch_on_the_whole_batch(results, kind, learner):
    """Prefix, children and rows, clipped and not: the prefix's only gradient comes with the last backward pass of a
    step, which DeepSpeed alone gets wrong. In the middle of the run the model was saved and called whole."""
    found, expected = results[learner][kind], results[learner]["torch"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-6)
    assert _close(found["weights"], expected["weights"])


def test_the_toy_would_show_a_wrong_gradient(results):
    """Losses move, norms lie on both sides of the limit of clipping, and every weight that trains has moved."""
    run = results[1, 0]["torch"]
    assert len(run["losses"]) >= 6 and len({round(loss, 2) for loss in run["losses"]}) >= 6
    assert min(run["norms"]) < results[1, 0]["limit"] < max(run["norms"])
    moved = [name for name, weights in run["weights"].items() if weights != run["halfway"]["weights"][name]]
    assert set(run["weights"]) - set(moved) == {"frozen.weight", "frozen.bias"}


@pytest.mark.parametrize("learner", LEARNERS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_all_weights_are_there_inside_gather_full_params(results, kind, learner):
    """Also of ZeRO-3, and the model can be called. That training after it goes right the whole run shows."""
    found, expected = results[learner][kind]["halfway"], results[learner]["torch"]["halfway"]
    assert _close(found["weights"], expected["weights"])
    assert found["error"] == pytest.approx(expected["error"], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_the_state_are_torchs_own(results, kind):
    for learner in LEARNERS:
        expected = results[learner]["torch"]["state"]
        assert _close(results[learner][kind]["state"], {k: v for k, v in expected.items() if not k.endswith("/step")})


# --- from one engine and number of learners to another -------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(results, kind, rank):
    whole, resumed = results[2, rank][kind], results[2, rank][f"{kind} to {kind}"]
    assert resumed["restored"] == whole["halfway"]["state"]
    assert resumed["losses"] == whole["losses"][4:] and resumed["norms"] == whole["norms"][4:]
    assert resumed["weights"] == whole["weights"]


def test_a_checkpoint_of_any_engine_serves_any_other(results, worker):
    """ZeRO's stages, plain torch, and fewer learners."""
    pairs = [(2, a, b) for a, b in worker.PAIR if a != b] + [(1, a, b) for a, b in worker.SINGLE]
    assert len(pairs) == 10
    for world, saved_by, resumed_by in pairs:
        resumed, whole = results[world, 0][f"{saved_by} to {resumed_by}"], results[2, 0][saved_by]
        case = f"{saved_by} of 2 to {resumed_by} of {world}"
        assert resumed["losses"] == pytest.approx(whole["losses"][4:], rel=1e-6), case
        assert resumed["norms"] == pytest.approx(whole["norms"][4:], rel=1e-6), case
        assert _close(resumed["weights"], whole["weights"]), case


# --- bfloat16 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_keeps_float32_masters_that_come_back_bitwise(results, kind):
    whole, resumed = results[2, 0][f"{kind} bfloat16"], results[2, 0][f"{kind} bfloat16 resumed"]
    saved = whole["halfway"]
    masters = {name.removesuffix("/master"): v for name, v in saved["state"].items() if name.endswith("/master")}
    assert set(masters) == set(saved["weights"]) - {"frozen.weight", "frozen.bias"}
    finer = sum(master != saved["weights"][name] for name, master in masters.items())
    assert finer == len(masters)  # what bfloat16 rounds away is kept
    assert all(_close(master, saved["weights"][name], 2**-8, 0) for name, master in masters.items())
    assert resumed["restored"] == saved["state"]
    assert resumed["losses"] == whole["losses"][4:] and resumed["weights"] == whole["weights"]


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_keep_their_float32(results, kind):
    """Rotary frequencies, for instance, are no weights."""
    assert results[2, 0][f"{kind} bfloat16"]["frequencies"] == results[2, 0]["torch"]["frequencies"]


# --- what it costs, and what is left -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_learner_holds_its_share_of_the_moments(results, kind):
    """Two float32 moments of every trained weight, over the learners; ZeRO pads what it cannot share evenly."""
    weights = results[1, 0]["torch"]["weights"]
    trained = sum(len(values) for name, values in weights.items() if "frozen" not in name)
    for world, rank in LEARNERS:
        share, padding = 2 * 4 * trained / world, 2 * 4 * 2 * len(weights)
        assert share <= results[world, rank][kind]["moment_bytes"] <= share + padding


@pytest.mark.parametrize(("kind", "shared"), [("zero1", False), ("zero2", False), ("zero3", True)])
def test_only_zero_3_shares_the_weights(results, kind, shared):
    weights = results[1, 0]["torch"]["weights"]
    whole = sum(len(values) * (2 if "frozen" in name else 4) for name, values in weights.items())
    rows, parameters = 4 * len(weights["rows.weight"]), len(weights)
    for rank in (0, 1):
        held = results[2, rank][kind]["weight_bytes"]
        # The rows are read outside of their module: each learner keeps them, beside its part of them.
        assert held == whole if not shared else whole / 2 <= held - rows <= whole / 2 + 4 * parameters


@pytest.mark.parametrize("precision", ["", " bfloat16"])
@pytest.mark.parametrize("learner", [(2, 0), (2, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_closing_gives_the_plain_module_back(results, kind, learner, precision):
    """No attribute, hook or class of DeepSpeed's is left, every weight has its own precision again (of bfloat16
    weights the rows are float32), nothing holds the optimizer's memory, and ``linear`` is torch's."""
    found = results[learner][kind + precision]
    assert found["leftovers"] == [] and found["freed"] and found["linear"]


@pytest.mark.parametrize("learner", LEARNERS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_closed_trains_on_under_torch_and_under_zero(results, kind, learner):
    """As the stages of a run follow each other on one model."""
    for then in ("afterwards", "again"):
        assert results[learner][kind][then] == pytest.approx(results[learner]["torch"][then], rel=1e-6), then


def test_deepspeeds_own_group_waits_as_long_as_the_launchers(results, worker):
    """Without a time-out of its own it would wait for half an hour."""
    assert [results[2, rank]["zero1"]["timeout"] for rank in (0, 1)] == [worker.TIMEOUT] * 2


@pytest.mark.parametrize("version", ["0.19.7", "0.20.0", "1.0"])
def test_another_deepspeed_is_refused_in_one_line(version):
    from stdist.training.deepspeed_internals import check_version

    with pytest.raises(InputError, match=f"^DeepSpeed {version} is not supported; pip install 'deepspeed>=0.19.8,<0.2"):
        check_version(version)


def test_the_deepspeed_that_is_supported_is_the_one_that_is_installed_with_stdist():
    from stdist.training.deepspeed_internals import SUPPORTED, check_version

    check_version("0.19.8")
    check_version("0.19.12+cu128")
    first, below = SUPPORTED
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert project.count(f'"deepspeed>={first},<{below}"') == project.count('"deepspeed>=') == 2


# --- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_no_number_shows_in_the_norm_of_all(results, kind, dtype):
    """DeepSpeed leaves such a step out in silence; the loop stops at the norm."""
    assert [results[2, rank][f"{kind} {dtype} lost"] for rank in (0, 1)] == [float("inf")] * 2


def test_a_lost_loss_names_its_learner_on_every_learner(results):
    for rank in (0, 1):
        error = results[2, rank]["sick run"]["error"]
        assert error.startswith("DivergenceError: toy: loss is nan at step 4, learner 1, on batch 3 of learner 1;")


def test_a_learner_that_cannot_write_stops_all_and_the_next_start_finishes(results):
    """The checkpoint before stays; going on from it ends where the uninterrupted run did."""
    for rank in (0, 1):
        found = results[2, rank]
        assert found["full run"]["error"].startswith("ResourceError: ") and "\n" not in found["full run"]["error"]
        assert (
            "step-4 could not be written (learner 1: OSError: [Errno 28] No space left on device)"
            in found["full run"]["error"]
        )
        assert found["full run"]["files"] == ["latest", "step-0", "step-2"]
        assert found["full run again"]["weights"] == found["run"]["weights"]
        seconds = ("seconds",)
        summaries = [found[name]["summary"] for name in ("full run again", "run")]
        assert all(summaries[0][key] == summaries[1][key] for key in summaries[0] if key not in seconds)


def test_learners_share_a_checkpoint_by_bytes(results):
    """Every learner writes what it keeps, about as much as the others; every element is in one file."""
    for kind in ("zero1", "zero3-offload"):
        shards = results[2, 0]["shards"][kind]
        names = {n.partition("@")[0] for shard in shards.values() for n in shard["names"] if n != "torch_rng"}
        assert list(shards) == ["shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"]
        assert sorted(names) == sorted(results[2, 0][kind]["halfway"]["state"])
        sizes = [shard["bytes"] for shard in shards.values()]
        total = sum(4 * len(values) for values in results[2, 0][kind]["halfway"]["state"].values())
        # ZeRO pads what it cannot share evenly: up to an element a tensor.
        assert sum(sizes) == total and abs(sizes[0] - sizes[1]) <= 4 * len(names)


@pytest.mark.parametrize(("on_gpu", "backend"), [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_one_learner_makes_the_group_of_its_device(monkeypatch, on_gpu, backend):
    """gloo alone would send a GPU's tensors through the CPU, and knows not all collectives for them."""
    made = []

    def init(backend: str, **_: Any) -> None:
        made.append(backend)
        raise ConnectionError  # nothing further is to be made

    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    with pytest.raises(ConnectionError):
        DeepSpeedEngine(torch.nn.Linear(1, 1), [], lambda step: 1.0, {})
    assert made == [backend]
