"""Qwen2.5-VL as a forecaster: the base model, optional LoRA adapters, and the numerals' own rows.

The Hugging Face model is never edited: embeddings are mixed here from text rows, numeral rows and visual tokens, the
decoder runs on them, and the head is applied here at the positions that matter. A window's shared prompt is encoded
once (``prefix``); its cells and candidates read the prefix's keys and values (``branch``).
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from stdist.errors import InputError
from stdist.numerals import Vocabulary
from stdist.vision_llm.kernels.attention import Attention, Choice, choose
from stdist.vision_llm.kernels.prefix import Branching, Prefix
from stdist.vision_llm.kernels.token_losses import row_logits
from stdist.vision_llm.kernels.tree_attention import IMPLEMENTATION, NO_MASK, TreeContext
from stdist.vision_llm.policy.frames import FrameEncoder, FrameGeometry
from stdist.vision_llm.policy.numeral_rows import NumeralRows
from stdist.vision_llm.policy.prompts import BLANK, END, IMAGE, Prompts
from stdist.vision_llm.policy.spec import FrameSpec, PolicySpec
from stdist.vision_llm.rollout.sampler import Decoding, Sampler

# LoRA goes into the language model's projections only; the vision tower stays as it was pre-trained.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
SFT_ADAPTER, GRPO_ADAPTER = "default", "grpo"


class Policy(nn.Module):
    """See the module docstring. Build one with :mod:`stdist.vision_llm.policy.checkpoints`, not by hand.

    Args:
        model: the base, its weights in their final dtype.
        tokenizer: the base's; the numerals may be in it already (a checkpoint's) or not.
        image_processor: the base's own; its mean and standard deviation normalise frames.
        vocabulary: the numerals.
        rows: their rows.
        spec: the task, the frames, and how LoRA is shaped.
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Qwen2VLImageProcessorPil,
        vocabulary: Vocabulary,
        rows: NumeralRows,
        spec: PolicySpec,
    ):
        super().__init__()
        model.config.get_text_config()._attn_implementation = IMPLEMENTATION
        self.backbone: Qwen2_5_VLForConditionalGeneration | PeftModel = model
        self.rows = rows
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.vocabulary = vocabulary
        self.first_numeral_id = first_numeral_id(tokenizer, vocabulary)
        self._reference_rows: NumeralRows | None = None
        self.set_task(spec)

    def set_task(self, spec: PolicySpec) -> None:
        """Points the policy at a task: another city's name, grid or frames, the same weights."""
        self.spec = spec
        self.encoder = frame_encoder(spec.frames, self.image_processor) if spec.frames else None
        tokens_per_frame = self.encoder.geometry.tokens if self.encoder else 0
        self.prompts = Prompts(self.tokenizer, self.vocabulary, self.first_numeral_id, spec.setting, tokens_per_frame)
        self.image_id, self.end_id, self.blank_id = map(self.prompts.token_id, (IMAGE, END, BLANK))

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> "Policy":
        """A checkpoint folder of a run; or, by a preset's name, an untrained policy of that shape.

        Raises InputError where there is neither.
        """
        # Checkpoints build policies, so this is the one import that must wait.
        from stdist.vision_llm.policy.checkpoints import from_pretrained

        return from_pretrained(name_or_path)

    @torch.no_grad()
    def forecast(
        self,
        frames: Float[np.ndarray, "S H W"],
        cells: Sequence[tuple[int, int]],
        origin: np.datetime64,
        decoding: Decoding = "median",
    ) -> Float[np.ndarray, "cells K"]:
        """The next K values of some cells, in the data's units.

        Args:
            frames: the last S grids in the data's units, without missing values.
            cells: (row, col) positions in the grid.
            origin: local time of the last frame.
            decoding: ``greedy``, ``median``, ``sample`` (one draw) or ``direct``.

        Raises InputError where ``frames`` has another shape than the policy's task, or a value has no numeral.
        """
        spec = self.spec
        expected = (
            spec.setting.history,
            *((spec.frames.height, spec.frames.width) if spec.frames else frames.shape[1:]),
        )
        if frames.shape != expected:
            raise InputError(f"frames are {frames.shape}, this policy reads {expected} (S, H, W)")
        rows, cols = np.array(cells, dtype=np.int64).reshape(-1, 2).T
        shared = torch.tensor([self.prompts.shared(origin)], device=self.device)
        prefix = self.prefix(shared, torch.from_numpy(np.asarray(frames, np.float32))[None])
        first_row, first_col = spec.setting.first_cell
        prompts = self.prompts.cells(rows + first_row, cols + first_col, frames[:, rows, cols].T)
        uniforms = torch.rand(len(prompts), spec.setting.horizon) if decoding == "sample" else None
        values = Sampler(self, decoding).forecast(prefix, torch.from_numpy(prompts).to(self.device), uniforms)
        return values[:, 0].cpu().numpy()

    # --- parts of the base model -------------------------------------------------------------------------------

    @property
    def base_model(self) -> Qwen2_5_VLForConditionalGeneration:
        model = self.backbone.get_base_model() if isinstance(self.backbone, PeftModel) else self.backbone
        return cast(Qwen2_5_VLForConditionalGeneration, model)

    @property
    def device(self) -> torch.device:
        return self.rows.input.device

    @property
    def attention_choice(self) -> Choice:
        """The attention back end of the device and dtype the policy is in, and why it is that one."""
        return choose(self.device, self.text_rows.dtype)

    @property
    def attention(self) -> Attention:
        return self.attention_choice.attention

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        config = self.base_model.config.get_text_config()
        head_dim = config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * self.text_rows.element_size()

    @property
    def text_rows(self) -> Float[Tensor, "text d"]:
        """Head rows of the text tokens (a base model may pad its matrix beyond its tokenizer)."""
        return self.base_model.lm_head.weight[: self.first_numeral_id]

    # --- forward -----------------------------------------------------------------------------------------------

    def embed(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens d"]:
        return self.rows.embed(ids, cast(nn.Embedding, self.base_model.get_input_embeddings()), self.first_numeral_id)

    def hidden(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens d"]:
        """Final hidden states of text-and-numeral sequences, causal, padded on the right if at all."""
        return self._decoder(inputs_embeds=self.embed(ids))

    def prefix(self, ids: Int[Tensor, "windows tokens"], grids: Float[Tensor, "windows frames rows cols"]) -> Prefix:
        """Encodes the shared part of each window once; all windows of a run have the same number of tokens."""
        embeddings = self.embed(ids)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
        if self.encoder:
            patches, thw = self.encoder(grids.to(self.device))
            visual = self.base_model.model.visual(patches.to(embeddings.dtype), grid_thw=thw).pooler_output
            is_image = (ids == self.image_id).unsqueeze(-1)
            embeddings = embeddings.masked_scatter(is_image, visual.to(embeddings.dtype))
            positions, _ = self.base_model.model.get_rope_index(
                ids[:1],
                mm_token_type_ids=(ids[:1] == self.image_id).int(),
                image_grid_thw=thw[: grids.shape[1]],
            )
        tree = Branching(self.attention, parent=None)
        hidden = self._decoder(inputs_embeds=embeddings, position_ids=positions.expand(3, len(ids), -1), tree=tree)
        return tree.prefix(hidden, (positions.max() + 1).expand(len(ids)))

    def branch(
        self,
        prefix: Prefix,
        ids: Int[Tensor, "children tokens"],
        lengths: Int[Tensor, "children"] | None = None,
    ) -> tuple[Float[Tensor, "children tokens d"], Prefix]:
        """Final hidden states of sequences that continue the prefixes, and the prefix they make for their own children.

        ``children`` is a multiple of the prefix's sequences; consecutive children share one. All start at the same
        M-RoPE position, where their prefix ends, whatever their siblings hold. ``lengths``: tokens of each child that
        are real, where they are padded on the right.
        """
        start = prefix.position.repeat_interleave(len(ids) // prefix.sequences)
        positions = start[:, None] + torch.arange(ids.shape[1], device=ids.device)
        tree = Branching(self.attention, prefix)
        hidden = self._decoder(inputs_embeds=self.embed(ids), position_ids=positions.expand(3, -1, -1), tree=tree)
        return hidden, tree.prefix(hidden, start + (ids.shape[1] if lengths is None else lengths), lengths)

    def decode(
        self, ids: Int[Tensor, "sequences"], positions: Int[Tensor, "sequences"], tree: TreeContext
    ) -> Float[Tensor, "sequences d"]:
        """One more token of many sequences; ``tree`` holds what each of them has written and what it continues."""
        hidden = self._decoder(
            inputs_embeds=self.embed(ids[:, None]), position_ids=positions.expand(3, 1, -1).transpose(1, 2), tree=tree
        )
        return hidden[:, 0]

    def _decoder(self, **inputs) -> Float[Tensor, "batch tokens d"]:
        decoder = self.base_model.model.language_model
        return decoder(attention_mask=NO_MASK, use_cache=False, **inputs).last_hidden_state

    @property
    def vocabulary_rows(self) -> tuple[Tensor, Tensor]:
        """Head rows of everything the model can say, in the order of token ids: ``[text, d]`` and ``[numerals, d]``."""
        return self.text_rows, self.rows.output

    @property
    def answer_rows(self) -> tuple[Tensor, Tensor]:
        """Head rows of what a forecast may contain: numerals, then the end token as the last one."""
        return self.rows.output, self.base_model.lm_head.weight[self.end_id : self.end_id + 1]

    @property
    def read_in_place(self) -> list[nn.Parameter]:
        """Parameters that are read here and not in their own modules: the numerals' rows and the base's head."""
        return [*self.rows.parameters(), self.base_model.lm_head.weight]

    def logits(self, hidden: Float[Tensor, "positions d"]) -> Float[Tensor, "positions choices"]:
        """Over everything the model can say, in the order of token ids."""
        return row_logits(hidden, self.vocabulary_rows)

    def answer_logits(self, hidden: Float[Tensor, "positions d"]) -> Float[Tensor, "positions numerals+1"]:
        """Over what a forecast may contain: numeral indices, then the end token as the last column."""
        return row_logits(hidden, self.answer_rows)

    # --- what trains -------------------------------------------------------------------------------------------

    def add_lora(self, name: str = SFT_ADAPTER, seed: int = 0) -> None:
        """Adds an adapter and makes it the active one. Named adapters let GRPO keep the SFT adapter as reference.

        Its first factors are drawn from ``seed``, whatever torch drew before; its second ones are zero.
        """
        config = LoraConfig(r=self.spec.lora_r, lora_alpha=self.spec.lora_alpha, target_modules=LORA_TARGETS)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft asks transformers by a name that its next version drops.
            warnings.simplefilter("ignore", FutureWarning)
            torch.manual_seed(seed)
            if isinstance(self.backbone, PeftModel):
                self.backbone.add_adapter(name, config)
            else:
                self.backbone = get_peft_model(self.backbone, config, adapter_name=name)
        # peft makes embeddings require gradients for the sake of reentrant checkpointing, which is not used here: a
        # frozen vision tower would keep all of its activations.
        self.base_model.disable_input_require_grads()
        self.backbone.set_adapter(name)

    @property
    def active_adapter(self) -> str:
        assert isinstance(self.backbone, PeftModel), "this policy has no adapter"
        return str(self.backbone.active_adapter)

    @property
    def adapters(self) -> list[str]:
        return list(self.backbone.peft_config) if isinstance(self.backbone, PeftModel) else []

    def train_only(self, part: str, frames: bool = True) -> None:
        """Chooses the trainable parameters: ``rows`` (numerals), ``lora`` (active adapter + rows), ``full``.

        ``frames``: whether frames are seen. Where none are, the vision tower stays as it is: without gradients it would
        only decay.
        """
        for name, parameter in self.backbone.named_parameters():
            active = isinstance(self.backbone, PeftModel) and f".{self.active_adapter}." in name
            is_lora = "lora_" in name
            parameter.requires_grad_(
                (part == "lora" and is_lora and active) or (part == "full" and (not is_lora or active))
            )
        if not (frames and self.encoder):
            self.base_model.model.visual.requires_grad_(False)
        self.rows.requires_grad_(True)
        self.train()  # gradient checkpointing acts in this mode only

    def begin_grpo(self, seed: int = 0) -> None:
        """Freezes the SFT model as reference and trains a second adapter: its copy, or where it has none a new one.

        With an SFT adapter "adapter off" would not be the reference, and LoRA is never merged (docs/decisions.md).
        """
        had_sft = SFT_ADAPTER in self.adapters
        self.add_lora(GRPO_ADAPTER, seed)
        if had_sft:
            weights = dict(self.backbone.named_parameters())
            for name, parameter in weights.items():
                if f".{GRPO_ADAPTER}." in name:
                    parameter.data.copy_(weights[name.replace(f".{GRPO_ADAPTER}.", f".{SFT_ADAPTER}.")].data)
        self._reference_rows = NumeralRows(self.rows.input.detach().clone(), self.rows.output.detach().clone())
        self._reference_rows.requires_grad_(False)
        self.train_only("lora")

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the policy is the frozen SFT model: its adapter (or none) and its numeral rows."""
        assert isinstance(self.backbone, PeftModel) and self._reference_rows is not None, "call begin_grpo first"
        trained, self.rows = self.rows, self._reference_rows
        try:
            if SFT_ADAPTER in self.adapters:
                self.backbone.set_adapter(SFT_ADAPTER)
                yield
            else:
                with self.backbone.disable_adapter():
                    yield
        finally:
            self.backbone.set_adapter(GRPO_ADAPTER)
            self.rows = trained


def first_numeral_id(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> int:
    """Token id of numeral 0; the others follow. Where the tokenizer has none yet, they come behind its last token."""
    return tokenizer.get_vocab().get(vocabulary.token(0), len(tokenizer))


def frame_encoder(spec: FrameSpec, image_processor: Qwen2VLImageProcessorPil) -> FrameEncoder:
    return FrameEncoder(
        FrameGeometry(spec.height, spec.width, spec.pixels_per_cell),
        spec.power,
        spec.t_max,
        image_processor.image_mean,
        image_processor.image_std,
    )
