"""Log-probabilities at target positions, without ever making all logits at once.

The method is that of Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2025): forward makes the
logits tile by tile and keeps one log-sum-exp a position, backward makes every tile again. Departures: tiles are plain
matrix products, for any device; no gradient is dropped for being small; and the head comes in blocks, such as
[text | numerals], which are never copied into one matrix and get gradients each for itself.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from stdist.training.fused_accumulation import fused_gradient
from stdist.vision_llm.kernels.embedding import embedding

# Most bytes of a tile of logits, and of the weights behind it: cached on a CPU, worth its kernels' launches on a GPU.
TILE_BYTES = {"cpu": 2**22, "cuda": 2**28, "meta": 2**28}
# Half-precision products with float32 sums exist on CUDA, and in a plan for it; elsewhere rounded factors are widened.
MIXED_PRODUCTS = "cuda", "meta"
TILE_POSITIONS = 1024


def token_log_probs(
    hidden: Float[Tensor, "positions d"],
    head: Sequence[Float[Tensor, "_ d"]],
    targets: Int[Tensor, " positions"],
    temperature: float = 1.0,
) -> Float[Tensor, " positions"]:
    """log P(target) under softmax(hidden · headᵀ / temperature); its negative is the cross-entropy.

    Differentiable, once, in ``hidden`` and in every block of the head that requires a gradient; a block that does not
    costs none. Every block is rounded to the dtype of ``hidden``, as a head in that dtype holds it; sums are float32
    (float64 where ``hidden`` is). A gradient has the dtype of what it belongs to.

    Args:
        head: blocks of head weights; together, in this order, they are the distribution's tokens.
        targets: indices into the blocks one behind the other. One outside of them makes that position NaN.
    """
    return _TokenLogProbs.apply(hidden, targets, temperature, *head)


def shared_log_probs(
    hidden: Float[Tensor, "positions d"],
    rows: Float[Tensor, "tokens d"],
    targets: Int[Tensor, "positions G"],
    temperature: float = 1.0,
) -> Float[Tensor, "positions G"]:
    """:func:`token_log_probs` of G targets at each position, with one walk over the head's ``rows`` for all of them.

    Two targets of a position differ by their logits alone: log P(b) = log P(a) + (z_b − z_a) / temperature.
    """
    first = token_log_probs(hidden, [rows], targets[:, 0], temperature)
    chosen = embedding(targets, rows).to(hidden.dtype).to(first.dtype)
    logits = torch.einsum("pgd,pd->pg", chosen, hidden.to(first.dtype)) / temperature
    return first[:, None] + (logits - logits[:, :1])


@torch.no_grad()
def argmax_tokens(
    hidden: Float[Tensor, "positions d"], head: Sequence[Float[Tensor, "_ d"]]
) -> Int[Tensor, " positions"]:
    """The token with the largest logit, as an index into the blocks one behind the other; the first one of equals."""
    tiles = _Head(hidden, head)
    best = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    highest = hidden.new_full((len(hidden),), -torch.inf, dtype=tiles.dtype)
    for tile in tiles.tiles():
        for part in tiles.parts():
            logit, index = tiles.logits(part, tile).max(1)
            best[part] = torch.where(logit > highest[part], index + tile.first, best[part])
            highest[part] = torch.maximum(logit, highest[part])
    return best


def head_logits(
    hidden: Float[Tensor, "positions d"], head: Sequence[Float[Tensor, "_ d"]]
) -> Float[Tensor, "positions tokens"]:
    """All logits at once, for those who need every one (to draw from). Rounded and summed as in the losses."""
    operand = hidden.dtype if hidden.device.type in MIXED_PRODUCTS else torch.promote_types(hidden.dtype, torch.float32)
    factors = [block.to(hidden.dtype).to(operand).T for block in head]
    if operand in (torch.float16, torch.bfloat16):
        return torch.cat([torch.mm(hidden, factor, out_dtype=torch.float32) for factor in factors], dim=-1)
    return torch.cat([hidden.to(operand) @ factor for factor in factors], dim=-1)


class _Tile(NamedTuple):
    """Weights of some tokens of one block."""

    block: int
    within: slice  # of the block
    first: int  # index of its first token in all blocks one behind the other
    weights: Float[Tensor, "width d"]  # in the dtype they are multiplied in


class _Head:
    """Logits of some positions and tokens at a time, written over one another in one buffer."""

    def __init__(self, hidden: Float[Tensor, "positions d"], blocks: Sequence[Tensor], temperature: float = 1.0):
        self.blocks, self.temperature = blocks, temperature
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self._rounding = hidden.dtype
        self.operand = hidden.dtype if hidden.device.type in MIXED_PRODUCTS else self.dtype
        self.hidden = hidden.to(self.operand)
        self._part = max(1, min(len(hidden), TILE_POSITIONS))
        tile_bytes = TILE_BYTES.get(hidden.device.type, TILE_BYTES["cpu"])
        self._width = max(1, tile_bytes // self.dtype.itemsize // max(self._part, hidden.shape[1]))
        widest = min(self._width, max(map(len, blocks)))
        self._buffer = hidden.new_empty(self._part * widest, dtype=self.dtype)

    def tiles(self) -> Iterator[_Tile]:
        first = 0
        for number, block in enumerate(self.blocks):
            for start in range(0, len(block), self._width):
                within = slice(start, min(start + self._width, len(block)))
                yield _Tile(number, within, first + start, block[within].to(self._rounding).to(self.operand))
            first += len(block)

    def parts(self) -> Iterator[slice]:
        for start in range(0, len(self.hidden), self._part):
            yield slice(start, min(start + self._part, len(self.hidden)))

    def logits(self, part: slice, tile: _Tile) -> Float[Tensor, "part width"]:
        hidden = self.hidden[part]
        logits = self._buffer[: len(hidden) * len(tile.weights)].view(len(hidden), len(tile.weights))
        _add_product(logits, hidden, tile.weights.T, beta=0, alpha=1 / self.temperature)
        return logits


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, temperature, *blocks):
        head = _Head(hidden, blocks, temperature)
        # Lowest and not −inf: what it is multiplied with may be 0.
        highest = hidden.new_full((len(hidden),), torch.finfo(head.dtype).min, dtype=head.dtype)
        total, target = torch.zeros_like(highest), torch.full_like(highest, torch.nan)
        for tile in head.tiles():
            for part in head.parts():
                logits = head.logits(part, tile)
                column, inside = _columns(targets[part], tile)
                target[part] = torch.where(inside, logits.gather(1, column[:, None])[:, 0], target[part])
                _absorb(logits, highest[part], total[part])
        log_total = total.log()
        ctx.save_for_backward(hidden, targets, highest + log_total, *blocks)
        ctx.temperature = temperature
        return (target - highest) - log_total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """With p = softmax(z), z = logits / temperature, and g the incoming gradient: d(log p_target)/dz = onehot − p,
        so dz = −g (p − onehot)."""
        hidden, targets, log_sum, *blocks = ctx.saved_tensors
        needs_hidden, _, _, *needs_blocks = ctx.needs_input_grad
        head = _Head(hidden, blocks, ctx.temperature)
        # −g is common to all columns and scales vectors of size d instead of every tile.
        scale = -grad[:, None] / ctx.temperature
        scaled_hidden = (head.hidden * scale).to(head.operand)
        hidden_gradient = torch.zeros_like(hidden, dtype=head.dtype) if needs_hidden else None
        held = [fused_gradient(block) if need else None for block, need in zip(blocks, needs_blocks, strict=True)]
        block_gradients = [
            torch.zeros_like(block) if need and added is None else added
            for block, need, added in zip(blocks, needs_blocks, held, strict=True)
        ]
        for tile in head.tiles():
            gradient = block_gradients[tile.block]
            if hidden_gradient is None and gradient is None:
                continue
            if gradient is not None:
                gradient = gradient[tile.within]
                # Summed apart and added once, as autograd does: the same bits, whoever adds.
                sums = torch.zeros_like(gradient, dtype=head.dtype)
            for part in head.parts():
                # p − onehot, before any rounding to half precision: or the gradient of a sure position would be nothing
                # but rounding.
                column, inside = _columns(targets[part], tile)
                slope = head.logits(part, tile).sub_(log_sum[part, None]).exp_()
                slope.scatter_add_(1, column[:, None], -inside.to(slope.dtype)[:, None])
                slope = slope.to(head.operand)
                if hidden_gradient is not None:
                    _add_product(hidden_gradient[part], slope, tile.weights)
                if gradient is not None:
                    _add_product(sums, slope.T, scaled_hidden[part])
            if gradient is not None:
                gradient.add_(sums)
        if hidden_gradient is not None:
            hidden_gradient = (hidden_gradient * scale).to(hidden.dtype)
        returned = (None if added is not None else made for added, made in zip(held, block_gradients, strict=True))
        return hidden_gradient, None, None, *returned


def _columns(targets: Int[Tensor, " part"], tile: _Tile) -> tuple[Int[Tensor, " part"], Bool[Tensor, " part"]]:
    """Columns of the targets in the tile, and whether they lie in it; where not, the column is any."""
    column = targets - tile.first
    width = len(tile.weights)
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


def _absorb(
    logits: Float[Tensor, "part width"], highest: Float[Tensor, " part"], total: Float[Tensor, " part"]
) -> None:
    """Takes a tile of logits z into m = max z and Σ exp(z − m). Overwrites all three."""
    before = highest.clone()
    torch.maximum(before, logits.amax(1), out=highest)
    total.mul_((before - highest).exp()).add_(logits.sub_(highest[:, None]).exp_().sum(1))


def _add_product(out: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> None:
    """out ← beta · out + alpha · a b, summed in the dtype of ``out``; beta is 0 or 1."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=beta, alpha=alpha)
        return
    product = torch.mm(a, b, out_dtype=out.dtype)
    if beta:
        out.add_(product, alpha=alpha)
    else:
        torch.mul(product, alpha, out=out)
