"""Policies from presets, hub names or folders, and back to folders that transformers and peft load without stdist.

A checkpoint holds ``policy.json`` (what stdist must know), the tokenizer with its numerals, the image processor, and

* base trained (presets): ``config.json`` and ``model.safetensors``, whose embedding and head are text rows followed by
  numeral rows, and the active LoRA adapter, if there is one, in ``adapter/``;
* base frozen: ``adapter/`` alone, LoRA plus the numeral rows as peft's trainable tokens of the named base, which must
  be resized to the tokenizer's length before peft loads it. Where the base ties its head to its embedding (the 3B
  model does) it must be untied first: numerals have rows of their own in both, and peft would drop the head's. A
  4-bit base is quantised again at every loading; the adapter fits it and the unquantised base alike.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from stdist.errors import InputError, is_damage
from stdist.numerals import Vocabulary
from stdist.vision_llm.policy.adapters import LORA_TARGETS, active_adapter, adapter_names, add_lora
from stdist.vision_llm.policy.frozen_base import base_digests, require_same_base
from stdist.vision_llm.policy.model import PolicyModel, first_numeral_id
from stdist.vision_llm.policy.numeral_embeddings import NumeralEmbeddings, initial_embeddings
from stdist.vision_llm.policy.presets import SHAPES, SPECIAL_TOKENS, build_image_processor, build_model, build_tokenizer
from stdist.vision_llm.policy.quantised import keep_trainable, loading_options, refuse_unfrozen
from stdist.vision_llm.policy.spec import PolicySpec, read_spec
from stdist.vision_llm.policy.tokenizer_files import load_text_tokenizer, save_full_tokenizer

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
ADAPTER = "adapter"
_PEFT_ROWS = {
    EMBEDDING: "base_model.model.model.language_model.embed_tokens.token_adapter.trainable_tokens_delta",
    HEAD: "base_model.model.lm_head.token_adapter.trainable_tokens_delta",
}


def build_policy(spec: PolicySpec, seed: int) -> PolicyModel:
    """A policy on a fresh base, with new numeral rows and, on a frozen base, a new LoRA adapter.

    It is on the CPU; a 4-bit base is loaded onto the GPU where there is one, and the policy is there as a whole.

    Raises InputError where the base cannot be loaded or is of another architecture, and where 4 bits are asked of a
    base that trains.
    """
    refuse_unfrozen(spec)
    if spec.base in SHAPES:
        model, tokenizer = build_model(spec.base, seed), build_tokenizer()
        processor = build_image_processor()
        model = model.to(getattr(torch, spec.dtype))
    else:
        model, tokenizer, processor = _load_pretrained(spec)
        spec = spec.model_copy(update={"base_sha256": base_digests(spec.base)})
    vocabulary = Vocabulary(mantissa_digits=spec.mantissa_digits)
    digits = [tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]
    rows = NumeralEmbeddings(
        initial_embeddings(vocabulary, model.get_input_embeddings().weight[digits].cpu(), seed),
        initial_embeddings(vocabulary, model.lm_head.weight[digits].cpu(), seed),
    )
    policy = assemble(model, tokenizer, processor, vocabulary, rows, spec)
    if not spec.base_is_trained:
        add_lora(policy, seed=seed)
    return policy


def load_policy(path: Path) -> PolicyModel:
    """A policy from its checkpoint, in evaluation mode. Raises InputError where ``path`` holds none."""
    spec = read_spec(path)
    policy = _empty_policy(spec, path) if spec.base_is_trained else build_policy(spec, seed=0)
    if (path / ADAPTER).is_dir() and not adapter_names(policy):
        add_lora(policy)
    load_weights(policy, path)
    return policy.eval()


def snapshot_policy(policy: PolicyModel) -> Callable[[Path], None]:
    """A copy of a checkpoint's contents, as a function that writes it into an existing folder at any time."""
    spec = policy.spec.model_dump_json(indent=1)
    parts = [_snapshot_base(policy)] if policy.spec.base_is_trained else []
    parts += [_snapshot_adapter(policy)] if adapter_names(policy) else []

    def write(path: Path) -> None:
        (path / "policy.json").write_text(spec)
        save_full_tokenizer(policy.tokenizer, policy.vocabulary, path)
        policy.image_processor.save_pretrained(path)
        for part in parts:
            part(path)

    return write


def load_weights(policy: PolicyModel, path: Path) -> None:
    """Copies a checkpoint's weights into a policy of the same spec: base (if saved), active adapter, numeral rows.

    Raises InputError where the checkpoint is of another model or vocabulary, DamageError where a frozen base is not
    the one that it was trained on.
    """
    if not policy.spec.base_is_trained:  # else the checkpoint has the weights itself
        require_same_base(policy.spec.base, policy.spec.base_sha256, read_spec(path).base_sha256, path)
    first = policy.first_numeral_id
    rows: dict[str, Tensor] = {}
    if (path / "model.safetensors").exists():
        weights = load_file(path / "model.safetensors")
        for key, parameter in _base_parameters(policy).items():
            if key not in weights:
                raise InputError(f"checkpoint {path}: model.safetensors has no {key}; it belongs to another model")
            if key in (EMBEDDING, HEAD):
                rows[key] = weights[key][first:]
                _overwrite(parameter.data[:first], weights[key][:first], key, path)
            else:
                _overwrite(parameter.data, weights[key], key, path)
    if (path / ADAPTER).is_dir():
        weights = load_file(path / ADAPTER / "adapter_model.safetensors")
        rows |= {key: weights.pop(name) for key, name in _PEFT_ROWS.items() if name in weights}
        set_peft_model_state_dict(policy.backbone, weights, adapter_name=active_adapter(policy))
    if not rows:
        raise InputError(
            f"checkpoint {path} is incomplete: the numerals' rows are in neither model.safetensors nor adapter/"
        )
    _overwrite(policy.rows.input.data, rows[EMBEDDING], "numeral rows", path)
    _overwrite(policy.rows.output.data, rows[HEAD], "numeral rows", path)


def _empty_policy(spec: PolicySpec, path: Path) -> PolicyModel:
    """The policy of a checkpoint that carries its base, from the checkpoint's own files, its weights still to come."""
    vocabulary = Vocabulary(mantissa_digits=spec.mantissa_digits)
    tokenizer = load_text_tokenizer(path, vocabulary)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    config.get_text_config().vocab_size = first_numeral_id(tokenizer, vocabulary)
    with torch.random.fork_rng(devices=[]):
        model = Qwen2_5_VLForConditionalGeneration(config).to(getattr(torch, spec.dtype))
    shape = len(vocabulary), config.get_text_config().hidden_size
    rows = NumeralEmbeddings(torch.zeros(shape), torch.zeros(shape))
    processor = Qwen2VLImageProcessorPil.from_pretrained(path)
    return assemble(model, tokenizer, processor, vocabulary, rows, spec)


def assemble(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    processor: Qwen2VLImageProcessorPil,
    vocabulary: Vocabulary,
    rows: NumeralEmbeddings,
    spec: PolicySpec,
) -> PolicyModel:
    """The policy, on its base's device, with gradient checkpointing on the decoder's layers if the spec has it."""
    if spec.gradient_checkpointing:
        with warnings.catch_warnings():
            # The name that all supported versions of transformers know; the latest would rather hear another one.
            warnings.simplefilter("ignore", FutureWarning)
            model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    return PolicyModel(model, tokenizer, processor, vocabulary, rows.to(model.device), spec)


def why_not_loaded(error: Exception) -> str:
    """transformers' reason in one line, in stdist's words where it would have the user run or unpickle something."""
    reason = str(error).strip().splitlines()[0]
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which stdist never runs"
    if "safetensors" in reason:
        return "it has no model.safetensors, and stdist reads no other weights: the others are pickles, which run code"
    return reason


def _load_pretrained(spec: PolicySpec):
    base = spec.base
    options = loading_options(spec)
    try:
        model_type = AutoConfig.from_pretrained(base, trust_remote_code=False).model_type
        if model_type != "qwen2_5_vl":
            raise InputError(f"policy.base {base} is a {model_type}; stdist needs a Qwen2.5-VL")
        # Of missing files transformers makes an empty tokenizer, without a word.
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        missing = [token for token in SPECIAL_TOKENS if token not in tokenizer.get_vocab()]
        if missing:
            raise InputError(f"policy.base {base} has a tokenizer without {missing[0]}; copy its tokenizer files too")
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, use_safetensors=True, **options)
        processor = Qwen2VLImageProcessorPil.from_pretrained(base)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        if not is_damage(error):
            raise
        why, presets = why_not_loaded(error), ", ".join(SHAPES)
        raise InputError(f"policy.base {base} cannot be loaded ({why}); give a folder or one of {presets}") from None
    keep_trainable(model)
    return model, tokenizer, processor


def _base_parameters(policy: PolicyModel) -> dict[str, torch.nn.Parameter]:
    """The base model's own parameters under the names they have without LoRA around them."""
    return {
        name.replace(".base_layer.", "."): parameter
        # Tied matrices count twice: with numeral rows of their own behind them they part on disk.
        for name, parameter in policy.base_model.named_parameters(remove_duplicate=False)
        if ".lora_" not in name
    }


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _snapshot_base(policy: PolicyModel) -> Callable[[Path], None]:
    first, n = policy.first_numeral_id, len(policy.vocabulary)
    weights = {name: parameter.data for name, parameter in _base_parameters(policy).items()}
    for key, rows in ((EMBEDDING, policy.rows.input), (HEAD, policy.rows.output)):
        # In the rows' own float32: rounded to a bfloat16 base, a resumed run would go on from other weights.
        weights[key] = torch.cat([weights[key][:first].to(rows.dtype), rows.data])
    weights = {key: _copy(value) for key, value in weights.items()}
    config = copy.deepcopy(policy.base_model.config)
    config.get_text_config().vocab_size = first + n
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    config.architectures = [type(policy.base_model).__name__]

    def write(path: Path) -> None:
        save_file(weights, path / "model.safetensors", {"format": "pt"})
        config.save_pretrained(path)

    return write


def _snapshot_adapter(policy: PolicyModel) -> Callable[[Path], None]:
    name = active_adapter(policy)
    weights = {
        key: _copy(value)
        for key, value in get_peft_model_state_dict(
            policy.backbone, adapter_name=name, save_embedding_layers=False
        ).items()
        if ".lora_" in key
    }
    config = LoraConfig(
        r=policy.spec.lora_r,
        lora_alpha=policy.spec.lora_alpha,
        target_modules=LORA_TARGETS,
        base_model_name_or_path=policy.spec.base,
        inference_mode=True,
    )
    if not policy.spec.base_is_trained:
        first, n = policy.first_numeral_id, len(policy.vocabulary)
        ids = list(range(first, first + n))
        config.trainable_token_indices = {"embed_tokens": ids, "lm_head": ids}
        weights[_PEFT_ROWS[EMBEDDING]] = _copy(policy.rows.input)
        weights[_PEFT_ROWS[HEAD]] = _copy(policy.rows.output)

    def write(path: Path) -> None:
        folder = path / ADAPTER
        folder.mkdir()
        save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
        config.save_pretrained(str(folder))

    return write


def _overwrite(target: Float[Tensor, "*shape"], saved: Float[Tensor, "*shape"], what: str, path: Path) -> None:
    if target.shape != saved.shape:
        raise InputError(
            f"checkpoint {path}: {what} is {list(saved.shape)}, this run needs {list(target.shape)}; "
            "it belongs to another model or vocabulary"
        )
    target.copy_(saved)
