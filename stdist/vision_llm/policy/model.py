"""Qwen2.5-VL as a forecaster: the base model with or without LoRA, and the numerals' own embeddings and head.

The Hugging Face model is never edited: embeddings are mixed here from text, numerals and visual tokens, the decoder
runs on them, and the head is applied by the losses and the sampler at the positions that matter. A window's shared
prompt is encoded once (``prefix``); its cells and candidates read the prefix's keys and values (``branch``).
"""

from typing import cast

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from stdist.numerals import Vocabulary
from stdist.vision_llm.kernels.attention import Attention, Choice, choose
from stdist.vision_llm.kernels.prefix import Branching, Prefix
from stdist.vision_llm.kernels.tree_attention import IMPLEMENTATION, NO_MASK, TreeContext
from stdist.vision_llm.policy.frames import FrameEncoder, FrameGeometry
from stdist.vision_llm.policy.numeral_embeddings import NumeralEmbeddings
from stdist.vision_llm.policy.prompts import BLANK, END, IMAGE, PromptEncoder
from stdist.vision_llm.policy.spec import FrameSpec, PolicySpec


class PolicyModel(nn.Module):
    """The policy that all stages train. Build one with :mod:`stdist.vision_llm.policy.checkpoints`, not by hand.

    Args:
        model: the base, its weights in their final dtype.
        tokenizer: the base's; the numerals may be in it already (a checkpoint's) or not.
        image_processor: the base's own; its mean and standard deviation normalise frames.
        vocabulary: the numerals.
        rows: their embeddings and head weights.
        spec: the task, the frames, and how LoRA is shaped.
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Qwen2VLImageProcessorPil,
        vocabulary: Vocabulary,
        rows: NumeralEmbeddings,
        spec: PolicySpec,
    ):
        super().__init__()
        model.config.get_text_config()._attn_implementation = IMPLEMENTATION
        self.backbone: Qwen2_5_VLForConditionalGeneration | PeftModel = model
        self.rows = rows
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.vocabulary = vocabulary
        self.first_numeral_id = first_numeral_id(tokenizer, vocabulary)
        self.reference_rows: NumeralEmbeddings | None = None  # of GRPO, see `adapters`
        self.set_task(spec)

    def set_task(self, spec: PolicySpec) -> None:
        """Points the policy at a task: another city's name, grid or frames, the same weights."""
        self.spec = spec
        self.encoder = frame_encoder(spec.frames, self.image_processor) if spec.frames else None
        tokens_per_frame = self.encoder.geometry.tokens if self.encoder else 0
        self.prompts = PromptEncoder(
            self.tokenizer, self.vocabulary, self.first_numeral_id, spec.setting, tokens_per_frame
        )
        self.image_id, self.end_id, self.blank_id = map(self.prompts.token_id, (IMAGE, END, BLANK))

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
        return choose(self.device, self.text_head.dtype)

    @property
    def attention(self) -> Attention:
        return self.attention_choice.attention

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        config = self.base_model.config.get_text_config()
        head_dim = config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * self.text_head.element_size()

    @property
    def text_head(self) -> Float[Tensor, "text d"]:
        """Head weights of the text tokens (a base model may pad its matrix beyond its tokenizer)."""
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
        self, prefix: Prefix, ids: Int[Tensor, "children tokens"]
    ) -> tuple[Float[Tensor, "children tokens d"], Prefix]:
        """Final hidden states of sequences that continue the prefixes, and the prefix they make for their own children.

        ``children`` is a multiple of the prefix's sequences; consecutive children share one. All start at the same
        M-RoPE position, where their prefix ends, whatever their siblings hold.
        """
        start = prefix.position.repeat_interleave(len(ids) // prefix.sequences)
        positions = start[:, None] + torch.arange(ids.shape[1], device=ids.device)
        tree = Branching(self.attention, prefix)
        hidden = self._decoder(inputs_embeds=self.embed(ids), position_ids=positions.expand(3, -1, -1), tree=tree)
        return hidden, tree.prefix(hidden, start + ids.shape[1])

    def decode(
        self, ids: Int[Tensor, " sequences"], positions: Int[Tensor, " sequences"], tree: TreeContext
    ) -> Float[Tensor, "sequences d"]:
        """One more token of many sequences; ``tree`` holds the tokens of each of them and what it continues."""
        hidden = self._decoder(
            inputs_embeds=self.embed(ids[:, None]), position_ids=positions.expand(3, 1, -1).transpose(1, 2), tree=tree
        )
        return hidden[:, 0]

    def _decoder(self, **inputs) -> Float[Tensor, "batch tokens d"]:
        decoder = self.base_model.model.language_model
        return decoder(attention_mask=NO_MASK, use_cache=False, **inputs).last_hidden_state

    @property
    def full_head(self) -> tuple[Tensor, Tensor]:
        """Head weights of every token, in the order of token ids: ``[text, d]`` and ``[numerals, d]``."""
        return self.text_head, self.rows.output

    @property
    def answer_head(self) -> tuple[Tensor, Tensor]:
        """Head weights of the tokens of a forecast: numerals, then the end token as the last one."""
        return self.rows.output, self.base_model.lm_head.weight[self.end_id : self.end_id + 1]

    @property
    def read_in_place(self) -> list[nn.Parameter]:
        """Parameters that are not read in their own modules' forward: the numerals', those of the reference too, and
        the base's head."""
        reference = self.reference_rows.parameters() if self.reference_rows else ()
        return [*self.rows.parameters(), *reference, self.base_model.lm_head.weight]


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
