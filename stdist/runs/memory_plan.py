"""Memory and communication of one training step on paper: bytes that each rank holds and sends, from counts alone.

ZeRO (Rajbhandari et al., arXiv 1910.02054): Section 3 and Figure 1 for what is held, Section 7 for what is sent. Knows
no model: whoever has one counts its weights and how often a step walks over them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stdist.errors import InputError

GPUS_PER_NODE = 8
NVLINK = 450e9
"""Bytes a second and direction of one GPU inside a node: NVLink 4, 900 GB/s both ways (NVIDIA H100 data sheet)."""
INFINIBAND = 50e9
"""Bytes a second and direction of one GPU's own adapter between nodes: 400 Gb/s NDR, eight a node (NVIDIA DGX H100)."""
PEAK_FLOPS = 989e12
"""Dense bfloat16 operations a second (NVIDIA H100 SXM data sheet, without sparsity)."""
MFU = 0.22
"""Share of the peak that is assumed; here it is not measured. LoRA trains on short batches, and Qwen's README reports
17 % (256 tokens) to 27 % (512) of an A100 for a 7B; docs/scaling.md has the sum. Full training of long sequences has
more: torchtitan's 8B on eight H100 0.33-0.39."""
ADAMW_MOMENTS = 2
MIXED_PRECISION_STATE = 12
"""K of ZeRO's Section 3.1: a float32 copy of the weight and AdamW's two moments. DeepSpeed's stages 1 and 2 hold a
copy of float32 weights too, stage 3 does not."""
REDUCE_BUCKET = 500_000_000
"""Elements of DeepSpeed's ``reduce_bucket_size``, allocated whole whatever is trained."""
LIVE_WEIGHTS = 1_000_000_000
"""Elements of DeepSpeed's ``stage3_max_live_parameters``: what ZeRO-3 holds gathered at a time."""


@dataclass(frozen=True)
class Weights:
    """``count`` parameters of one kind, ``bytes_each`` as they are held (gradients have the same). ``whole``: ZeRO-3
    leaves them on every rank, since they are read outside of their own module. ``moments``: bytes of AdamW's two in
    plain torch, where they have not the dtype of the weight; ``paged``: in memory that moves to the CPU where room is
    short."""

    kind: str
    count: int
    bytes_each: float
    trainable: bool = False
    whole: bool = False
    moments: float | None = None
    paged: bool = False

    @property
    def bytes(self) -> float:
        return self.count * self.bytes_each


@dataclass(frozen=True)
class Ranks:
    """``zero_stage`` 0 is plain torch: AdamW's moments have the dtype of their weight and there is no other copy.
    ``offload_optimizer``: states, and from stage 2 on gradients, lie in CPU memory (ZeRO-Offload, arXiv 2101.06840)."""

    world_size: int = 1
    zero_stage: int = 0
    offload_optimizer: bool = False

    def shard(self, amount: float, from_stage: int) -> float:
        return amount / self.world_size if self.zero_stage >= from_stage else amount


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one kind of weights on one rank; ``host`` in CPU memory, the others on the device."""

    weights: float
    gradients: float = 0
    optimizer: float = 0
    host: float = 0

    @property
    def device(self) -> float:
        return self.weights + self.gradients + self.optimizer


def state_bytes(weights: Weights, ranks: Ranks) -> StateBytes:
    """Bytes of ``weights`` on a rank between two steps, with their gradients (ZeRO, Figure 1)."""
    held = weights.bytes if weights.whole else ranks.shard(weights.bytes, 3)
    if not weights.trainable:
        return StateBytes(held)
    if weights.moments is not None:
        on_device, paged = (0.0, weights.moments) if weights.paged else (weights.moments, 0.0)
        return StateBytes(held, weights.bytes, on_device, paged)
    moments = ADAMW_MOMENTS * weights.bytes_each
    copied = ranks.zero_stage in (1, 2) or (ranks.zero_stage == 3 and weights.bytes_each < 4)
    each = MIXED_PRECISION_STATE if copied else moments
    gradients, optimizer = ranks.shard(weights.bytes, 2), ranks.shard(weights.count * each, 1)
    if not ranks.offload_optimizer:
        return StateBytes(held, gradients, optimizer)
    if ranks.zero_stage == 1:
        return StateBytes(held, gradients, host=optimizer)
    return StateBytes(held, host=gradients + optimizer)


def bucket_bytes(weights: Sequence[Weights], ranks: Ranks) -> float:
    """DeepSpeed's buffer for gradients on their way, at its default size."""
    return REDUCE_BUCKET * max((w.bytes_each for w in weights if w.trainable), default=0) if ranks.zero_stage else 0


def gathered_bytes(weights: Sequence[Weights], ranks: Ranks) -> tuple[float, float]:
    """Bytes gathered on a rank of ZeRO-3 beside its shards: while it trains, and where all weights are whole at once,
    as for generation. ``(0, 0)`` where nothing is sharded."""
    sharded = [w for w in weights if not w.whole]
    if ranks.zero_stage < 3 or ranks.world_size == 1 or not sharded:
        return 0, 0
    everything, count = sum(w.bytes for w in sharded), sum(w.count for w in sharded)
    return everything * min(1, LIVE_WEIGHTS / count), everything


def traffic(
    weights: Sequence[Weights], ranks: Ranks, walks: Mapping[str, int], backwards: Mapping[str, float]
) -> dict[str, float]:
    """Bytes that a rank sends in a step, by collective. On a ring of N each moves (N − 1)/N of what it is about.

    With Ψ bytes trained, a step of one backward pass sends 2Ψ in stages 0 to 2: gradients are reduced and scattered,
    updated weights gathered (an all-reduce is the same two). Stage 1 reduces once a step however many backward passes
    it has; stages 2 and 3 hold no gradient whole and reduce in each of them. ZeRO-3 gathers sharded weights, trained or
    not, at every walk: 3Ψ where a step walks forward and backward once (Section 7.2.2). Weights it leaves whole are
    gathered once, after the update.

    Args:
        walks: how often a step passes over all weights of a kind, forward or backward.
        backwards: in how many backward passes of a step a kind gets a gradient.
    """
    on_ring = (ranks.world_size - 1) / ranks.world_size
    sharded = [w for w in weights if ranks.zero_stage == 3 and not w.whole]
    trained = [w for w in weights if w.trainable]
    return {
        "reduce-scatter of gradients": on_ring
        * sum(w.bytes * (backwards[w.kind] if ranks.zero_stage >= 2 else 1) for w in trained),
        "all-gather of updated weights": on_ring * sum(w.bytes for w in trained if w not in sharded),
        "all-gather of sharded weights": on_ring * sum(w.bytes * walks[w.kind] for w in sharded),
    }


def bandwidth(world_size: int) -> float:
    """Bytes a second that a ring moves past each rank. Between nodes NCCL lays a ring through every adapter of a node,
    each with its share of the bytes, so that eight adapters together stand against one GPU's NVLink."""
    return NVLINK if world_size <= GPUS_PER_NODE else min(NVLINK, GPUS_PER_NODE * INFINIBAND)


def communication_seconds(sent: Mapping[str, float], world_size: int) -> float:
    """Bytes over bandwidth: no latency, nothing hidden behind compute."""
    return sum(sent.values()) / bandwidth(world_size)


def parse_memory(text: str) -> int:
    """Bytes of ``32GiB``, ``80 GB`` or a plain number. Raises InputError for anything else."""
    # The command line imports this file before any command needs pydantic.
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        memory = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        memory = 0
    if memory <= 0:
        raise InputError(f"--device-memory {text!r} is no size; write it as 32GiB or 80GB")
    return memory
