"""Log-probabilities and entropies at target positions, without the logits ever existing as a whole.

The method is that of Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2025): forward makes the
logits tile by tile and keeps one log-sum-exp a position, backward makes every tile again. Departures: tiles are plain
matrix products, for any device; no gradient is dropped for being small; and the rows come in blocks, such as
[text rows | numeral rows], which are never copied into one matrix and get gradients each for itself.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

# The most bytes of a tile of logits, and of the rows behind it: cached on a CPU, worth its kernels' launches on a GPU.
TILE_BYTES = {"cpu": 2**22, "cuda": 2**28, "meta": 2**28}
# Half-precision products with float32 sums exist on CUDA, and in a plan for it; elsewhere rounded factors are widened.
MIXED_PRODUCTS = "cuda", "meta"
TILE_POSITIONS = 1024


class TokenLosses(NamedTuple):
    """Of each position: log P(target), whose negative is the cross-entropy; and the entropy where it was asked for."""

    log_probs: Float[Tensor, "positions"]
    entropy: Float[Tensor, "positions"] | None


def token_losses(
    hidden: Float[Tensor, "positions d"],
    rows: Sequence[Float[Tensor, "_ d"]],
    targets: Int[Tensor, "positions"],
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> TokenLosses:
    """log P(target) under softmax(hidden · rowsᵀ / temperature), and that distribution's entropy in nats.

    Differentiable, once, in ``hidden`` and in every block of rows that requires a gradient; a block that does not costs
    none. Every block is rounded to the dtype of ``hidden``, as a head in that dtype holds it; sums are float32 (float64
    where ``hidden`` is). A gradient has the dtype of what it belongs to.

    Args:
        rows: blocks of the head's rows; together, in this order, they are all that can be said.
        targets: indices into the blocks one behind the other. One outside of them makes that position NaN.
    """
    log_probs, entropy = _TokenLosses.apply(hidden, targets, temperature, with_entropy, *rows)
    return TokenLosses(log_probs, entropy)


@torch.no_grad()
def best_rows(hidden: Float[Tensor, "positions d"], rows: Sequence[Float[Tensor, "_ d"]]) -> Int[Tensor, "positions"]:
    """The row with the largest logit, as an index into the blocks one behind the other; the first one of equals."""
    head = _Head(hidden, rows)
    best = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    highest = hidden.new_full((len(hidden),), -torch.inf, dtype=head.dtype)
    for tile in head.tiles():
        for part in head.parts():
            logit, index = head.logits(part, tile).max(1)
            best[part] = torch.where(logit > highest[part], index + tile.first, best[part])
            highest[part] = torch.maximum(logit, highest[part])
    return best


def row_logits(
    hidden: Float[Tensor, "positions d"], rows: Sequence[Float[Tensor, "_ d"]]
) -> Float[Tensor, "positions choices"]:
    """All logits at once, for those who want each of them (to draw from). Rounded and summed as in the losses."""
    operand = hidden.dtype if hidden.device.type in MIXED_PRODUCTS else torch.promote_types(hidden.dtype, torch.float32)
    factors = [block.to(hidden.dtype).to(operand).T for block in rows]
    if operand in (torch.float16, torch.bfloat16):
        return torch.cat([torch.mm(hidden, factor, out_dtype=torch.float32) for factor in factors], dim=-1)
    return torch.cat([hidden.to(operand) @ factor for factor in factors], dim=-1)


class _Tile(NamedTuple):
    """Some rows of one block."""

    block: int
    within: slice  # of the block
    first: int  # index of its first row in all blocks one behind the other
    rows: Float[Tensor, "width d"]  # in the dtype they are multiplied in


class _Head:
    """Logits of some positions over some rows at a time, written over one another in one buffer."""

    def __init__(self, hidden: Float[Tensor, "positions d"], rows: Sequence[Tensor], temperature: float = 1.0):
        self.blocks, self.temperature = rows, temperature
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self._rounding = hidden.dtype
        self.operand = hidden.dtype if hidden.device.type in MIXED_PRODUCTS else self.dtype
        self.hidden = hidden.to(self.operand)
        self._part = max(1, min(len(hidden), TILE_POSITIONS))
        tile_bytes = TILE_BYTES.get(hidden.device.type, TILE_BYTES["cpu"])
        self._width = max(1, tile_bytes // self.dtype.itemsize // max(self._part, hidden.shape[1]))
        widest = min(self._width, max(map(len, rows)))
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
        logits = self._buffer[: len(hidden) * len(tile.rows)].view(len(hidden), len(tile.rows))
        _add_product(logits, hidden, tile.rows.T, beta=0, alpha=1 / self.temperature)
        return logits


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, temperature, with_entropy, *rows):
        head = _Head(hidden, rows, temperature)
        # Lowest and not −inf: what it is multiplied with may be 0.
        highest = hidden.new_full((len(hidden),), torch.finfo(head.dtype).min, dtype=head.dtype)
        total, target = torch.zeros_like(highest), torch.full_like(highest, torch.nan)
        moment = torch.zeros_like(highest) if with_entropy else None
        for tile in head.tiles():
            for part in head.parts():
                logits = head.logits(part, tile)
                column, inside = _columns(targets[part], tile)
                target[part] = torch.where(inside, logits.gather(1, column[:, None])[:, 0], target[part])
                _absorb(logits, highest[part], total[part], None if moment is None else moment[part])
        log_total = total.log()
        entropy = None if moment is None else log_total - moment / total
        log_sum = highest + log_total
        ctx.save_for_backward(hidden, targets, log_sum, entropy, *rows)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return (target - highest) - log_total, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_probs, grad_entropy):
        """With p = softmax(z), z = logits / temperature, g and e the incoming gradients, H the entropy:

        d(log p_target)/dz = onehot − p and dH/dz = −p (log p + H), so dz = g (onehot − p) − e p (log p + H).
        """
        hidden, targets, log_sum, entropy, *rows = ctx.saved_tensors
        needs_hidden, _, _, _, *needs_rows = ctx.needs_input_grad
        head = _Head(hidden, rows, ctx.temperature)
        g = torch.zeros_like(log_sum) if grad_log_probs is None else grad_log_probs
        # Without e, −g is common to all columns and scales vectors of size d instead of every tile.
        scale = (-g if grad_entropy is None else -torch.ones_like(g))[:, None] / ctx.temperature
        scaled_hidden = (head.hidden * scale).to(head.operand)
        hidden_gradient = torch.zeros_like(hidden, dtype=head.dtype) if needs_hidden else None
        row_gradients = [
            torch.zeros_like(block) if need else None for block, need in zip(rows, needs_rows, strict=True)
        ]
        for tile in head.tiles():
            gradient = row_gradients[tile.block]
            if hidden_gradient is None and gradient is None:
                continue
            if gradient is not None:
                gradient = gradient[tile.within]
                sums = gradient if gradient.dtype == head.dtype else torch.zeros_like(gradient, dtype=head.dtype)
            for part in head.parts():
                # p − onehot, or with e p (g + e (log p + H)) − g onehot: −dz up to the scale. The onehot goes in before
                # any rounding to half precision, or the gradient of a sure position would be nothing but rounding.
                column, inside = _columns(targets[part], tile)
                slope = head.logits(part, tile).sub_(log_sum[part, None])
                if grad_entropy is None:
                    slope.exp_()
                    onehot = inside.to(slope.dtype)
                else:
                    p = slope.exp()
                    slope.add_(entropy[part, None]).mul_(grad_entropy[part, None]).add_(g[part, None]).mul_(p)
                    onehot = g[part] * inside
                slope.scatter_add_(1, column[:, None], -onehot[:, None])
                slope = slope.to(head.operand)
                if hidden_gradient is not None:
                    _add_product(hidden_gradient[part], slope, tile.rows)
                if gradient is not None:
                    _add_product(sums, slope.T, scaled_hidden[part])
            if gradient is not None and sums is not gradient:
                gradient.copy_(sums)
        if hidden_gradient is not None:
            hidden_gradient = (hidden_gradient * scale).to(hidden.dtype)
        return hidden_gradient, None, None, None, *row_gradients


def _columns(targets: Int[Tensor, "part"], tile: _Tile) -> tuple[Int[Tensor, "part"], Bool[Tensor, "part"]]:
    """Columns of the targets in the tile, and whether they lie in it; where not, the column is any."""
    column = targets - tile.first
    width = len(tile.rows)
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


def _absorb(
    logits: Float[Tensor, "part width"],
    highest: Float[Tensor, "part"],
    total: Float[Tensor, "part"],
    moment: Float[Tensor, "part"] | None,
) -> None:
    """Takes a tile of logits z into m = max z, Σ exp(z − m) and Σ exp(z − m) (z − m). Overwrites all four."""
    before = highest.clone()
    torch.maximum(before, logits.amax(1), out=highest)
    shift = before - highest
    shrink = shift.exp()
    logits.sub_(highest[:, None])
    if moment is None:
        total.mul_(shrink).add_(logits.exp_().sum(1))
        return
    weights = logits.exp()
    moment.add_(shift * total).mul_(shrink).add_(logits.mul_(weights).sum(1))
    total.mul_(shrink).add_(weights.sum(1))


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
