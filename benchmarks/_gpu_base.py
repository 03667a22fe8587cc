"""A base in Qwen2.5-VL's format with random weights: the true shape without a download.

Weights are drawn shard by shard on the device, so that the 16.6 GB of a 7B need no memory of that size. The tokenizer
is the presets', whose vocabulary is filled up to the length of Qwen's, so that the head has as many rows of text.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from stdist.vision_llm.policy.presets import build_image_processor, build_model, build_tokenizer
from stdist.vision_llm.policy.published import published_config
from stdist.vision_llm.policy.tokenizer_files import TOKENIZER

PUBLISHED = {"7b": "Qwen/Qwen2.5-VL-7B-Instruct"}
QWEN_TOKENS = 151_665
"""Tokens of Qwen2.5-VL's tokenizer; its matrices are padded beyond them."""
SHARD_BYTES = 4 * 10**9
STD = 0.02


def write_base(path: Path, base: str, device: torch.device) -> int:
    """Writes the folder ``path``, whole or not at all. Returns the bytes of its weights.

    Args:
        base: ``7b``, or ``tiny``, the preset's shape.
    """
    config = base_config(base)
    with torch.device("meta"):
        shapes = Qwen2_5_VLForConditionalGeneration(config).state_dict()
    total = sum(2 * tensor.numel() for tensor in shapes.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < 1.05 * total:
        raise SystemExit(f"error: {path} takes {total / 1e9:.1f} GB and {free / 1e9:.1f} are free; name another --work")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    files: dict[str, str] = {}
    generator = torch.Generator(device).manual_seed(0)
    for number, names in enumerate(shards({name: 2 * tensor.numel() for name, tensor in shapes.items()}), 1):
        file = f"model-{number:05d}.safetensors"
        save_file({name: drawn(name, shapes[name], generator) for name in names}, partial / file, {"format": "pt"})
        files |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(partial)
    build_image_processor().save_pretrained(partial)
    build_tokenizer().save_pretrained(partial)
    if base in PUBLISHED:
        fill_up(partial / TOKENIZER, QWEN_TOKENS)
    partial.rename(path)
    return total


def base_config(base: str) -> Qwen2_5_VLConfig:
    """With the presets' ids of the tokens that the model knows."""
    tiny = build_model("tiny", seed=0).config
    if base == "tiny":
        config = tiny
    else:
        published = published_config(PUBLISHED[base])
        assert published is not None
        config = published
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            setattr(config, name, getattr(tiny, name))
    config.architectures, config.dtype = ["Qwen2_5_VLForConditionalGeneration"], torch.bfloat16
    return config


def shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names in groups of about SHARD_BYTES."""
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        if names and held + size > SHARD_BYTES:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def drawn(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Norms begin as ones and biases as zeros, as where a model is initialised."""
    made = torch.empty(like.shape, dtype=torch.bfloat16, device=generator.device)
    if name.endswith("bias"):
        return made.zero_().cpu()
    if like.ndim == 1:
        return made.fill_(1).cpu()
    return made.normal_(0, STD, generator=generator).cpu()


def fill_up(path: Path, tokens: int) -> None:
    """Adds words that no text has to a ``tokenizer.json`` until it has as many ``tokens``."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tree["model"]["vocab"]
    first = 1 + max([*vocabulary.values(), *(token["id"] for token in tree["added_tokens"])])
    vocabulary |= {f"\x00{number}": number for number in range(first, tokens)}
    path.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
