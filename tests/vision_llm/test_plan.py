"""The plan against what it plans: real tiny policies, their trees, a real AdamW; and the 7B's published shape."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_prep import READERS
from stdist import cli
from stdist.data import GridStore
from stdist.errors import InputError
from stdist.runs.devices import Device
from stdist.runs.memory_plan import Ranks, Weights, parse_memory
from stdist.runs.plan import Hours, StagePlan
from stdist.runs.recipes import load_config, parse_config
from stdist.training.engine import ParameterGroup, TorchEngine, adamw, cosine_schedule
from stdist.vision_llm import stage_costs
from stdist.vision_llm.config import VisionLLMConfig
from stdist.vision_llm.dataset import open_dataset, policy_spec
from stdist.vision_llm.evaluation_costs import TEST, forecast_flops, window_flops, windows_of
from stdist.vision_llm.kernels import token_losses
from stdist.vision_llm.kernels.attention import MATH, Choice
from stdist.vision_llm.learning import begin_stage, parameter_groups
from stdist.vision_llm.plan import costs_of, plan_run, plan_stage, starting_point, workers_for
from stdist.vision_llm.policy.checkpoints import build_policy
from stdist.vision_llm.policy.city_windows import CityWindows
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.policy.presets import build_model
from stdist.vision_llm.policy.spec import PolicySpec, Setting
from stdist.vision_llm.rollout.sampler import Sampler
from stdist.vision_llm.rollout.versions import pack
from stdist.vision_llm.stage_costs import (
    LORA,
    REFERENCE_LORA,
    REFERENCE_ROWS,
    ROWS,
    VISION,
    micro_batches,
    policy_weights,
    shape_policy,
)
from stdist.vision_llm.stages.alignment import AlignmentStage
from stdist.vision_llm.stages.sft import sft_loss, sft_tree
from stdist.vision_llm.tree import prefix_tree
from stdist.vision_llm.tree.micro_batches import MicroBatches, activation_bytes
from stdist.vision_llm.tree.prefix_tree import Level, Tree

HISTORY, HORIZON, MIB, GIB = 4, 3, 2**20, 2**30
MEMORY = "40MiB"
SEVEN_B, THREE_B = "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"
PROJECT = Path(__file__).resolve().parents[2]
DEEPSPEED = {"engine": "deepspeed", "num_workers": 8}


@pytest.fixture
def config(store: GridStore) -> Callable[..., VisionLLMConfig]:
    """A run of the preset tiny on the toy city; keywords replace whole sections, merged with these."""

    def make(**sections: Any) -> VisionLLMConfig:
        tree: dict[str, Any] = {
            "name": "toy",
            "data": {"store": str(store.path), "history": HISTORY, "horizon": HORIZON},
            "numerals": {"mantissa_digits": 2},
            "policy": {"base": "tiny", "lora_r": 4},
            "sft": {"windows_per_step": 3, "cells_per_window": 7, "activation_memory": 0.003},
            "grpo": {"windows_per_step": 2, "cells_per_window": 5, "num_generations": 4, "activation_memory": 0.003},
        }
        for name, section in sections.items():
            tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
        return parse_config(tree, "test")

    return make


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The preset tiny as a pre-trained base: a folder with its configuration and nothing else."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    with torch.device("meta"):
        build_model("tiny", 0).config.save_pretrained(folder)
    return str(folder)


class Kept:
    """What autograd keeps for a backward pass besides weights: counted on real tensors."""

    def __init__(self, policy: PolicyModel):
        self._weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
        self._seen: dict[int, torch.Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in self._weights:
            self._seen[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor.detach()

    def backward(self, loss: torch.Tensor) -> None:
        self._hooks.__exit__()
        self.bytes = sum(tensor.untyped_storage().nbytes() for tensor in self._seen.values())
        self._seen.clear()
        loss.backward()


def policy_at(config: VisionLLMConfig, stage: str) -> PolicyModel:
    """As it is in training when ``stage`` begins."""
    policy = build_policy(policy_spec(config, open_dataset(config)), seed=0)
    for name in config.stages[: config.stages.index(stage) + 1]:
        begin_stage(policy, name, getattr(config, name).trainable, seed=0)
    return policy


def kind_of(name: str) -> str:
    if name.startswith("reference_rows"):
        return REFERENCE_ROWS
    if name.startswith("rows"):
        return ROWS
    if "lora_" in name:
        return REFERENCE_LORA if ".default." in name else LORA
    return VISION if ".visual." in name else "base"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("stages", "trainable"),
    [
        (["alignment"], "full"),
        (["sft"], "rows"),
        (["sft"], "lora"),
        (["sft"], "full"),
        (["sft", "grpo"], "lora"),
        (["sft", "grpo"], "full"),
    ],
)
def test_parameters_by_kind_are_those_of_the_policy(config, stages, trainable, dtype):
    """Counts, bytes and what trains."""
    run = config(stages=stages, policy={"dtype": dtype}, **{stages[0]: {"trainable": trainable}})
    policy, planned_policy = policy_at(run, stages[-1]), shape_policy(*starting_point(run, stages[-1]))
    real: dict[tuple[str, bool], list[int]] = {}
    for name, parameter in policy.named_parameters():
        kind = kind_of(name)
        if kind == REFERENCE_LORA and "grpo" not in stages:
            kind = LORA
        held = real.setdefault((kind, parameter.requires_grad), [0, 0])
        held[0] += parameter.numel()
        held[1] += parameter.nbytes
    planned: dict[tuple[str, bool], list[float]] = {}
    for weights in policy_weights(planned_policy, four_bit=False):
        kind = weights.kind if weights.kind in (LORA, ROWS, REFERENCE_LORA, REFERENCE_ROWS, VISION) else "base"
        held = planned.setdefault((kind, weights.trainable), [0, 0])
        held[0] += weights.count
        held[1] += weights.bytes
    assert planned == real


@pytest.mark.parametrize(("trainable", "dtype"), [("lora", "bfloat16"), ("full", "float32"), ("full", "bfloat16")])
def test_optimizer_and_gradients_are_those_of_adamw(config, trainable, dtype):
    run = config(stages=["sft"], sft={"trainable": trainable}, policy={"dtype": dtype})
    policy, plan = policy_at(run, "sft"), plan_stage(run, "sft")
    engine = TorchEngine(parameter_groups(policy, run.sft), cosine_schedule(1, 2), 1.0)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    assert sum(s.gradients for s in plan.states.values()) == sum(p.grad.nbytes for p in trained if p.grad is not None)
    engine.step()
    state = engine._optimizer.state.values()
    moments = sum(x.nbytes for entry in state for x in entry.values() if x.ndim)
    assert sum(s.optimizer for s in plan.states.values()) == moments


# --- a step ---------------------------------------------------------------------------------------------------------


def test_a_step_of_sft_is_planned_as_it_runs(config, monkeypatch):
    """Tokens, micro-batches, operations and passes, of a real policy's real step. Attention as plain products, which
    are as many operations as the fused kernel's."""
    run = config(stages=["sft"], sft={"trainable": "full"}, frames={"enabled": False})
    plan, costs = plan_stage(run, "sft"), costs_of(run, "sft")
    monkeypatch.setattr(PolicyModel, "attention_choice", Choice(MATH, "plain"))
    policy = policy_at(run, "sft")
    city = CityWindows(policy, open_dataset(run).train)
    batch = city.batch(np.arange(3), city.cells[:7])
    tree = sft_tree(policy, batch, torch.zeros(21, dtype=torch.bool))
    sizes = MicroBatches(policy, run.sft.activation_bytes).sizes(tree)
    assert sizes[0] < 3 and sizes[1] < 7
    monitor = {
        "embeddings": policy.base_model.get_input_embeddings().weight,
        "head": policy.base_model.lm_head.weight,
        "decoder": policy.base_model.model.language_model.layers[0].mlp.up_proj.weight,
        "decoder's vectors": policy.base_model.model.language_model.norm.weight,
        "input": policy.rows.input,
        "output": policy.rows.output,
    }
    seen = dict.fromkeys([*monitor, ROWS, VISION], 0.0)
    for name, parameter in monitor.items():
        parameter.register_hook(lambda gradient, name=name: seen.__setitem__(name, seen[name] + 1))
    calls: list[int] = []
    decoder = policy._decoder
    monkeypatch.setattr(
        policy, "_decoder", lambda **inputs: calls.append(len(inputs["inputs_embeds"])) or decoder(**inputs)
    )
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        prefix_tree.backward(policy, tree, sft_loss(policy, batch), torch.Tensor.backward, sizes)
    assert plan.counts["tokens_per_learner"] == tree.tokens
    assert plan.counts["micro_batches"] == [sizes[0], max(calls)]
    assert plan.flops == counter.get_total_flops()
    walks, backwards = costs.passes(list(plan.weights))
    # Each call goes forward and backward.
    assert walks["decoder"] == 2 * len(calls)
    seen[ROWS] = (seen["input"] + seen["output"]) / 2
    assert {**backwards, VISION: 0} == {name: seen[name] for name in backwards}


def test_tokens_of_grpo_are_those_of_its_tree(config):
    run = config(stages=["grpo"])
    plan = plan_stage(run, "grpo")
    policy = policy_at(run, "grpo")
    city = CityWindows(policy, open_dataset(run).train)
    batch = city.batch(np.arange(2), city.cells[:5])
    answers = torch.zeros(2 * 5 * 4, HORIZON, dtype=torch.long)
    tree = Tree(batch.shared, batch.grids, (Level(batch.prompts), Level(answers)))
    assert plan.counts["tokens_per_learner"] == tree.tokens
    assert sum(plan.phases["sampling"].values()) > 0

    grpo = {"candidates": "direct", "activation_memory": 1}
    direct = plan_stage(config(stages=["grpo"], grpo=grpo), "grpo")
    cells, own = batch.prompts.shape
    assert direct.counts["tokens_per_learner"] == batch.shared.numel() + cells * (own + HORIZON - 1)
    assert direct.counts["micro_batches"] == [2, 10] and direct.flops < plan.flops
    assert sum(direct.phases["sampling"].values()) > 0


@pytest.mark.parametrize("updates", [1, 2])
def test_what_workers_sample_is_no_work_of_learners(config, updates):
    """Operations of a step: a sampler and a reference go forward once for all updates, training forward and back."""
    grpo = {"num_iterations": updates}
    alone, run = (config(stages=["grpo"], grpo=grpo, rollouts=r) for r in ({}, {"num_workers": 3, "max_staleness": 1}))
    sampling = costs_of(run, "grpo").sampling_flops
    once = costs_of(config(stages=["grpo"]), "grpo").sampling_flops
    assert sampling == once / updates > 0
    assert plan_stage(alone, "grpo").flops - plan_stage(run, "grpo").flops == pytest.approx(sampling)
    assert plan_stage(run, "grpo").flops > 2 * once + sampling


def test_the_plan_says_how_many_workers_keep_up_and_what_a_version_costs(config):
    """Thirty seconds of sampling, ten and a half of training of which a version's 25 GB take half a one: three."""
    assert workers_for(30, 10.5, 25 * 10**9) == pytest.approx(3)
    assert workers_for(1, 0.4, 25 * 10**9) == float("inf")
    sections: dict[str, Any] = {"stages": ["grpo"], "grpo": {"windows_per_step": 4}}
    run = config(**sections, rollouts={"num_workers": 3}, learners={"num_workers": 2, "engine": "deepspeed"})
    plan, version = plan_run(run, Device(flops=1e9)), pack(policy_at(run, "grpo"), 0)
    assert version.tensors["rows.input"].size == 0 == version.tensors["rows.input.changed"].size
    a_learner = costs_of(run, "grpo").sampling_flops / plan.stages[0].flops
    many, weights = (line for line in plan.notes if "keep up" in line or "a version of" in line)
    assert f": {2 * a_learner:.3g} workers, {a_learner:.3g} a learner, keep up (configured: 3); " in many
    assert many.endswith("with rollouts.max_staleness 0 they take turns, from 1 on both work at once")
    assert f"a version of the weights is {version.nbytes / 1e9:.3g} GB" in weights
    ahead = config(**sections, rollouts={"num_workers": 3, "max_staleness": 1})
    plan = plan_run(ahead, Device(flops=1e17))
    assert any(line.endswith("no number of workers keeps up (configured: 3)") for line in plan.notes)
    assert not [line for line in plan_run(config(**sections)).notes if "version" in line or "keep" in line]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 2), (2, 100, 7), (9, 9, 100)])
def test_micro_batches_of_a_deeper_tree(sizes):
    """Three windows of four cells of five candidates, by hand: a call holds whole families, or lies inside of one."""
    by_hand = {
        (1, 1, 1): ([3, 12, 60], [1, 1, 1]),
        (2, 3, 2): ([2, 6, 12 * 3], [2, 2, 2]),
        (2, 100, 7): ([2, 2, 12], [2, 8, 5]),
        (9, 9, 100): ([1, 2, 2], [3, 8, 40]),
    }
    assert micro_batches(3, [4, 5], sizes) == by_hand[sizes]


@pytest.mark.parametrize("stage", ["alignment", "arithmetic"])
def test_a_step_of_alignment_is_planned_as_it_runs(config, stage):
    run = config(stages=["alignment", "arithmetic"], **{stage: {"train_batch_size": 18}})
    plan = plan_stage(run, stage)
    policy = policy_at(run, stage)
    kept = Kept(policy)
    tokens = AlignmentStage(stage, policy, getattr(run, stage), run.seed).step(0, kept.backward)["tokens"]
    assert plan.counts["tokens_per_learner"] == tokens
    assert plan.phases["training"]["activations"] == pytest.approx(kept.bytes, rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trainable", ["rows", "lora", "full"])
def test_activations_are_what_autograd_keeps(config, trainable, dtype, checkpointing):
    policy_keys = {"dtype": dtype, "gradient_checkpointing": checkpointing}
    run = config(stages=["sft"], sft={"trainable": trainable, "activation_memory": 1e-6}, policy=policy_keys)
    policy, plan = policy_at(run, "sft"), plan_stage(run, "sft")
    city = CityWindows(policy, open_dataset(run).train)
    batch = city.batch(np.arange(1), city.cells[:1])
    window_and_child = activation_bytes(policy, sft_tree(policy, batch, torch.zeros(1, dtype=torch.bool)))
    assert plan.phases["training"]["activations"] == pytest.approx(sum(window_and_child), rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_makes_no_temporary_of_what_trains(config, dtype, largest_made):
    """AdamW's second step, which has its moments, fused as on a GPU; clipping makes a norm of each tensor and their
    norm."""
    run = config(stages=["sft"], sft={"trainable": "full"}, policy={"dtype": dtype})
    policy = policy_at(run, "sft")
    engine = TorchEngine(parameter_groups(policy, run.sft), cosine_schedule(1, 2), 1.0)
    for group in engine._optimizer.param_groups:
        group["fused"] = True
    for _ in range(2):
        for parameter in engine.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        with largest_made() as made:
            engine.step()
    assert made.elements <= len(engine.parameters)
    assert plan_stage(run, "sft").phases["update"]["temporaries"] == 0


@pytest.mark.parametrize(("device", "fused"), [("meta", True), ("cpu", False)])
def test_adamw_is_fused_where_it_computes_alike_wherever_an_element_lies(device, fused):
    group = ParameterGroup({"w": torch.nn.Parameter(torch.ones(3, device=device))}, 1e-3, 0.0)
    assert adamw([group]).param_groups[0]["fused"] is fused


def test_zero_updates_from_float32_copies_of_a_ranks_gradients(config):
    """The numerals' rows, the largest group that LoRA trains, in eight equal parts."""
    plan = plan_stage(config(stages=["sft"], sft={"windows_per_step": 8}, learners=DEEPSPEED), "sft")
    rows = next(w for w in plan.weights if w.kind == ROWS and w.trainable)
    assert plan.phases["update"]["temporaries"] == 4 * rows.count / 8


@pytest.mark.parametrize("learners", [{}, DEEPSPEED])
def test_dense_gradients_of_rows_are_temporaries_where_autograd_adds_them(config, learners, monkeypatch):
    """DeepSpeed waits for autograd's own adding: there a gradient of the numerals' rows, of the head or of a look-up,
    is made anew in every pass. In plain torch kernels add to the one that is held. With tiles far smaller than rows."""
    monkeypatch.setitem(token_losses.TILE_BYTES, "meta", 2**16)
    monkeypatch.setattr(stage_costs, "_tree", stage_costs._tree.__wrapped__)  # which remembers other tiles
    run = config(stages=["sft"], sft={"activation_memory": 1e-6, "windows_per_step": 8}, learners=learners)
    plan = plan_stage(run, "sft")
    rows = next(w for w in plan.weights if w.kind == ROWS)
    assert (plan.phases["training"]["temporaries"] > rows.bytes / 2) is bool(learners)


def test_plain_torch_holds_no_gradients_while_it_validates(config):
    """Phases by hand: training needs 10 beside gradients of 400, validation 300 without them."""
    ranks, rows = Ranks(), Weights(ROWS, 100, 4, trainable=True)
    phases = {"training": {"activations": 10.0}, "validation": {"keys": 300.0}}
    plan = StagePlan("sft", "rows", ranks, [rows], phases, 0, {}, {})
    assert plan.device_bytes == 400 + 800 + 400 + 10
    more = replace(plan, phases={**phases, "sampling": {"keys": 500.0}})
    assert more.device_bytes == 400 + 800 + 500
    assert sum(more.buffers.values()) == 500 - 400
    sharded = replace(more, ranks=Ranks(1, zero_stage=1))  # DeepSpeed keeps them
    assert "sampling: gradients, not held then" not in sharded.buffers


# --- the 7B ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def weights_of_7b() -> dict[str, Weights]:
    spec = PolicySpec(
        base=SEVEN_B, dtype="bfloat16", setting=Setting(city="", channel="", cadence=10, history=4, horizon=3)
    )
    policy = shape_policy(spec, (("sft", "lora"),))
    return {w.kind: w for w in policy_weights(policy, four_bit=True)}


def test_the_7b_is_counted_to_the_last_parameter(weights_of_7b):
    """8,292,166,656 is what its model card's files hold; LoRA and rows by hand."""
    counts = {kind: weights.count for kind, weights in weights_of_7b.items()}
    rows, lora = counts.pop(ROWS), counts.pop(LORA)
    assert sum(counts.values()) == 8_292_166_656
    assert counts["embeddings"] == counts["head"] == 152_064 * 3584
    assert rows == 2 * 199_801 * 3584
    in_and_out = (3584 + 3584) + 2 * (3584 + 512) + (3584 + 3584) + 2 * (3584 + 18944) + (18944 + 3584)
    assert lora == 16 * 28 * in_and_out


def test_the_3b_is_counted_to_the_last_parameter():
    """3,754,622,976 is what its files hold: its head is its embedding."""
    setting = Setting(city="", channel="", cadence=10, history=4, horizon=3)
    policy = shape_policy(PolicySpec(base=THREE_B, dtype="bfloat16", setting=setting), (("sft", "rows"),))
    counts = {w.kind: w.count for w in policy_weights(policy, four_bit=False)}
    rows = counts.pop(ROWS)
    counts.pop(LORA)
    assert rows == 2 * 199_801 * 2048 and sum(counts.values()) == 3_754_622_976


def test_a_published_base_asks_no_hub(monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(stage_costs.AutoConfig, "from_pretrained", refuse)
    for name in (SEVEN_B, THREE_B):
        assert stage_costs._base_config(name).model_type == "qwen2_5_vl"


@pytest.mark.parametrize(
    "path",
    sorted(path for each in ("milan*", "single_gpu*", "cpu*") for path in PROJECT.glob(f"configs/{each}.yaml")),
    ids=lambda path: path.stem,
)
def test_a_shipped_configuration_fits_the_device_that_its_header_names(path, monkeypatch, tmp_path):
    """With a tenth of it free, on a grid of 100 x 100 cells where there is no store. Other recipes plan on a store."""
    (named,) = re.findall(r"^# Device: .*?(\d+) GB\.", path.read_text(), re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    plan = plan_run(load_config(path, []), Device(int(0.9 * int(named) * 10**9)))
    assert len(plan.verdicts) == 4 and all(line.endswith(", fits") for line in plan.verdicts), plan.verdicts


def test_four_bits_are_the_decoders_alone(weights_of_7b):
    decoder, *others = sorted(weights_of_7b.values(), key=lambda w: w.kind != "decoder")
    assert decoder.bytes_each == 4.127 / 8
    assert {w.bytes_each for w in others} == {2, 4}


def test_full_fine_tuning_with_zero_3(config, base):
    """16 bytes a parameter over all learners, but for the matrices that stay whole: 2 bytes of each on every one."""
    learners = DEEPSPEED | {"zero_stage": 3}
    policy = {"base": base, "dtype": "bfloat16"}
    run = config(policy=policy, stages=["sft"], sft={"trainable": "full", "windows_per_step": 8}, learners=learners)
    plan, costs = plan_stage(run, "sft"), costs_of(run, "sft")
    count = {w.kind: w.count for w in plan.weights}
    whole, everything = count["head"] + count[ROWS], sum(count.values())
    states = sum(state.device for state in plan.states.values())
    assert states == pytest.approx((16 * (everything - whole) + 14 * whole) / 8 + 2 * whole)
    assert plan.phases["validation"]["gathered weights"] == 2 * (everything - whole)
    gathers = plan.bytes_sent["all-gather of sharded weights"] / (7 / 8)
    # One window a learner: its prefix and the micro-batches of its cells, each forward and backward.
    assert len(costs.calls) == 2 and costs.prefixes == costs.calls[0] == 1
    vision = 2 * count[VISION]
    assert gathers == pytest.approx(2 * vision + sum(costs.calls) * 2 * (2 * (everything - whole) - vision))
    walks, _ = costs.passes(policy_weights(shape_policy(*starting_point(config(stages=["sft"]), "sft")), False))
    assert walks["decoder"] == walks[LORA] == 2 * walks["embeddings"] and walks[VISION] == 1


def test_a_tied_head_is_counted_once_and_computed_all_the_same(config, base, tmp_path):
    tied = json.loads((Path(base) / "config.json").read_text())
    tied["tie_word_embeddings"] = tied["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(tied))
    one, two = (plan_stage(config(policy={"base": b}, stages=["sft"]), "sft") for b in (str(tmp_path), base))
    assert [w.kind for w in two.weights if w.kind not in one.states] == ["head"]
    assert (one.flops, one.phases) == (two.flops, two.phases)
    assert [w.kind for w in one.weights if w.whole] == ["embeddings", ROWS]


# --- hours ------------------------------------------------------------------------------------------------------------


def test_hours_are_steps_and_evaluations_times_seconds():
    """3,600 steps of 2 s and 18 evaluations of 100 s."""
    hours = Hours(3600, 2.0, 18, 100.0)
    assert (hours.training, hours.validation, hours.all) == (2.0, 0.5, 2.5)


def test_hours_of_a_run_by_hand(config):
    """Ten steps with evaluations every four: at 0, 4, 8 and 10. A device of 1e9 operations a second, used to a tenth,
    does 1e8: its seconds are operations over that."""
    sft = {"max_steps": 10, "eval_steps": 4, "eval_windows": 5}
    grpo = {"max_steps": 3, "eval_steps": 3, "eval_windows": 2, "num_generations": 4}
    run = config(stages=["sft", "grpo"], sft=sft, grpo=grpo)
    plan = plan_run(run, Device(flops=1e9, mfu=0.1))
    cells = open_dataset(run).train.region.shape[0] * open_dataset(run).train.region.shape[1]
    of_sft, of_grpo, of_test = (plan.hours[name] for name in ("sft", "grpo", TEST))
    assert (of_sft.steps, of_sft.evaluations, of_grpo.evaluations) == (10, 4, 2)
    assert of_sft.seconds_per_step == pytest.approx(plan.stages[0].flops / 1e8)
    window, prompt, answer = forecast_flops(*starting_point(run, "sft"))
    assert of_sft.seconds_per_evaluation == pytest.approx(5 * (window + cells * (prompt + answer)) / 1e8)
    window, prompt, answer = forecast_flops(*starting_point(run, "grpo"))
    # It forecasts, and looks at four candidates of every cell.
    both = 2 * window + cells * (2 * prompt + 5 * answer)
    assert of_grpo.seconds_per_evaluation == pytest.approx(2 * both / 1e8)
    windows = len(open_dataset(run).test)
    assert of_test.validation == pytest.approx(windows * (window + cells * (prompt + answer)) / 1e8 / 3600)
    assert plan.as_dict()["hours"] == pytest.approx(of_sft.all + of_grpo.all + of_test.all)


def test_a_forecast_costs_what_the_sampler_does(config, monkeypatch):
    """Two windows of all cells, step by step, on real tensors; the plan knows them from one cell of one window."""
    run = config(stages=["sft"])
    policy = policy_at(run, "sft").eval()
    monkeypatch.setattr(PolicyModel, "attention_choice", Choice(MATH, "plain"))
    city = CityWindows(policy, open_dataset(run).test)
    batch = city.batch(np.arange(2), city.cells)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        Sampler(policy, "median").forecast(policy.prefix(batch.shared, batch.grids), batch.prompts)
    planned = 2 * window_flops(*starting_point(run, "sft"), len(city.cells), 1)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_windows_without_a_store_are_those_of_gap_free_days(config, tmp_path):
    """Two days of 144 steps, each window's 3 targets in them."""
    days = {
        "train": ["2013-11-01", "2013-11-09"],
        "validation": ["2013-11-10"] * 2,
        "test": ["2013-11-11", "2013-11-12"],
    }
    absent = {"store": str(tmp_path / "absent.zarr"), "split": days}
    assert windows_of(config(data=absent), "test") == 2 * 144 - 3 + 1
    assert windows_of(config(data=absent), "validation") == 144 - 3 + 1
    plan = plan_run(config(data={"store": str(tmp_path / "absent.zarr")}, stages=["sft"]))
    assert TEST not in plan.hours and any("without the test forecast" in note for note in plan.notes)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stdist_plan(config, tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str, **sections: Any) -> tuple[int, str, str]:
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(config(**sections).model_dump(mode="json")))
        monkeypatch.setattr(sys, "argv", ["stdist", "plan", str(path), *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


def test_every_stage_is_planned(stdist_plan):
    code, out, _ = stdist_plan("--json", "--device-memory", "2GiB")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and [stage["stage"] for stage in result["stages"]] == ["alignment", "arithmetic", "sft", "grpo"]
    for stage in result["stages"]:
        parts = stage["bytes"].values()
        total = sum(x if not isinstance(x, dict) else x["weights"] + x["gradients"] + x["optimizer"] for x in parts)
        assert stage["device_bytes"] == pytest.approx(total)
        assert stage["verdict"].endswith(", fits") and stage["communication_seconds"] == 0


def test_what_does_not_fit_is_told_what_to_try_and_that_fits(stdist_plan, base):
    sections: dict[str, Any] = {"policy": {"base": base}, "stages": ["sft"], "sft": {"activation_memory": 0.05}}
    code, out, _ = stdist_plan("--json", "--device-memory", MEMORY, **sections)
    verdict = json.loads(out)["stages"][0]["verdict"]
    assert code == 0 and "MiB, does not fit: try " in verdict
    changes = verdict.split("try ")[1].split(", ")[0].split()
    _, again, _ = stdist_plan(*changes, "--json", "--device-memory", MEMORY, **sections)
    assert json.loads(again)["stages"][0]["verdict"].endswith("fits")
    for change in changes:  # none is needless
        others = [other for other in changes if other != change]
        _, fewer, _ = stdist_plan(*others, "--json", "--device-memory", MEMORY, **sections)
        assert "does not fit" in json.loads(fewer)["stages"][0]["verdict"]
    code, out, _ = stdist_plan("--device-memory", "1MiB", **sections)
    assert code == 0 and "take a larger device or a smaller base" in out


def test_tables(stdist_plan):
    code, out, _ = stdist_plan()
    assert code == 0 and "sft: trains lora, 1 x plain torch" in out and "numeral rows" in out and "fit" not in out


@pytest.mark.parametrize(("size", "count"), [("32GiB", 32 * GIB), ("80 GB", 80e9), ("1024", 1024)])
def test_sizes(size, count):
    assert parse_memory(size) == count


@pytest.mark.parametrize("size", ["lots", "-1GiB", "0"])
def test_what_is_no_size(stdist_plan, size):
    code, out, err = stdist_plan(f"--device-memory={size}")
    assert code == 2 and out == "" and f"'{size}' is no size; write it as 32GiB" in err


def test_a_batch_that_learners_cannot_share(stdist_plan):
    code, _, err = stdist_plan(stages=["sft"], learners=DEEPSPEED)
    assert code == 2 and "sft.windows_per_step is 3, which 8 learners cannot share evenly" in err


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        (
            {"policy": {"load_in_4bit": True}, "stages": ["sft"]},
            "zero_stage 3 shards the weights that policy.load_in_4",
        ),
        ({"stages": ["grpo"]}, "zero_stage 3 shards the weights that the stage grpo samples with"),
    ],
)
def test_what_training_refuses_the_plan_refuses(config, sections, reason):
    learners = {"engine": "deepspeed", "zero_stage": 3}
    with pytest.raises(InputError, match=reason):
        plan_run(config(learners=learners, **sections))


def test_advice_can_be_trained(config, base):
    """ZeRO-3 alone would fit, but GRPO may not sample with it, nor with four bits of it."""
    learners = DEEPSPEED | {"num_workers": 2, "zero_stage": 1}
    run = config(policy={"base": base}, stages=["grpo"], learners=learners)
    verdict = plan_run(run, Device(2 * MIB)).verdicts[0]
    assert "with " in verdict and "zero_stage=2" in verdict and "zero_stage=3" not in verdict


def test_without_a_store_a_grid_is_assumed_and_said(config, tmp_path):
    run = config(data={"store": str(tmp_path / "none.zarr")})
    plan = plan_run(run)
    assert "none.zarr does not exist yet: a grid of 100 x 100 cells is assumed" in plan.notes[0]
    assert isinstance(plan.stages[0], StagePlan)


def test_a_store_of_nodes(config, tmp_path):
    out = tmp_path / "nodes.zarr"
    np.savez(tmp_path / "pems.npz", data=np.ones((288 * 7, 3, 1)))
    READERS["pems-npz"].prepare([tmp_path / "pems.npz"], out, city="pems", start="2018-01-01T00:00")
    with pytest.raises(InputError, match="holds nodes, the vision-LLM reads grids"):
        plan_run(config(data={"store": str(out)}))


def test_a_hub_out_of_reach_is_one_line(stdist_plan, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets
    code, out, err = stdist_plan(policy={"base": "nobody/none-such-7B"})
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith("error: policy.base nobody/none-such-7B has no configuration to plan with (We couldn't")
    assert "give a folder with its config.json or one of tiny, small" in err


@pytest.mark.parametrize("model_type", ["qwen2", None])
def test_a_folder_that_is_no_base(config, tmp_path: Path, model_type):
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(InputError, match=f"is a {model_type}" if model_type else "no configuration to plan with"):
        plan_run(config(policy={"base": str(tmp_path)}))
