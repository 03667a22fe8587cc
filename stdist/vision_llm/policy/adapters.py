"""LoRA adapters of a policy and which of its parameters train: ``rows``, ``lora`` or ``full``, and GRPO's reference."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.policy.numeral_embeddings import NumeralEmbeddings

# LoRA goes into the language model's projections only; the vision tower stays as it was pre-trained.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
SFT_ADAPTER, GRPO_ADAPTER = "default", "grpo"


def add_lora(policy: PolicyModel, name: str = SFT_ADAPTER, seed: int = 0) -> None:
    """Adds an adapter and makes it the active one. Named adapters let GRPO keep the SFT adapter as reference.

    Its first factors are drawn from ``seed``, whatever torch drew before; its second ones are zero.
    """
    config = LoraConfig(r=policy.spec.lora_r, lora_alpha=policy.spec.lora_alpha, target_modules=LORA_TARGETS)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft asks transformers by a name that its next version drops.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        if isinstance(policy.backbone, PeftModel):
            policy.backbone.add_adapter(name, config)
        else:
            policy.backbone = get_peft_model(policy.backbone, config, adapter_name=name)
    # peft makes embeddings require gradients for the sake of reentrant checkpointing, which is not used here: a frozen
    # vision tower would keep all of its activations.
    policy.base_model.disable_input_require_grads()
    policy.backbone.set_adapter(name)


def adapter_names(policy: PolicyModel) -> list[str]:
    return list(policy.backbone.peft_config) if isinstance(policy.backbone, PeftModel) else []


def active_adapter(policy: PolicyModel) -> str:
    assert isinstance(policy.backbone, PeftModel), "this policy has no adapter"
    return str(policy.backbone.active_adapter)


def train_only(policy: PolicyModel, part: str, frames: bool = True) -> None:
    """Chooses the trainable parameters: ``rows`` (numerals), ``lora`` (active adapter + numerals), ``full``.

    ``frames``: whether frames are seen. Where none are, the vision tower stays as it is: without gradients it would
    only decay.
    """
    active = f".{active_adapter(policy)}." if adapter_names(policy) else None
    for name, parameter in policy.backbone.named_parameters():
        if "lora_" in name:
            trains = part in ("lora", "full") and active is not None and active in name
        else:
            trains = part == "full"
        parameter.requires_grad_(trains)
    if not (frames and policy.encoder):
        policy.base_model.model.visual.requires_grad_(False)
    policy.rows.requires_grad_(True)
    policy.train()  # gradient checkpointing acts in this mode only


def begin_grpo(policy: PolicyModel, seed: int = 0) -> None:
    """Freezes the SFT model as reference and trains a second adapter: its copy, or where it has none a new one.

    With an SFT adapter "adapter off" would not be the reference, and LoRA is never merged (docs/decisions.md).
    """
    had_sft = SFT_ADAPTER in adapter_names(policy)
    add_lora(policy, GRPO_ADAPTER, seed)
    if had_sft:
        weights = dict(policy.backbone.named_parameters())
        for name, parameter in weights.items():
            if f".{GRPO_ADAPTER}." in name:
                parameter.data.copy_(weights[name.replace(f".{GRPO_ADAPTER}.", f".{SFT_ADAPTER}.")].data)
    # In the dtype that computes, to which rows are rounded before every product: half of the bytes, the same results.
    frozen = (rows.detach().to(policy.text_head.dtype, copy=True) for rows in (policy.rows.input, policy.rows.output))
    policy.reference_rows = NumeralEmbeddings(*frozen).requires_grad_(False)
    train_only(policy, "lora")


@contextmanager
def as_reference(policy: PolicyModel) -> Iterator[None]:
    """Inside, the policy is the frozen SFT model: its adapter (or none) and its numerals' embeddings and head."""
    assert isinstance(policy.backbone, PeftModel) and policy.reference_rows is not None, "call begin_grpo first"
    trained, policy.rows = policy.rows, policy.reference_rows
    try:
        if SFT_ADAPTER in adapter_names(policy):
            policy.backbone.set_adapter(SFT_ADAPTER)
            yield
        else:
            with policy.backbone.disable_adapter():
                yield
    finally:
        policy.backbone.set_adapter(GRPO_ADAPTER)
        policy.rows = trained
