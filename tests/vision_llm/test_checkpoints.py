"""Checkpoints load with transformers and peft alone, and say the same there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, LlamaConfig, Qwen2_5_VLForConditionalGeneration

from stdist.errors import DamageError, InputError
from stdist.numerals import Vocabulary
from stdist.vision_llm import Policy as PublicPolicy
from stdist.vision_llm.kernels.token_losses import head_logits
from stdist.vision_llm.policy.adapters import adapter_names, add_lora, begin_grpo, train_only
from stdist.vision_llm.policy.checkpoints import build_policy, load_policy, load_weights, snapshot_policy
from stdist.vision_llm.policy.city_windows import PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.policy.presets import build_image_processor, build_model, build_tokenizer

MakePolicy = Callable[..., PolicyModel]
PlainInputs = Callable[..., dict[str, Tensor]]


def train_a_little(policy: PolicyModel) -> PolicyModel:
    """Moves every trainable parameter, so that nothing loaded can be right by accident."""
    generator = torch.Generator().manual_seed(4)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.02
    return policy.eval()


def logits(policy: PolicyModel, batch: PolicyBatch) -> Tensor:
    """Everything the policy can say after each of the batch's prompts, ``[cells, text + numerals]``."""
    with torch.no_grad():
        hidden, _ = policy.branch(policy.prefix(batch.shared, batch.grids), batch.prompts)
        return head_logits(hidden[:, -1], policy.full_head)


def says_the_same(
    model: Qwen2_5_VLForConditionalGeneration | PeftModel,
    policy: PolicyModel,
    batch: PolicyBatch,
    plain_inputs: PlainInputs,
) -> bool:
    expected, nothing = logits(policy, batch), torch.empty(0, dtype=torch.long)
    with torch.no_grad():
        for child in range(len(batch.prompts)):
            theirs = model.eval()(**plain_inputs(policy, batch, child, nothing)).logits[0, -1]
            if not torch.allclose(theirs, expected[child], rtol=0, atol=1e-4):
                return False
    return True


def test_a_trained_preset_is_a_model_of_transformers(
    make_policy: MakePolicy, batch: PolicyBatch, plain_inputs: PlainInputs, folder: Path
) -> None:
    policy = make_policy()
    train_only(policy, "full")
    snapshot_policy(train_a_little(policy))(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    assert model.get_input_embeddings().weight.shape[0] == policy.first_numeral_id + len(policy.vocabulary)
    assert says_the_same(model, policy, batch, plain_inputs)


def test_a_trained_preset_with_lora_is_a_model_and_an_adapter(
    make_policy: MakePolicy, batch: PolicyBatch, plain_inputs: PlainInputs, folder: Path
) -> None:
    """After GRPO: the base, the numeral rows, and the second adapter, which holds all that the first one had."""
    policy = make_policy()
    add_lora(policy)
    train_only(policy, "lora")
    train_a_little(policy)
    begin_grpo(policy)
    snapshot_policy(train_a_little(policy))(folder)
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    assert not says_the_same(base, policy, batch, plain_inputs), "the adapter must matter"
    assert says_the_same(PeftModel.from_pretrained(base, folder / "adapter"), policy, batch, plain_inputs)


def test_a_frozen_base_gets_an_adapter_with_the_numeral_rows(
    make_policy: MakePolicy, make_batch: Callable[..., PolicyBatch], base: Path, plain_inputs: PlainInputs, folder: Path
) -> None:
    """The named base, resized to the checkpoint's tokenizer, plus ``adapter/``: nothing of the base is copied."""
    policy = make_policy(base=str(base), base_is_trained=False)
    train_only(policy, "lora")
    snapshot_policy(train_a_little(policy))(folder)
    assert not list(folder.glob("*.safetensors"))
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_size < (
        base / "model.safetensors"
    ).stat().st_size
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    batch = make_batch(policy)
    model = PeftModel.from_pretrained(model, folder / "adapter")
    assert says_the_same(model, policy, batch, plain_inputs)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_frozen_base_that_changed_is_no_base_of_a_checkpoint(
    make_policy: MakePolicy, base: Path, folder: Path, tmp_path: Path, file: str
) -> None:
    """A flipped bit of it would change forecasts and be nowhere seen: the checkpoint holds nothing of the base."""
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    policy = make_policy(base=str(copy), base_is_trained=False)
    snapshot_policy(policy)(folder)
    assert load_policy(folder).spec.base_sha256 == policy.spec.base_sha256
    content = bytearray((copy / file).read_bytes())
    content[-3] ^= 1 if file.endswith("tensors") else ord(" ") ^ ord("\n")  # "\n}\n", still JSON
    (copy / file).write_bytes(content)
    with pytest.raises(DamageError, match=f"base is not as it was when .* was trained on it: {file} differs"):
        load_policy(folder)
    untold = json.loads((folder / "policy.json").read_text()) | {"base_sha256": []}
    (folder / "policy.json").write_text(json.dumps(untold))
    load_policy(folder)  # of a version that noted none


def test_a_base_that_is_trained_is_noted_and_not_needed_again(
    make_policy: MakePolicy, base: Path, folder: Path, tmp_path: Path
) -> None:
    """Noted, since alignment on another base is another alignment; a checkpoint has the trained weights itself."""
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    policy = make_policy(base=str(copy), base_is_trained=True)
    assert [name for name, _ in policy.spec.base_sha256] == ["config.json", "model.safetensors"]
    snapshot_policy(policy)(folder)
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    other = make_policy(base=str(copy), base_is_trained=True)
    assert other.spec.base_sha256 != policy.spec.base_sha256
    load_weights(other, folder)
    assert make_policy().spec.base_sha256 == (), "a preset has no files"


def test_a_frozen_base_is_bitwise_what_was_published(make_policy: MakePolicy, base: Path) -> None:
    policy = make_policy(base=str(base), base_is_trained=False)
    published = dict(Qwen2_5_VLForConditionalGeneration.from_pretrained(base).named_parameters())
    ours = {n.replace(".base_layer.", "."): p for n, p in policy.base_model.named_parameters() if ".lora_" not in n}
    assert ours.keys() == published.keys()
    assert all(torch.equal(ours[name], published[name]) for name in published)
    assert policy.first_numeral_id == len(build_tokenizer()) < len(published["lm_head.weight"])
    assert policy.text_head.shape[0] == policy.first_numeral_id


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the 3B model: the head is the embedding."""
    path = tmp_path_factory.mktemp("base") / "tied"
    model = build_model("tiny", seed=8)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    build_image_processor().save_pretrained(path)
    return path


@pytest.mark.parametrize("trained", [True, False])
def test_a_base_with_tied_embeddings(
    make_policy: MakePolicy,
    make_batch: Callable[..., PolicyBatch],
    tied_base: Path,
    plain_inputs: PlainInputs,
    folder: Path,
    trained: bool,
) -> None:
    """Numerals have two rows where text tokens have one: saved as untied, or loaded onto the untied base."""
    policy = make_policy(base=str(tied_base), base_is_trained=trained)
    assert policy.base_model.lm_head.weight is policy.base_model.get_input_embeddings().weight
    train_only(policy, "full" if trained else "lora")
    snapshot_policy(train_a_little(policy))(folder)
    batch = make_batch(policy)
    if trained:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    else:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tied_base)
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(folder)))
        model = PeftModel.from_pretrained(model, folder / "adapter")
    assert says_the_same(model, policy, batch, plain_inputs)
    assert torch.equal(logits(load_policy(folder), batch), logits(policy, batch))


@pytest.mark.parametrize("case", ["full", "full and adapter", "adapter on a folder", "full on a folder"])
def test_round_trip(
    make_policy: MakePolicy, make_batch: Callable[..., PolicyBatch], base: Path, folder: Path, case: str
) -> None:
    """``load_policy`` gives the same logits, the same spec, and no weight its own."""
    changes = {"base": str(base)} if "folder" in case else {}
    policy = make_policy(base_is_trained="full" in case, **changes)
    if "adapter" in case and not adapter_names(policy):
        add_lora(policy)
    train_only(policy, "full" if "full" in case else "lora")
    snapshot_policy(train_a_little(policy))(folder)
    loaded = load_policy(folder)
    batch = make_batch(policy)
    assert loaded.spec == policy.spec and not loaded.training
    assert torch.equal(logits(loaded, batch), logits(policy, batch))
    assert torch.equal(loaded.rows.output, policy.rows.output)
    assert adapter_names(loaded) == adapter_names(policy)
    public = PublicPolicy.from_pretrained(folder)
    assert torch.equal(public.model.rows.input, policy.rows.input)
    frames, origin = batch.grids[0].numpy(), np.datetime64("2013-11-05T12:00")
    assert np.array_equal(*(p.forecast(frames, [(1, 1)], origin) for p in (public, PublicPolicy(policy))))


def test_a_checkpoint_needs_no_preset_to_load(
    make_policy: MakePolicy, batch: PolicyBatch, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, tokenizer and processor come from its own files: new wording in the code does not orphan old runs."""
    policy = train_a_little(make_policy())
    snapshot_policy(policy)(folder)
    for name in ("build_model", "build_tokenizer", "build_image_processor"):
        monkeypatch.delattr(f"stdist.vision_llm.policy.checkpoints.{name}")
    loaded = load_policy(folder)
    assert loaded.first_numeral_id == policy.first_numeral_id
    assert torch.equal(logits(loaded, batch), logits(policy, batch))
    again = folder.parent / "again"
    again.mkdir()
    snapshot_policy(loaded)(again)
    assert (again / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()


def test_rows_on_disk_are_not_rounded_to_the_base(make_policy: MakePolicy, folder: Path) -> None:
    """A bfloat16 base trains float32 rows: a resumed run must go on from exactly these."""
    policy = make_policy(dtype="bfloat16")
    policy.rows.input.data += 1e-4 * torch.rand(policy.rows.input.shape)
    snapshot_policy(policy)(folder)
    loaded = load_policy(folder)
    assert torch.equal(loaded.rows.input, policy.rows.input) and torch.equal(loaded.rows.output, policy.rows.output)
    assert not torch.equal(policy.rows.input, policy.rows.input.bfloat16().float())


def test_weights_are_those_of_the_seed(make_policy: MakePolicy) -> None:
    one, same, other = (build_policy(make_policy().spec, seed) for seed in (1, 1, 2))
    pairs = list(zip(one.parameters(), same.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.rows.input, other.rows.input)
    assert not torch.equal(one.base_model.lm_head.weight, other.base_model.lm_head.weight)


def test_the_checkpoints_tokenizer_knows_every_numeral_by_the_policys_id(make_policy: MakePolicy, folder: Path) -> None:
    policy = make_policy(mantissa_digits=3)
    snapshot_policy(policy)(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = Vocabulary(mantissa_digits=3)
    (one,) = tokenizer("<|FP114/0|>", add_special_tokens=False)["input_ids"]
    assert one == policy.first_numeral_id + vocabulary.indices(114, 0)
    assert len(tokenizer) == policy.first_numeral_id + len(vocabulary)
    indices = [0, 1, 7, 990, 12_345, len(vocabulary) - 1]
    text = "row " + "".join(vocabulary.token(index) for index in indices) + " col"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [i - policy.first_numeral_id for i in ids if i >= policy.first_numeral_id] == indices
    text_ids = [token for part in ("row ", " col") for token in policy.tokenizer(part)["input_ids"]]
    assert [i for i in ids if i < policy.first_numeral_id] == text_ids
    assert tokenizer.decode(ids) == text
    for plain in ("<|im_start|>user\nCity toy", "Convert 114.000000"):
        assert tokenizer(plain)["input_ids"] == policy.tokenizer(plain)["input_ids"]
    assert len(policy.tokenizer) == policy.first_numeral_id, "the policy's own tokenizer stays without numerals"


def test_the_checkpoints_image_processor_is_the_encoders(make_policy: MakePolicy, folder: Path) -> None:
    policy = make_policy()
    snapshot_policy(policy)(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    assert list(processor.image_mean) == list(policy.encoder.mean)
    assert list(processor.image_std) == list(policy.encoder.std)
    assert (processor.patch_size, processor.merge_size) == (14, 2)


def test_no_pickle_is_in_a_checkpoint(make_policy: MakePolicy, folder: Path) -> None:
    policy = make_policy()
    add_lora(policy)
    snapshot_policy(policy)(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".md", ".jinja"}
    for path in files:
        assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04"), path


# --- refusals ----------------------------------------------------------------------------------------------------


def refused(build: Callable[[], object], *words: str) -> None:
    with pytest.raises(InputError) as caught:
        build()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for word in words:
        assert word in message, message


def test_a_folder_without_a_policy_is_refused(tmp_path: Path) -> None:
    refused(lambda: load_policy(tmp_path), str(tmp_path), "policy.json")
    refused(lambda: load_policy(tmp_path / "absent"), "absent", "policy.json")


def test_a_checkpoint_of_another_vocabulary_is_refused(make_policy: MakePolicy, folder: Path) -> None:
    snapshot_policy(make_policy())(folder)
    refused(lambda: load_weights(make_policy(mantissa_digits=3), folder), str(folder), "vocabulary", "1801", "19801")


def test_a_checkpoint_of_another_model_is_refused(make_policy: MakePolicy, folder: Path) -> None:
    snapshot_policy(make_policy())(folder)
    refused(lambda: load_weights(make_policy(base="small"), folder), str(folder), "another model")


def test_a_deeper_model_is_refused(make_policy: MakePolicy, folder: Path) -> None:
    """Same widths, one layer missing in the file."""
    snapshot_policy(make_policy())(folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "language_model.layers.3." not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    refused(lambda: load_policy(folder), str(folder), "layers.3.")


def test_a_checkpoint_without_its_weights_is_refused(make_policy: MakePolicy, folder: Path) -> None:
    snapshot_policy(make_policy())(folder)
    (folder / "model.safetensors").unlink()
    refused(lambda: load_policy(folder), str(folder), "model.safetensors")


def test_a_damaged_policy_json_is_refused(make_policy: MakePolicy, folder: Path) -> None:
    snapshot_policy(make_policy())(folder)
    text = (folder / "policy.json").read_text()
    (folder / "policy.json").write_text(text[: len(text) // 2])
    refused(lambda: load_policy(folder), "policy.json")


def test_a_base_of_another_architecture_is_refused(make_policy: MakePolicy, tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path / "llama")
    refused(lambda: make_policy(base=str(tmp_path / "llama")), "llama", "Qwen2.5-VL")


def test_a_base_that_is_not_there_is_refused(make_policy: MakePolicy, tmp_path: Path) -> None:
    refused(lambda: make_policy(base=str(tmp_path / "absent")), "absent", "tiny")


def test_a_base_of_an_unknown_kind_is_refused(make_policy: MakePolicy, tmp_path: Path) -> None:
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    refused(lambda: make_policy(base=str(strange)), "strange")
    (strange / "config.json").write_text(json.dumps({"hidden_size": 3}))
    refused(lambda: make_policy(base=str(strange)), "strange")


@pytest.mark.parametrize("part", ["AutoConfig", "AutoTokenizer"])
def test_code_of_a_base_is_never_run(
    make_policy: MakePolicy, base: Path, tmp_path: Path, monkeypatch, part: str
) -> None:
    """transformers would ask on the terminal and take "y" for a yes."""
    foreign, ran = tmp_path / "foreign", tmp_path / "ran"
    shutil.copytree(base, foreign)
    (foreign / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Own:\n    pass\n")
    path = foreign / ("config.json" if part == "AutoConfig" else "tokenizer_config.json")
    content = json.loads(path.read_text()) | {
        "auto_map": {part: "own.Own" if part == "AutoConfig" else ["own.Own", None]}
    }
    if part == "AutoConfig":
        content["model_type"] = "own"
    else:
        content["tokenizer_class"] = "Own"
    path.write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if part == "AutoConfig":
        refused(lambda: make_policy(base=str(foreign)), "foreign", "code of its own, which stdist never runs")
    else:  # the model's kind has a tokenizer of transformers' own
        make_policy(base=str(foreign), base_is_trained=False)
    assert not ran.exists()


def test_pickled_weights_of_a_base_are_refused(make_policy: MakePolicy, base: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(base, pickled)
    weights = load_file(pickled / "model.safetensors")
    torch.save(weights, pickled / "pytorch_model.bin")
    make_policy(base=str(pickled), base_is_trained=False)
    (pickled / "model.safetensors").unlink()
    refused(lambda: make_policy(base=str(pickled)), "pickled", "no model.safetensors", "which run code")


def test_a_base_without_its_tokenizer_is_refused(make_policy: MakePolicy, base: Path, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    shutil.copytree(base, partial)
    for path in partial.glob("tokenizer*"):
        path.unlink()
    refused(lambda: make_policy(base=str(partial)), "partial", "tokenizer")
