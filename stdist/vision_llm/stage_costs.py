"""Parameters, memory and operations of a stage's step, counted on its own code: the policy without weights
(:mod:`stdist.runs.meter`), through the prefix tree, the alignment step and the sampler, one micro-batch of each kind.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from operator import mul, truediv
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from stdist.errors import InputError, is_damage
from stdist.numerals import Vocabulary
from stdist.runs.memory_plan import Weights
from stdist.runs.meter import META, Meter, metered
from stdist.training.eight_bit_engine import moment_bytes
from stdist.training.inference import inference
from stdist.vision_llm.config import AlignmentConfig, Drawing, ForecastStageConfig, GRPOConfig, Optim
from stdist.vision_llm.kernels.prefix import Prefix
from stdist.vision_llm.learning import begin_stage
from stdist.vision_llm.policy.adapters import active_adapter, add_lora
from stdist.vision_llm.policy.checkpoints import assemble, why_not_loaded
from stdist.vision_llm.policy.city_windows import PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.policy.numeral_embeddings import NumeralEmbeddings
from stdist.vision_llm.policy.presets import SHAPES, build_image_processor, build_model, build_tokenizer
from stdist.vision_llm.policy.published import PUBLISHED, published_config
from stdist.vision_llm.policy.spec import PolicySpec
from stdist.vision_llm.rollout.rollouts import max_tokens
from stdist.vision_llm.rollout.sampler import Completions, Sampler
from stdist.vision_llm.stages.alignment import AlignmentStage
from stdist.vision_llm.stages.grpo import SCORINGS, candidates_of
from stdist.vision_llm.stages.sft import sft_loss, sft_tree
from stdist.vision_llm.tree import prefix_tree
from stdist.vision_llm.tree.micro_batches import activation_bytes, sizes_within
from stdist.vision_llm.tree.prefix_tree import Level, Tree, Visit

NF4_BYTES = 4.127 / 8
"""Bytes of a weight and its doubly quantised scale (QLoRA, arXiv 2305.14314, Section 3); no real run counts them."""
VISION, EMBEDDINGS, HEAD, DECODER, NORMS = "vision tower", "embeddings", "head", "decoder", "decoder's vectors"
LORA, ROWS, REFERENCE_LORA, REFERENCE_ROWS = "LoRA", "numeral rows", "reference LoRA", "reference rows"
Stages = tuple[tuple[str, str], ...]
"""Name and ``trainable`` of a run's stages, up to the one that is planned."""


@dataclass(frozen=True)
class Costs:
    """One learner's in one step. ``flops``: of training, ``sampling_flops``: of the candidates that it learns from;
    ``calls``: of the decoder, for the sequences of each depth, and ``prefixes``: those that see frames;
    ``micro_batches``: sequences of each depth at once; ``phases``: as a ``StagePlan`` has them."""

    tokens: int
    flops: float
    calls: list[int]
    micro_batches: list[int]
    phases: dict[str, dict[str, float]]
    prefixes: int = 0
    sampling_flops: float = 0

    def passes(self, weights: list[Weights]) -> tuple[dict[str, int], dict[str, float]]:
        """Passes of a step over all weights of a kind, forward or backward; and those that give it a gradient, if it
        trains.

        Every call of the decoder has a backward pass of its own; behind the last depth is the head. The tower and the
        embeddings, below which nothing trains, are walked backward only where they train. Half of the numeral rows are
        the embeddings', half the head's.
        """
        calls, leaves = sum(self.calls), self.calls[-1]
        forward = {VISION: self.prefixes, EMBEDDINGS: calls}
        walks = {w.kind: forward.get(w.kind, calls) * (1 + (w.trainable or w.kind not in forward)) for w in weights}
        some = {VISION: self.prefixes, HEAD: leaves, ROWS: (calls + leaves) / 2}
        return walks, {w.kind: some.get(w.kind, calls) for w in weights}


@cache
def shape_policy(spec: PolicySpec, stages: Stages) -> PolicyModel:
    """The policy without weights as it begins the last of ``stages``. Text is counted by the presets' tokenizer, which
    knows the wording's words and digits as Qwen's does. Raises InputError where the base's configuration cannot be
    read."""
    with torch.device(META):
        is_preset = spec.base in SHAPES
        model = build_model(spec.base, 0) if is_preset else Qwen2_5_VLForConditionalGeneration(_base_config(spec.base))
        vocabulary, d = Vocabulary(spec.mantissa_digits), model.config.get_text_config().hidden_size
        rows = NumeralEmbeddings(*torch.zeros(2, len(vocabulary), d))
        model = model.to(getattr(torch, spec.dtype))
        policy = assemble(model, build_tokenizer(), build_image_processor(), vocabulary, rows, spec)
        if not is_preset:
            policy.first_numeral_id = model.config.get_text_config().vocab_size
            policy.set_task(spec)
        if not spec.base_is_trained:
            add_lora(policy)
        for name, trainable in stages:
            begin_stage(policy, name, trainable, seed=0)
    return policy


def _base_config(name: str) -> Qwen2_5_VLConfig:
    if known := published_config(name):
        return known
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if not is_damage(error):
            raise
        raise InputError(
            f"policy.base {name} has no configuration to plan with ({why_not_loaded(error)}); "
            f"give a folder with its config.json or one of {', '.join([*SHAPES, *PUBLISHED])}"
        ) from None
    if config.model_type != "qwen2_5_vl":
        raise InputError(f"policy.base {name} is a {config.model_type}; stdist needs a Qwen2.5-VL")
    return config


def policy_weights(policy: PolicyModel, four_bit: bool, optim: Optim = "adamw_torch") -> list[Weights]:
    """Everything a learner has, by kind. ZeRO-3 leaves whole what is read outside of its own module."""
    eight_bit = optim != "adamw_torch"
    kinds: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in policy.named_parameters():
        kinds.setdefault(_kind(policy, name, parameter), []).append(parameter)
    whole = {id(p) for p in policy.read_in_place}
    return [
        Weights(
            kind,
            sum(p.numel() for p in parameters),
            NF4_BYTES if four_bit and kind == DECODER else parameters[0].element_size(),
            parameters[0].requires_grad,
            id(parameters[0]) in whole,
            sum(moment_bytes(p.numel()) for p in parameters) if eight_bit and parameters[0].requires_grad else None,
            optim == "paged_adamw_8bit",
        )
        for kind, parameters in kinds.items()
    ]


def _kind(policy: PolicyModel, name: str, parameter: Tensor) -> str:
    if not name.startswith("backbone."):
        return ROWS if name.startswith("rows.") else REFERENCE_ROWS
    if "lora_" in name:
        return LORA if f".{active_adapter(policy)}." in name else REFERENCE_LORA
    parts = {"visual": VISION, "embed_tokens": EMBEDDINGS, "lm_head": HEAD}
    base = next((kind for part, kind in parts.items() if f".{part}." in name), None)
    return base or (DECODER if parameter.ndim > 1 else NORMS)


def alignment_costs(
    spec: PolicySpec, stages: Stages, config: AlignmentConfig, examples: int, fused: bool = True
) -> Costs:
    """Measures the stage's own step on its first micro-batch, for ``examples`` of them in all. ``fused``: whether
    kernels may add to gradients, as they may in plain torch."""
    at_once = -(-examples // config.gradient_accumulation_steps)
    tokens, flops, _, training = _alignment(spec, stages, at_once, config.values_per_example, fused)
    calls = config.gradient_accumulation_steps
    return Costs(tokens * examples // at_once, flops * examples / at_once, [calls], [at_once], {"training": training})


def example_flops(spec: PolicySpec, stages: Stages, config: AlignmentConfig) -> float:
    """Operations of one example without its backward pass."""
    at_once = -(-config.train_batch_size // config.gradient_accumulation_steps)
    return _alignment(spec, stages, at_once, config.values_per_example, True)[2] / at_once


@cache
def _alignment(
    spec: PolicySpec, stages: Stages, at_once: int, values: int, fused: bool
) -> tuple[int, int, int, dict[str, float]]:
    """Tokens, operations, those of them before the backward pass, and bytes."""
    policy = shape_policy(spec, stages)
    config = AlignmentConfig(train_batch_size=at_once, values_per_example=values)
    with metered(policy, fused=fused) as meter:
        walk = _Walk(policy, meter)
        tokens = AlignmentStage(stages[-1][0], policy, config, seed=0).step(0, walk.backward)["tokens"]
    return int(tokens), meter.flops, meter.flops - walk.flops[1][0], walk.bytes


def window_costs(
    spec: PolicySpec, stages: Stages, config: ForecastStageConfig, windows: int, cells: int, fused: bool = True
) -> Costs:
    """Measures a step on ``windows`` × ``cells``. GRPO's reference and sampler go forward over its tree, once
    for all updates on the same candidates; a sampler step by step is as many operations. Candidates of one pass are no
    leaves of their own."""
    grpo = config if isinstance(config, GRPOConfig) else None
    direct = grpo.num_generations if grpo and grpo.candidates == "direct" else 0
    families = [cells, grpo.num_generations] if grpo and not direct else [cells]
    sequences = list(accumulate([windows, *families], mul))
    tokens, sequence_bytes = _sequence(spec, stages, direct)
    calls, at_once = micro_batches(windows, families, sizes_within(config.activation_bytes, sequence_bytes))
    forward, backward, temporaries = _tree(spec, stages, tuple(at_once), direct, fused)
    phases = {
        "training": {"activations": sum(map(mul, sequence_bytes, at_once)), "temporaries": temporaries},
    }
    if grpo:
        phases["sampling"] = sampling_bytes(spec, stages, windows, cells, grpo.num_generations, grpo.candidates)
    one_forward = sum(map(mul, forward, sequences))
    more_forwards = one_forward / grpo.num_iterations if grpo else 0
    flops = one_forward + sum(map(mul, backward, sequences)) + more_forwards
    return Costs(sum(map(mul, tokens, sequences)), flops, calls, at_once, phases, calls[0], more_forwards)


def micro_batches(windows: int, families: list[int], sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Calls of the decoder for each depth of a tree with ``families`` children a parent, at most ``sizes`` in one; and
    the sequences of the largest. Counted on the tree's own walk, over a policy that encodes nothing."""
    calls, largest = [0] * len(sizes), [0] * len(sizes)

    class Nothing(nn.Module):
        def prefix(self, ids: Tensor, grids: Tensor | None = None, parent: Prefix | None = None) -> Prefix:
            depth = depth_of(parent)
            calls[depth] += 1
            largest[depth] = max(largest[depth], len(ids))
            return Prefix([], [], torch.empty(len(ids), 0), ids[:, 0], parent)

        def branch(self, parent: Prefix, ids: Tensor) -> tuple[Tensor, Prefix]:
            return torch.empty(*ids.shape, 0), self.prefix(ids, None, parent)

    ids = [torch.zeros(count, 1, dtype=torch.int64) for count in accumulate([windows, *families], mul)]
    tree = Tree(ids[0], ids[0].float(), tuple(map(Level, ids[1:])))
    prefix_tree.forward(Nothing(), tree, lambda leaves, states: states, sizes)  # type: ignore[arg-type]
    return calls, largest


def depth_of(parent: Prefix | None) -> int:
    """Returns the depth of a parent's children; 0 where there is no parent."""
    return 1 + depth_of(parent.parent) if parent else 0


@cache
def _sequence(spec: PolicySpec, stages: Stages, direct: int) -> tuple[list[int], list[int]]:
    """Tokens of one sequence of each depth, and the bytes that autograd keeps of it. ``direct``: candidates of a cell
    that are drawn in one pass, if they are."""
    policy = shape_policy(spec, stages)
    tree, _ = _stage_tree(policy, stages[-1][0], (1, 1, 1), direct)
    with metered(policy):
        return [x.shape[1] for x in (tree.shared, *(level.ids for level in tree.levels))], activation_bytes(
            policy, tree
        )


@cache
def _tree(
    spec: PolicySpec, stages: Stages, at_once: tuple[int, ...], direct: int, fused: bool
) -> tuple[list[float], list[float], float]:
    """Operations of one sequence of each depth, forward and backward; bytes of what comes and goes where about
    ``at_once`` of them are in memory."""
    policy = shape_policy(spec, stages)
    families = [-(-children // parents) for parents, children in zip([1, *at_once[:-1]], at_once, strict=True)]
    tree, visit = _stage_tree(policy, stages[-1][0], (*families, 1), direct)
    with metered(policy, fused=fused) as meter:
        walk = _Walk(policy, meter)
        prefix_tree.backward(walk, tree, walk.visit(visit), walk.backward, at_once)  # type: ignore[arg-type]
    sequences = [len(tree.shared), *map(len, tree.levels)]
    forward, backward = (list(map(truediv, flops, sequences)) for flops in walk.flops)
    return forward, backward, walk.bytes["temporaries"]


class _Walk:
    """A policy that notes the operations of each depth of a tree, forward and backward, and the bytes held."""

    def __init__(self, policy: PolicyModel, meter: Meter):
        self._policy, self._meter, self._depth = policy, meter, 0
        self.flops: tuple[list[int], list[int]] = ([], [])
        self.bytes: dict[str, float] = {"activations": 0, "temporaries": 0}

    def prefix(self, *inputs: Tensor) -> Prefix:
        return self._noted(0, 0, self._policy.prefix, *inputs)

    def branch(self, node: Prefix, *inputs: Tensor) -> tuple[Tensor, Prefix]:
        return self._noted(0, depth_of(node), self._policy.branch, node, *inputs)

    def visit(self, visit: Visit) -> Visit:
        return lambda rows, states: self._noted(0, self._depth, visit, rows, states)

    def backward(self, loss: Tensor) -> None:
        held = self._meter.live
        self._noted(1, self._depth, torch.autograd.backward, loss)
        most = max(sum(self.bytes.values()), self._meter.peak)
        activations = max(self.bytes["activations"], held)
        self.bytes = {"activations": activations, "temporaries": most - activations}
        self._depth -= 1

    def _noted(self, way: int, depth: int, function: Callable, *inputs):
        self._depth, before = depth, self._meter.flops
        result = function(*inputs)
        self.flops[way].extend([0] * (depth + 1 - len(self.flops[way])))
        self.flops[way][depth] += self._meter.flops - before
        return result


class _EnoughError(Exception):
    pass


@cache
def sampling_bytes(
    spec: PolicySpec, stages: Stages, windows: int, cells: int, generations: int, candidates: Drawing
) -> dict[str, float]:
    """Bytes held up to the candidates' first token: room for all later ones is made before; in one pass, to the end."""
    policy = shape_policy(spec, stages)
    batch, chain, most = shape_batch(policy, windows, cells), candidates == "chain", max_tokens(policy, candidates)
    sampler = Sampler(policy, "sample", generations, allow_eos=chain)
    uniforms = torch.rand(windows * cells * generations, most, device=META)
    with (
        metered(policy, uniforms) as meter,
        inference(policy),
        suppress(_EnoughError),
        patch.object(policy, "decode", side_effect=_EnoughError),
    ):
        prefix = policy.prefix(batch.shared, batch.grids)
        if chain:
            sampler.generate(prefix, batch.prompts, most, uniforms)
        else:
            sampler.draw(prefix, batch.prompts, uniforms)
    return {"keys, values and logits": meter.peak}


def _stage_tree(policy: PolicyModel, stage: str, families: tuple[int, ...], direct: int) -> tuple[Tree, Visit]:
    """The tree of SFT or GRPO on windows of nothing, and what its leaves are asked."""
    windows, cells, generations = (*families, 1)[:3]
    batch = shape_batch(policy, windows, cells)
    if stage == "sft":
        return sft_tree(policy, batch, torch.zeros(windows * cells, dtype=torch.bool)), sft_loss(policy, batch)
    scoring, per_leaf = SCORINGS["direct" if direct else "chain"], direct or 1
    shape = windows * cells * (direct or generations), policy.spec.setting.horizon + (not direct)
    nothing, numerals = torch.zeros(shape, device=META), torch.zeros(shape, dtype=torch.long)
    completions = Completions(numerals, numerals == 0, nothing, nothing, numerals[:, 0])

    def loss(leaves: slice, states: Tensor) -> Tensor:
        return scoring.log_probs(policy, states, completions, candidates_of(leaves, per_leaf), 1.0).sum()

    return scoring.tree(policy, batch, completions), loss


def shape_batch(policy: PolicyModel, windows: int, cells: int) -> PolicyBatch:
    """Windows of nothing, for a policy without weights."""
    setting, frames, count = policy.spec.setting, policy.spec.frames, windows * cells
    grid, zeros = (frames.height, frames.width) if frames else (1, 1), np.zeros(count, np.int64)
    shared = policy.prompts.shared(np.datetime64("2013-11-04T00:00"))
    truth = np.zeros((windows, cells, setting.horizon))
    return PolicyBatch(
        torch.tensor([shared] * windows),
        torch.zeros(windows, setting.history, *grid, device=META),
        torch.from_numpy(policy.prompts.cells(zeros, zeros, np.zeros((count, setting.history)))),
        torch.zeros(count, setting.horizon + 1, dtype=torch.long),
        truth,
        truth == 0,
        np.arange(cells),
        np.zeros(windows, np.int64),
    )
