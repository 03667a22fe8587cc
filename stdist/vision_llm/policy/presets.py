"""Small models of the true architecture, built from its configuration: no network, no download.

``tiny`` trains on two CPU cores within minutes, ``small`` is the shape the benchmarks use. Both carry a byte-level BPE
tokenizer with Qwen's special tokens and digit splitting, trained on the project's own prompt wording.
"""

from dataclasses import dataclass
from functools import cache

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# Qwen's own split: words, single digits, runs of punctuation.
QWEN_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Shape:
    """Sizes of a preset: the decoder's and the vision tower's width ``d``, ``mlp`` width and ``layers``."""

    d: int
    mlp: int
    layers: int
    vision_d: int
    vision_mlp: int
    vision_layers: int
    heads: int = 4
    kv_heads: int = 2


SHAPES = {
    "tiny": Shape(d=128, mlp=384, layers=4, vision_d=64, vision_mlp=128, vision_layers=2),
    "small": Shape(d=256, mlp=704, layers=6, vision_d=128, vision_mlp=256, vision_layers=4),
}
# Words of the prompts of all stages; every word becomes one token, every digit stays one.
WORDING = """
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday system user assistant You forecast city City traffic
    channel internet sms call speed flow minutes apart Now hour Values of one cell next row col history synthetic milan
    Convert Transcribe the following string represented numerical values value to tokens token string
    Add Subtract Multiply two second first vectors vector from element by and answer in → ⊙ + - : . , '
"""


@cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=SPECIAL_TOKENS,
    )
    # Leading spaces matter to byte-level BPE: every word is shown with and without one.
    corpus = [f"{prefix}{word}" for word in WORDING.split() for prefix in ("", " ", " ")]
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer.to_str()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The presets' tokenizer; the numerals are not in it yet."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS,
    )


def build_model(preset: str, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A freshly initialised Qwen2.5-VL of the preset's shape, float32, reproducible from ``seed``."""
    shape, tokenizer = SHAPES[preset], build_tokenizer()

    def token_id(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(f"<|{name}|>"))  # type: ignore[arg-type]

    channels = shape.d // shape.heads // 2
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": shape.d,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 32768,
            # Small models train faster from 1/√d than from the 0.02 that suits thousands of channels.
            "initializer_range": shape.d**-0.5,
            # Rotary channels shared out to time, height and width as in the 7B model: a quarter, and the rest halved.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [channels // 4, channels * 3 // 8, channels - channels // 4 - channels * 3 // 8],
            },
            "bos_token_id": token_id("endoftext"),
            "eos_token_id": token_id("im_end"),
        },
        vision_config={
            "hidden_size": shape.vision_d,
            "intermediate_size": shape.vision_mlp,
            "depth": shape.vision_layers,
            "num_heads": shape.heads,
            "out_hidden_size": shape.d,
            "initializer_range": shape.vision_d**-0.5,
            "fullatt_block_indexes": [shape.vision_layers - 1],
        },
        image_token_id=token_id("image_pad"),
        video_token_id=token_id("video_pad"),
        vision_start_token_id=token_id("vision_start"),
        vision_end_token_id=token_id("vision_end"),
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config)


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """The architecture's own image processor, saved with checkpoints so that others can load them."""
    return Qwen2VLImageProcessorPil()
