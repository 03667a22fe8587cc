"""A frozen base in four bits: what is quantised, that LoRA trains over it, and its checkpoints."""

from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration

from stdist.data import GridStore
from stdist.errors import InputError
from stdist.runs.recipes import parse_config
from stdist.vision_llm import Policy as PublicPolicy
from stdist.vision_llm.dataset import open_dataset, policy_spec
from stdist.vision_llm.kernels.token_losses import head_logits
from stdist.vision_llm.policy.adapters import adapter_names, as_reference, begin_grpo, train_only
from stdist.vision_llm.policy.checkpoints import build_policy, load_policy, load_weights, snapshot_policy
from stdist.vision_llm.policy.model import PolicyModel

MakePolicy = Callable[..., PolicyModel]
PROJECTIONS = {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}


@pytest.fixture
def make_quantised(make_policy: MakePolicy, base: Path) -> MakePolicy:
    """Policies on the CPU: where there is a GPU, a 4-bit base is loaded onto it."""
    return lambda seed=0, **changes: make_policy(
        seed, base=str(base), base_is_trained=False, load_in_4bit=True, **changes
    ).cpu()


def quantised_layers(policy: PolicyModel) -> dict[str, Linear4bit]:
    """bitsandbytes' own modules, LoRA's wrappers aside, by the names they have without LoRA."""
    modules = policy.base_model.named_modules()
    return {name.removesuffix(".base_layer"): m for name, m in modules if isinstance(m, Linear4bit)}


def base_bytes(policy: PolicyModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.base_model.named_parameters() if "lora_" not in name}


def sentences(policy: PolicyModel) -> Tensor:
    """Text followed by numerals, ``[2, 9]``."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(policy.first_numeral_id, (2, 4), generator=generator)
    numerals = torch.randint(len(policy.vocabulary), (2, 5), generator=generator)
    return torch.cat([text, numerals + policy.first_numeral_id], dim=1)


def logits(policy: PolicyModel, ids: Tensor) -> Tensor:
    return head_logits(policy.hidden(ids).flatten(0, 1), policy.full_head)


def loss_of(policy: PolicyModel, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits(policy, ids[:, :-1]), ids[:, 1:].flatten())


def gradients(policy: PolicyModel, ids: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    loss_of(policy, ids).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def moved(policy: PolicyModel) -> PolicyModel:
    """Every trainable parameter displaced, so that nothing loaded can be right by accident."""
    generator = torch.Generator().manual_seed(4)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.02
    return policy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_decoders_projections_and_nothing_else(make_quantised: MakePolicy, base: Path, dtype: str) -> None:
    policy = make_quantised(dtype=dtype)
    layers = range(policy.base_model.config.get_text_config().num_hidden_layers)
    quantised = quantised_layers(policy)
    assert quantised.keys() == {f"model.language_model.layers.{i}.{name}" for i in layers for name in PROJECTIONS}
    compute = getattr(torch, dtype)
    for layer in quantised.values():
        weight = layer.weight
        assert weight.dtype == torch.uint8 and weight.numel() == layer.in_features * layer.out_features // 2
        assert weight.quant_state.quant_type == "nf4" and weight.quant_state.nested
        assert layer.compute_dtype == compute
    published = dict(
        Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=compute, device_map="cpu").named_parameters()
    )
    ours = {name.replace(".base_layer.", "."): p for name, p in base_bytes(policy).items()}
    assert ours.keys() == published.keys()
    kept = ours.keys() - {f"{name}.weight" for name in quantised}
    assert {"lm_head.weight", "model.visual.blocks.0.attn.qkv.weight"} <= kept
    assert all(torch.equal(ours[name], published[name]) for name in kept)


def test_quantised_weights_are_within_half_a_gap_of_the_published(make_quantised: MakePolicy, base: Path) -> None:
    """NF4 (QLoRA, section 3): blocks of 64 are scaled by their greatest magnitude, and each weight takes the nearest of
    sixteen values in −1…1; scales are quantised too, which may move a weight by a little more."""
    widest_gap = bitsandbytes.functional.get_4bit_type("nf4", device="cpu").diff().max()
    published = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, device_map="cpu")
    for name, layer in quantised_layers(make_quantised()).items():
        true = published.get_submodule(name).weight.data.reshape(-1, 64)
        ours = dequantize_4bit(layer.weight.data, layer.weight.quant_state).reshape(-1, 64)
        error = ((ours - true) / true.abs().amax(dim=1, keepdim=True)).abs()
        assert 0 < error.mean() < 0.06 and error.max() < widest_gap / 2 + 0.05


def test_it_computes_and_learns_like_a_policy_of_the_unpacked_weights(
    make_quantised: MakePolicy, make_policy: MakePolicy, base: Path
) -> None:
    quantised = moved(make_quantised()).train()
    plain = make_policy(base=str(base), base_is_trained=False)
    for name, layer in quantised_layers(quantised).items():
        unpacked = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain.base_model.get_submodule(name).base_layer.weight.data.copy_(unpacked)
    ids = sentences(quantised)
    for policy in (quantised, moved(plain).train()):
        train_only(policy, "lora")
    torch.testing.assert_close(logits(quantised, ids), logits(plain, ids), rtol=0, atol=1e-4)
    ours, theirs = gradients(quantised, ids), gradients(plain, ids)
    assert ours.keys() == theirs.keys() and {"rows.input", "rows.output"} <= ours.keys()
    assert sum("lora_" in name for name in ours) == 2 * len(quantised_layers(quantised))
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-6)


def test_lora_and_numeral_rows_train_over_a_base_that_stays(make_quantised: MakePolicy) -> None:
    policy = make_quantised().train()
    train_only(policy, "lora")
    before, rows, ids = base_bytes(policy), policy.rows.input.detach().clone(), sentences(policy)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = loss_of(policy, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    assert any(p.detach().abs().sum() > 0 for name, p in policy.named_parameters() if "lora_B" in name)
    assert not torch.equal(policy.rows.input, rows)
    after = base_bytes(policy)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_evaluation_leaves_base_and_gradients_as_they_were(
    make_quantised: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU with AVX512-BF16, where bitsandbytes would repack the weights at the first evaluation."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    policy = moved(make_quantised()).train()
    train_only(policy, "lora")
    ids, before = sentences(policy), base_bytes(policy)
    expected = gradients(policy, ids)
    with torch.no_grad():
        logits(policy.eval(), ids)
    after = base_bytes(policy)
    assert all(torch.equal(after[name], before[name]) for name in before)
    found = gradients(policy.train(), ids)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_second_adapter_starts_as_the_first(make_quantised: MakePolicy) -> None:
    policy = moved(make_quantised()).eval()
    ids = sentences(policy)
    with torch.no_grad():
        expected = logits(policy, ids)
        begin_grpo(policy)
        assert torch.equal(logits(policy, ids), expected)
        moved(policy)
        assert not torch.allclose(logits(policy, ids), expected)
        with as_reference(policy):
            assert torch.equal(logits(policy, ids), expected)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_quantises_its_base_again(make_quantised: MakePolicy, folder: Path) -> None:
    policy = moved(make_quantised()).eval()
    snapshot_policy(policy)(folder)
    assert [path.parent.name for path in folder.rglob("*.safetensors")] == ["adapter"]
    ids = sentences(policy)
    with torch.no_grad():
        expected = logits(policy, ids)
        for loaded in (load_policy(folder).cpu(), PublicPolicy.from_pretrained(folder).model.cpu()):
            assert loaded.spec == policy.spec and loaded.spec.load_in_4bit
            assert quantised_layers(loaded).keys() == quantised_layers(policy).keys()
            assert torch.equal(logits(loaded, ids), expected)
        resumed = make_quantised(seed=5).eval()
        assert not torch.allclose(logits(resumed, ids), expected)
        load_weights(resumed, folder)
        assert torch.equal(logits(resumed, ids), expected)


def test_a_checkpoint_loads_without_stdist(make_quantised: MakePolicy, base: Path, folder: Path) -> None:
    """The named base, quantised in the same way and resized to the checkpoint's tokenizer, plus ``adapter/``."""
    policy = moved(make_quantised()).eval()
    snapshot_policy(policy)(folder)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        base, dtype=torch.float32, quantization_config=quantisation, device_map="cpu"
    )
    # Without this bitsandbytes evaluates in bfloat16 on CPUs that have it.
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(folder)))
    theirs = PeftModel.from_pretrained(model, folder / "adapter").eval()
    ids = sentences(policy)
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits.flatten(0, 1), logits(policy, ids), rtol=0, atol=1e-4)


# --- refusals ------------------------------------------------------------------------------------------------------


def spec_of(store: GridStore, *, trainable: str = "lora", **policy: object):
    tree = {
        "name": "toy",
        "data": {"store": str(store.path), "history": 4, "horizon": 3},
        "numerals": {"mantissa_digits": 2},
        "policy": {"load_in_4bit": True, **policy},
        "sft": {"trainable": trainable},
    }
    config = parse_config(tree, where="toy.yaml")
    return policy_spec(config, open_dataset(config))


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and "policy.load_in_4bit" in message and len(message) < 400
    return message


def test_the_configuration_reaches_the_policy(store: GridStore, base: Path) -> None:
    policy = build_policy(spec_of(store, base=str(base)), seed=0)
    assert policy.spec.load_in_4bit and quantised_layers(policy) and adapter_names(policy)


def test_a_preset_is_refused(store: GridStore) -> None:
    message = refusal(lambda: build_policy(spec_of(store, base="tiny"), seed=0))
    assert "tiny is a preset" in message and "policy.base" in message


def test_a_base_that_a_stage_trains_in_full_is_refused(store: GridStore, base: Path) -> None:
    message = refusal(lambda: build_policy(spec_of(store, base=str(base), trainable="full"), seed=0))
    assert str(base) in message and "lora or rows" in message


def test_missing_bitsandbytes_is_named(make_quantised: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stdist.vision_llm.policy.quantised.is_bitsandbytes_available", lambda: False)
    assert "pip install 'stdist[quantised]'" in refusal(make_quantised)
