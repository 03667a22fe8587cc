"""Look-up of rows whose gradient may be added where it is held."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from stdist.training.fused_accumulation import fused_gradient


def embedding(ids: Int[Tensor, "*batch"], rows: Float[Tensor, "n d"]) -> Float[Tensor, "*batch d"]:
    """``torch.nn.functional.embedding``, whose backward pass makes a gradient of the rows that were looked up alone
    where the engine lets it add that to ``rows.grad``."""
    return _Embedding.apply(ids, rows)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, rows):
        ctx.save_for_backward(ids, rows)
        return torch.nn.functional.embedding(ids, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ids, rows = ctx.saved_tensors
        if (held := fused_gradient(rows)) is None:
            return None, _summed(grad, ids, len(rows))
        # Each row once, so that adding has no order; what a row gets is summed before, as where the gradient is dense.
        met, index = ids.unique(return_inverse=True)
        held.index_add_(0, met, _summed(grad, index, len(met)))
        return None, None


def _summed(grad: Float[Tensor, "*batch d"], index: Int[Tensor, "*batch"], count: int) -> Float[Tensor, "count d"]:
    return torch.ops.aten.embedding_dense_backward(grad, index, count, -1, False)
