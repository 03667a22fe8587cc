"""The plan against what it plans: real tiny policies, their trees, a real AdamW; and the 7B's published shape."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig

from data_prep import READERS
from stdist import cli
from stdist.data import GridStore
from stdist.errors import InputError
from stdist.runs.memory_size import parse_memory
from stdist.runs.recipes import parse_config
from stdist.training.engine import TorchEngine, cosine_schedule
from stdist.vision_llm.config import VisionLLMConfig
from stdist.vision_llm.dataset import open_dataset, policy_spec
from stdist.vision_llm.model_counts import LORA, REFERENCE_LORA, REFERENCE_ROWS, ROWS, VISION
from stdist.vision_llm.plan import StagePlan, plan_run, plan_stage
from stdist.vision_llm.policy.adapters import adapter_names, add_lora, begin_grpo, train_only
from stdist.vision_llm.policy.checkpoints import build_policy
from stdist.vision_llm.policy.city_windows import CityWindows
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.recipe import parameter_groups
from stdist.vision_llm.stages.alignment import BATCHES, tokenise
from stdist.vision_llm.stages.sft import sft_loss, sft_tree
from stdist.vision_llm.step_counts import decoder_calls
from stdist.vision_llm.tree import prefix_tree
from stdist.vision_llm.tree.micro_batches import MicroBatches, activation_bytes
from stdist.vision_llm.tree.prefix_tree import Level, Tree

HISTORY, HORIZON, GIB = 4, 3, 2**30
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
def seven_b(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the configuration of Qwen2.5-VL-7B and nothing else."""
    folder = tmp_path_factory.mktemp("base") / "7b"
    Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        },
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    return str(folder)


def policy_at(config: VisionLLMConfig, stage: str) -> PolicyModel:
    """As :mod:`recipe` has it when ``stage`` begins."""
    policy = build_policy(policy_spec(config, open_dataset(config)), seed=0)
    for name in config.stages:
        if name == "grpo":
            begin_grpo(policy)
        else:
            part = getattr(config, name).trainable
            if part == "lora" and not adapter_names(policy):
                add_lora(policy)
            train_only(policy, part, frames=name == "sft")
        if name == stage:
            break
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
    policy, plan = policy_at(run, stages[-1]), plan_stage(run, stages[-1])
    real: dict[tuple[str, bool], list[int]] = {}
    for name, parameter in policy.named_parameters():
        kind = kind_of(name)
        if kind == REFERENCE_LORA and "grpo" not in stages:
            kind = LORA
        held = real.setdefault((kind, parameter.requires_grad), [0, 0])
        held[0] += parameter.numel()
        held[1] += parameter.nbytes
    planned: dict[tuple[str, bool], list[float]] = {}
    for weights in plan.weights:
        kind = weights.kind if weights.kind in (LORA, ROWS, REFERENCE_LORA, REFERENCE_ROWS, VISION) else "base"
        held = planned.setdefault((kind, weights.trainable), [0, 0])
        held[0] += weights.count
        held[1] += plan.states[weights.kind].weights
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


# --- tokens, micro-batches, calls ----------------------------------------------------------------------------------


def test_tokens_and_calls_of_sft_are_those_of_its_tree(config, monkeypatch):
    run = config(stages=["sft"], sft={"trainable": "full"})
    policy, plan = policy_at(run, "sft"), plan_stage(run, "sft")
    city = CityWindows(policy, open_dataset(run).train)
    batch = city.batch(np.arange(3), city.cells[:7])
    tree = sft_tree(policy, batch, torch.zeros(21, dtype=torch.bool))
    assert plan.work.tokens == tree.tokens
    sizes = MicroBatches(policy, run.sft.activation_bytes).sizes(tree)
    assert plan.work.micro_batches == [min(a, b) for a, b in zip(sizes, (3, 21), strict=True)] != [3, 21]
    monitor = {
        "vision tower": policy.base_model.model.visual.merger.mlp[0].weight,
        "embeddings": policy.base_model.get_input_embeddings().weight,
        "head": policy.base_model.lm_head.weight,
        "decoder": policy.base_model.model.language_model.layers[0].mlp.up_proj.weight,
        "decoder's vectors": policy.base_model.model.language_model.norm.weight,
        "input": policy.rows.input,
        "output": policy.rows.output,
    }
    seen = dict.fromkeys([*monitor, ROWS], 0.0)
    for name, parameter in monitor.items():
        parameter.register_hook(lambda gradient, name=name: seen.__setitem__(name, seen[name] + 1))
    calls = []
    decoder = policy._decoder
    monkeypatch.setattr(policy, "_decoder", lambda **inputs: calls.append(1) or decoder(**inputs))
    prefix_tree.backward(policy, tree, sft_loss(policy, batch), torch.Tensor.backward, sizes)
    # Each call goes forward and backward.
    assert plan.work.walks["decoder"] == 2 * len(calls)
    seen[ROWS] = (seen["input"] + seen["output"]) / 2
    assert plan.work.backwards == {name: seen[name] for name in plan.work.backwards}


def test_tokens_of_grpo_are_those_of_its_tree(config):
    run = config(stages=["grpo"])
    policy, plan = policy_at(run, "grpo"), plan_stage(run, "grpo")
    city = CityWindows(policy, open_dataset(run).train)
    batch = city.batch(np.arange(2), city.cells[:5])
    written = torch.zeros(2 * 5 * 4, HORIZON, dtype=torch.long)
    assert plan.work.tokens == Tree(batch.shared, batch.grids, (Level(batch.prompts), Level(written))).tokens


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 2), (2, 100, 7), (9, 9, 100)])
def test_calls_of_a_deeper_tree(sizes):
    """Three windows of four cells of five candidates, by hand: a call holds whole families, or lies inside of one."""
    by_hand = {
        (1, 1, 1): [3, 12, 60],
        (2, 3, 2): [2, 6, 12 * 3],
        (2, 100, 7): [2, 2, 12],
        (9, 9, 100): [1, 2, 2],
    }
    assert decoder_calls(3, [4, 5], sizes) == by_hand[sizes]


@pytest.mark.parametrize("stage", ["alignment", "arithmetic"])
def test_tokens_of_alignment_are_those_of_its_batch(config, stage):
    run = config(stages=["alignment", "arithmetic"], **{stage: {"train_batch_size": 18}})
    policy, plan = policy_at(run, "alignment"), plan_stage(run, stage)
    ids, _ = tokenise(policy, BATCHES[stage](policy.vocabulary, run.seed, 0, 18, 4))
    assert plan.work.tokens == ids.numel()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trainable", ["rows", "lora", "full"])
def test_activations_are_what_autograd_keeps(config, trainable, dtype, checkpointing):
    """Of a child, within a tenth of what is measured; small things such as a layer's log-sum-exp are left out."""
    policy_keys = {"dtype": dtype, "gradient_checkpointing": checkpointing}
    run = config(stages=["sft"], sft={"trainable": trainable, "activation_memory": 1e-6}, policy=policy_keys)
    policy, plan = policy_at(run, "sft"), plan_stage(run, "sft")
    city = CityWindows(policy, open_dataset(run).train)
    batch = city.batch(np.arange(1), city.cells[:1])
    window, child = activation_bytes(policy, sft_tree(policy, batch, torch.zeros(1, dtype=torch.bool)))
    held = plan.work.phases["training"]["activations"]
    if (trainable, checkpointing) == ("rows", True) or not checkpointing:
        assert held == pytest.approx(window + child, rel=0.1)
    else:
        assert held < 1.1 * (window + child)


# --- the 7B ---------------------------------------------------------------------------------------------------------


def seven_b_run(config, seven_b: str, **sections: Any) -> VisionLLMConfig:
    policy = {"base": seven_b, "dtype": "bfloat16", "lora_r": 16} | sections.pop("policy", {})
    return config(policy=policy, numerals={"mantissa_digits": 4}, stages=["sft"], **sections)


def test_the_7b_is_counted_to_the_last_parameter(config, seven_b):
    """8,292,166,656 is what its model card's files hold; LoRA and rows by hand."""
    plan = plan_stage(seven_b_run(config, seven_b), "sft")
    counts = {weights.kind: weights.count for weights in plan.weights}
    rows, lora = counts.pop(ROWS), counts.pop(LORA)
    assert sum(counts.values()) == 8_292_166_656
    assert counts["embeddings"] == counts["head"] == 152_064 * 3584
    assert rows == 2 * 199_801 * 3584
    in_and_out = (3584 + 3584) + 2 * (3584 + 512) + (3584 + 3584) + 2 * (3584 + 18944) + (18944 + 3584)
    assert lora == 16 * 28 * in_and_out


def test_four_bits_are_the_decoders_alone(config, seven_b):
    half, four = (
        plan_stage(seven_b_run(config, seven_b, policy={"load_in_4bit": bits}), "sft") for bits in (False, True)
    )
    assert four.states["decoder"].weights == pytest.approx(half.states["decoder"].weights * 4.127 / 16)
    assert {k: v for k, v in four.states.items() if k != "decoder"} == {
        k: v for k, v in half.states.items() if k != "decoder"
    }


def test_full_fine_tuning_with_zero_3(config, seven_b):
    """16 bytes a parameter over all learners, but for the matrices that stay whole: 2 bytes of each on every one."""
    run = seven_b_run(
        config, seven_b, sft={"trainable": "full", "windows_per_step": 8}, learners=DEEPSPEED | {"zero_stage": 3}
    )
    plan = plan_stage(run, "sft")
    head, rows = 152_064 * 3584, 2 * 199_801 * 3584
    whole = head + rows
    everything = 8_292_166_656 + rows
    states = sum(state.device for state in plan.states.values())
    assert states == pytest.approx((16 * (everything - whole) + 14 * whole) / 8 + 2 * whole)
    assert plan.work.phases["writing"]["gathered weights"] == 2 * (everything - whole)
    gathers = plan.traffic["all-gather of sharded weights"] / (7 / 8)
    vision = 2 * next(w.count for w in plan.weights if w.kind == VISION)
    # One window a learner: its prefix and the micro-batches of its cells, each forward and backward.
    calls = plan.work.walks["decoder"]
    assert calls >= 4
    assert gathers == pytest.approx(2 * vision + calls * (2 * (everything - whole) - vision))


def test_zero_3_gathers_frozen_embeddings_forward_alone(config, seven_b):
    run = seven_b_run(config, seven_b, sft={"windows_per_step": 8}, learners=DEEPSPEED | {"zero_stage": 3})
    walks = plan_stage(run, "sft").work.walks
    assert walks["decoder"] == walks[LORA] == 2 * walks["embeddings"] and walks[VISION] == 1


def test_a_tied_head_is_counted_once_and_computed_all_the_same(config, seven_b, tmp_path):
    tied = json.loads((Path(seven_b) / "config.json").read_text())
    tied["tie_word_embeddings"] = tied["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(tied))
    one, two = (plan_stage(seven_b_run(config, base), "sft") for base in (str(tmp_path), seven_b))
    assert [w.kind for w in two.weights if w.kind not in one.states] == ["head"]
    assert (one.work.flops, one.work.phases) == (two.work.flops, two.work.phases)
    assert [w.kind for w in one.weights if w.whole] == ["embeddings", ROWS]


def test_operations_by_hand(config, seven_b):
    """2 a weight and token forward, 2 for the gradient of the input, 2 for that of a trained weight; tiles twice."""
    plan = plan_stage(seven_b_run(config, seven_b, sft={"windows_per_step": 1, "cells_per_window": 2}), "sft")
    count = {weights.kind: weights.count for weights in plan.weights}
    positions, patches = 2 * (HORIZON + 1), HISTORY * 10 * 8  # 5 x 4 cells of 28 pixels, cut into patches of 14
    decoder = plan.work.tokens * (4 * count["decoder"] + 6 * count[LORA])
    head = positions * (6 * count["head"] + 8 * count[ROWS] / 2)
    assert plan.work.flops == decoder + 2 * patches * count[VISION] + head
    assert plan.compute_seconds == plan.work.flops / (0.4 * 989e12)


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


def test_what_does_not_fit_is_told_what_to_try_and_that_fits(stdist_plan, seven_b):
    sections: dict[str, Any] = {
        "policy": {"base": seven_b, "dtype": "bfloat16"},
        "numerals": {"mantissa_digits": 4},
        "stages": ["sft"],
    }
    code, out, _ = stdist_plan("--json", "--device-memory", "32GiB", **sections)
    verdict = json.loads(out)["stages"][0]["verdict"]
    assert code == 0 and "GiB of 32.0, does not fit: try " in verdict
    changes = verdict.split("try ")[1].split(", ")[0].split()
    _, again, _ = stdist_plan(*changes, "--json", "--device-memory", "32GiB", **sections)
    assert json.loads(again)["stages"][0]["verdict"].endswith("fits")
    for change in changes:  # none is needless
        others = [other for other in changes if other != change]
        if not change.startswith("learners."):
            _, fewer, _ = stdist_plan(*others, "--json", "--device-memory", "32GiB", **sections)
            assert "does not fit" in json.loads(fewer)["stages"][0]["verdict"]
    code, out, _ = stdist_plan("--device-memory", "1GiB", **sections)
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
        plan_run(config(learners=learners, **sections), None)


def test_advice_can_be_trained(config, seven_b):
    """ZeRO-3 alone would fit, but GRPO may not sample with it, nor with four bits of it."""
    learners = DEEPSPEED | {"num_workers": 2, "zero_stage": 1}
    run = config(policy={"base": seven_b, "dtype": "bfloat16"}, stages=["grpo"], learners=learners)
    verdict = plan_run(run, 16 * GIB).verdicts[0]
    assert "try " in verdict and "zero_stage=3" not in verdict


def test_without_a_store_a_grid_is_assumed_and_said(config, tmp_path):
    run = config(data={"store": str(tmp_path / "none.zarr")})
    plan = plan_run(run, None)
    assert "none.zarr does not exist yet: a grid of 100 x 100 cells is assumed" in plan.notes[0]
    assert isinstance(plan.stages[0], StagePlan)


def test_a_store_of_nodes(config, tmp_path):
    out = tmp_path / "nodes.zarr"
    np.savez(tmp_path / "pems.npz", data=np.ones((288 * 7, 3, 1)))
    READERS["pems-npz"].prepare([tmp_path / "pems.npz"], out, city="pems", start="2018-01-01T00:00")
    with pytest.raises(InputError, match="holds nodes, the vision-LLM reads grids"):
        plan_run(config(data={"store": str(out)}), None)


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
        plan_run(config(policy={"base": str(tmp_path)}), None)
