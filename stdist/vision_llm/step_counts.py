"""What a learner does and holds in a step of a stage, on paper.

Micro-batches and calls of the decoder are those the prefix tree makes. What autograd keeps of a token is a formula
(:func:`activation_bytes_per_token`). Attention's own products are left out of the operations: under 2 % of a 7B's at a
thousand keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

from stdist.numerals.alignment_tasks import Piece
from stdist.runs.memory_plan import Ranks, Weights, gathered_bytes
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import AlignmentConfig, ForecastStageConfig, GRPOConfig, VisionLLMConfig
from stdist.vision_llm.dataset import stage_config
from stdist.vision_llm.kernels.token_losses import TILE_BYTES, TILE_POSITIONS
from stdist.vision_llm.model_counts import (
    DECODER,
    EMBEDDINGS,
    HEAD,
    LORA,
    ROWS,
    VISION,
    Base,
    Shape,
    itemsize,
    vocabulary_of,
)
from stdist.vision_llm.policy.presets import build_tokenizer
from stdist.vision_llm.policy.prompts import END
from stdist.vision_llm.rollout.decode_batch import CACHE_BYTES, MOST_SEQUENCES
from stdist.vision_llm.rollout.rollouts import EXTRA_TOKENS
from stdist.vision_llm.rollout.sampler import LOGIT_BYTES
from stdist.vision_llm.stages.alignment import BATCHES
from stdist.vision_llm.tree.prefix_tree import slices


@dataclass(frozen=True)
class Work:
    """Of one learner in one step. ``walks``: passes of the update over all weights of a kind, forward or backward;
    ``backwards``: passes that give a kind a gradient, if it trains; ``phases``: bytes that are held in turn, never
    together; ``micro_batches``: sequences of each depth at once."""

    tokens: int
    flops: float
    walks: dict[str, int]
    backwards: dict[str, float]
    phases: dict[str, dict[str, float]]
    micro_batches: list[int]


def ranks_of(config: VisionLLMConfig) -> Ranks:
    learners = config.learners
    stage = learners.zero_stage if learners.engine == "deepspeed" else 0
    return Ranks(learners.num_workers, stage, learners.offload_optimizer)


def stage_work(config: VisionLLMConfig, stage: str, base: Base, weights: list[Weights], shape: Shape) -> Work:
    """Raises InputError where the learners cannot share the stage's batch evenly."""
    if isinstance(stage_config(config, stage), AlignmentConfig):
        work = _alignment_work(config, stage, base, weights)
    else:
        work = _window_work(config, stage, base, weights, shape)
    live, everything = gathered_bytes(weights, ranks_of(config))
    if everything:
        # ZeRO-3 makes the policy whole for every validation; a stage that samples is refused it.
        work.phases["training"]["gathered weights"] = live
        work.phases.setdefault("writing", {})["gathered weights"] = everything
    return work


def _share(config: VisionLLMConfig, count: int, what: str) -> int:
    mine = ProcessGroup(0, config.learners.num_workers).local_slice(count, what)
    return mine.stop - mine.start


def _window_work(config: VisionLLMConfig, stage: str, base: Base, weights: list[Weights], shape: Shape) -> Work:
    settings: ForecastStageConfig = getattr(config, stage)
    windows = _share(config, settings.windows_per_step, f"{stage}.windows_per_step")
    cells = min(settings.cells_per_window, shape.cells)
    grpo = settings if isinstance(settings, GRPOConfig) else None
    # Of every depth: children of each parent, and their tokens. The last token of an answer is predicted, never read.
    tokens = [shape.shared, shape.cell, shape.horizon] if grpo else [shape.shared, shape.cell + shape.horizon]
    families = [cells, grpo.num_generations] if grpo else [cells]
    sequences = list(accumulate([windows, *families], mul))
    kept = [each * activation_bytes_per_token(config, base, weights) for each in tokens]
    if any(w.kind == VISION and w.trainable for w in weights):
        kept[0] += shape.patches * _vision_bytes_per_patch(config, base)
    share = settings.activation_bytes // len(kept)
    sizes = [max(1, int(share // each)) for each in kept]
    at_once = [min(pair) for pair in zip(sizes, sequences, strict=True)]
    calls = decoder_calls(windows, families, sizes)
    answers = sequences[-1] * (shape.horizon + 1)
    head = [ROWS] if grpo else [_text_rows(weights), ROWS]
    phases = {
        "training": {
            "activations": sum(a * b for a, b in zip(at_once, kept, strict=True)),
            "head tiles": _tile_bytes(base, weights, head),
        }
    }
    if grpo:
        phases["writing"] = _sampling_bytes(config, base, weights, grpo, shape, sequences)
    total = sum(a * b for a, b in zip(tokens, sequences, strict=True))
    units = {DECODER: total, VISION: windows * shape.patches} | dict.fromkeys(head, answers)
    # For GRPO the reference and the sampler go forward over the same tree.
    flops = _flops(weights, units, 3 if grpo else 1, config.policy.gradient_checkpointing)
    return Work(total, flops, *_passes(weights, calls[0], sum(calls), calls[-1]), phases, at_once)


def _alignment_work(config: VisionLLMConfig, stage: str, base: Base, weights: list[Weights]) -> Work:
    settings: AlignmentConfig = getattr(config, stage)
    tokenizer = build_tokenizer()
    batch = BATCHES[stage](
        vocabulary_of(config.numerals.mantissa_digits),
        config.seed,
        0,
        settings.train_batch_size,
        settings.values_per_example,
    )

    def count(pieces: tuple[Piece, ...]) -> int:
        return sum(len(tokenizer(p)["input_ids"] if isinstance(p, str) else p) for p in pieces)

    around = count(("<|im_start|>user\n", f"{END}\n<|im_start|>assistant\n"))
    answers = [count(example.answer) + 1 for example in batch]
    longest = max(around + count(e.prompt) + answer for e, answer in zip(batch, answers, strict=True))
    examples = _share(config, settings.train_batch_size, f"{stage}.train_batch_size")
    at_once = -(-examples // settings.gradient_accumulation_steps)
    per_token = activation_bytes_per_token(config, base, weights)
    head = [_text_rows(weights), ROWS]
    training = {"activations": at_once * longest * per_token, "head tiles": _tile_bytes(base, weights, head)}
    positions = sum(answers) * examples // len(batch)
    units = {DECODER: examples * longest} | dict.fromkeys(head, positions)
    flops = _flops(weights, units, 1, config.policy.gradient_checkpointing)
    calls = settings.gradient_accumulation_steps
    return Work(examples * longest, flops, *_passes(weights, 0, calls, calls), {"training": training}, [at_once])


def _text_rows(weights: list[Weights]) -> str:
    """The kind that holds the head's rows of text: the embeddings where the two are tied."""
    return HEAD if any(w.kind == HEAD for w in weights) else EMBEDDINGS


def decoder_calls(windows: int, families: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Forward calls of each depth of a prefix tree: ``families`` children a parent, at most ``sizes`` in one call."""
    calls = [0] * len(sizes)

    def below(parents: int, depth: int) -> None:
        family = families[depth - 1] if depth else 1
        for start, stop in slices(parents * family, sizes[depth], family):
            calls[depth] += 1
            if depth < len(families):
                below(stop - start, depth + 1)

    below(windows, 0)
    return calls


def _passes(weights: list[Weights], prefixes: int, calls: int, leaves: int) -> tuple[dict[str, int], dict[str, float]]:
    """``Work.walks`` and ``Work.backwards`` where the decoder is called ``calls`` times, each with a backward pass
    of its own: ``prefixes`` of these calls see frames, behind ``leaves`` of them is the head.

    The tower and the embeddings, below which nothing trains, are walked backward only where they train. Half of the
    numeral rows are the embeddings', half the head's.
    """
    forward = {VISION: prefixes, EMBEDDINGS: calls}
    walks = {w.kind: forward.get(w.kind, calls) * (1 + (w.trainable or w.kind not in forward)) for w in weights}
    some = {VISION: prefixes, HEAD: leaves, ROWS: (calls + leaves) / 2}
    return walks, {w.kind: some.get(w.kind, calls) for w in weights}


def _flops(weights: list[Weights], units: dict[str, int], forwards: int, recomputed: bool) -> float:
    """2 a weight and unit (a token, patch or position) for each forward pass, 2 for the gradient of the input and 2 for
    that of the weight where it trains (Kaplan et al., arXiv 2001.08361, Section 2.1). Head tiles are always made again
    in the backward pass, layers where gradients are checkpointed."""
    total = 0.0
    for w in weights:
        per_token = w.kind in (DECODER, LORA)
        passes = forwards + w.trainable + (w.kind != VISION or w.trainable)
        passes += recomputed if per_token else w.kind != VISION
        count = w.count / 2 if w.kind == ROWS else w.count  # the other half is looked up
        total += 2 * count * units.get(DECODER if per_token else w.kind, 0) * passes
    return total


def activation_bytes_per_token(config: VisionLLMConfig, base: Base, weights: list[Weights]) -> float:
    """What autograd keeps of one token in the decoder, keys and values for its children included.

    A layer keeps, of ``b`` bytes an element: two norms' inputs in float32, query and attention's output, key and value,
    gate, its activation and up; where its matrices or LoRA train, also what they multiply, which LoRA of another dtype
    copies for each of its matrices. With gradient checkpointing a layer keeps its input, keys and values, and one layer
    at a time all of this. Around the layers: the embedding and the last norm's input.
    """
    text = base.config.get_text_config()
    d, mlp = text.hidden_size, text.intermediate_size
    kv = d // text.num_attention_heads * text.num_key_value_heads
    b = itemsize(config)
    around = (4 + b) * d
    layer = 8 * d + 2 * b * (d + kv) + 3 * b * mlp
    trained = {w.kind: w.bytes_each for w in weights if w.trainable}
    if DECODER in trained:
        layer += 4 * b * d + b * mlp
    elif trained.get(LORA) == b:
        layer += 2 * b * d + b * mlp
    elif LORA in trained:
        layer += 6 * trained[LORA] * d + trained[LORA] * mlp
    if config.policy.gradient_checkpointing:
        return around + text.num_hidden_layers * b * (d + 2 * kv) + layer
    return around + text.num_hidden_layers * layer


def _vision_bytes_per_patch(config: VisionLLMConfig, base: Base) -> float:
    """The same of a trained vision tower, with what its rotation and its cut into images copy."""
    vision: Any = base.config.vision_config
    b = itemsize(config)
    d, mlp = vision.hidden_size, vision.intermediate_size
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return b * pixels + vision.depth * (8 * d + 11 * b * d + 4 * b * mlp)


def _tile_bytes(base: Base, weights: list[Weights], kinds: list[str]) -> float:
    """Of :mod:`token_losses` on a GPU: a tile of logits and its rounded copy, its rows, and their gradient's sums."""
    d, tile = base.config.get_text_config().hidden_size, TILE_BYTES["cuda"]
    rows = {w.kind: w.count // d // (2 if w.kind == ROWS else 1) for w in weights}
    width = min(tile // 4 // max(TILE_POSITIONS, d), max(rows[kind] for kind in kinds))
    return width * (6 * TILE_POSITIONS + 8 * d)


def _sampling_bytes(
    config: VisionLLMConfig, base: Base, weights: list[Weights], grpo: GRPOConfig, shape: Shape, sequences: list[int]
) -> dict[str, float]:
    """Memory of writing the candidates, as :class:`DecodeBatch` and the sampler hold it."""
    text, b = base.config.get_text_config(), itemsize(config)
    head_dim = text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * b
    windows, cells, longest = sequences[0], sequences[1], shape.horizon + EXTRA_TOKENS
    most = max(1, min(MOST_SEQUENCES, CACHE_BYTES // (longest * per_token)) // grpo.num_generations)
    at_once = -(-cells // -(-cells // most))
    places = windows * shape.shared + at_once * (2 * shape.cell + grpo.num_generations * longest)
    rows = next(w for w in weights if w.kind == ROWS).count // 2
    logits = 4 * at_once * grpo.num_generations * (rows // text.hidden_size)
    return {
        "keys and values": places * per_token,
        "logits": 3 * min(LOGIT_BYTES, logits),  # with their logarithms and probabilities
        "rounded rows": rows * b if b < 4 else 0,
    }
