"""A frozen base whose decoder is held in four bits: NF4 through transformers and bitsandbytes.

QLoRA (arXiv 2305.14314, section 3): weights in NF4 with doubly quantised scales, 4.127 bits each, unpacked into the
policy's dtype for every product. Vision tower, embeddings, norms and head stay as they were published.
"""

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from stdist.errors import InputError
from stdist.vision_llm.policy.presets import SHAPES
from stdist.vision_llm.policy.spec import PolicySpec


def loading_options(spec: PolicySpec) -> dict[str, Any]:
    """Arguments of the base's ``from_pretrained`` besides its name: the dtype, and the quantisation if there is one.

    Raises InputError where bitsandbytes is missing.
    """
    dtype = getattr(torch, spec.dtype)
    if not spec.load_in_4bit:
        return {"dtype": dtype}
    if not is_bitsandbytes_available():
        raise InputError("policy.load_in_4bit needs bitsandbytes: pip install 'stdist[quantised]'")
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # By itself transformers skips the head alone; what is named here replaces that.
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    return {"dtype": dtype, "quantization_config": quantisation}


def refuse_unfrozen(spec: PolicySpec) -> None:
    """Raises InputError where 4 bits are asked of a base whose checkpoints would have to carry it."""
    if spec.load_in_4bit and spec.base in SHAPES:
        raise InputError(
            f"policy.load_in_4bit is for pre-trained bases and {spec.base} is a preset; "
            "set policy.base to a folder or hub name, or load_in_4bit to false"
        )
    if spec.load_in_4bit and spec.base_is_trained:
        raise InputError(
            f"policy.load_in_4bit freezes {spec.base} and a stage trains it in full; "
            "set trainable to lora or rows, or load_in_4bit to false"
        )


def keep_trainable(model: nn.Module) -> None:
    """Forbids bitsandbytes to repack weights for inference.

    On CPUs with AVX512-BF16 the first evaluation would rewrite the base in place for a kernel that rounds to bfloat16
    and has no backward pass: the next training step would fail.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
