"""Partial attention: over some of the keys, with the log-sum-exp that lets parts be merged.

Every back end computes softmax(scale·Q·Kᵀ)·V over the keys it is given and lse = log Σ exp(scale·q·k) beside it.
Backward is given the *merged* output and log-sum-exp: then exp(scale·q·k − lse) is the probability among all keys, and
each part's gradients are exactly its share (the scheme of ring attention, Liu et al. 2023).

PyTorch's own kernels serve everywhere; flash-attn and xformers where they are installed and run on the device. A back
end is taken only after it has shown on the device that it computes what plain matrix products compute.
"""

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Protocol, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

# Queries (and outputs, and their gradients) are [batch, heads, q, d], keys and values [batch, heads, k, d],
# log-sum-exps [batch, heads, q]. Aliases, since mypy takes a jaxtyping shape for a value where it has a name.
Q: TypeAlias = Tensor
K: TypeAlias = Tensor
LSE: TypeAlias = Tensor


class Attention(Protocol):
    """A back end. ``causal`` is for as many keys as queries; softmax and ``lse`` are in float32 whatever the inputs."""

    name: str

    def forward(self, q: Q, k: K, v: K, scale: float, causal: bool) -> tuple[Q, LSE]: ...

    def backward(self, grad: Q, q: Q, k: K, v: K, out: Q, lse: LSE, scale: float, causal: bool) -> tuple[Q, K, K]: ...


class MathAttention:
    """Plain matrix products: any device, any dtype, the reference of the others, and the one that takes ragged keys."""

    name = "math"

    def forward(
        self,
        q: Q,
        k: K,
        v: K,
        scale: float,
        causal: bool = False,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Q, LSE]:
        """``lengths``: keys of each batch entry that are read, the first ones."""
        scores = _scores(q, k, scale, causal, lengths)
        lse = scores.logsumexp(-1)
        return (scores.sub_(lse.unsqueeze(-1)).exp_().to(v.dtype) @ v), lse

    def backward(
        self,
        grad: Q,
        q: Q,
        k: K,
        v: K,
        out: Q,
        lse: LSE,
        scale: float,
        causal: bool = False,
    ) -> tuple[Q, K, K]:
        p = _scores(q, k, scale, causal).sub_(lse.unsqueeze(-1)).exp_()
        d_scores = (grad @ v.transpose(-1, -2)).to(p.dtype)
        d_scores.sub_((grad.to(p.dtype) * out).sum(-1, keepdim=True)).mul_(p).mul_(scale)
        d_scores, p = d_scores.to(q.dtype), p.to(grad.dtype)
        return d_scores @ k, d_scores.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad


def _scores(q: Q, k: K, scale: float, causal: bool, lengths: Int[Tensor, " batch"] | None = None) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)).mul_(scale)
    if causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1), -torch.inf)
    if lengths is not None:
        behind = torch.arange(k.shape[2], device=k.device) >= lengths[:, None]
        scores.masked_fill_(behind[:, None, None], -torch.inf)
    return scores


class SDPAOnCPU:
    """The kernel behind ``scaled_dot_product_attention`` on CPUs, called below the interface that drops its lse."""

    name = "sdpa"

    def forward(self, q: Q, k: K, v: K, scale: float, causal: bool) -> tuple[Q, LSE]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)

    def backward(self, grad: Q, q: Q, k: K, v: K, out: Q, lse: LSE, scale: float, causal: bool) -> tuple[Q, K, K]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )


class SDPAOnCUDA:
    """The flash kernel behind ``scaled_dot_product_attention`` on GPUs (half precision)."""

    name = "sdpa"

    def forward(self, q: Q, k: K, v: K, scale: float, causal: bool) -> tuple[Q, LSE]:
        outputs = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return outputs[0], outputs[1]

    def backward(self, grad: Q, q: Q, k: K, v: K, out: Q, lse: LSE, scale: float, causal: bool) -> tuple[Q, K, K]:
        no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *(grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, no_dropout, no_dropout[:0]),
            scale=scale,
        )


class FlashAttention:
    """flash-attn's kernels, which keep sequences before heads."""

    name = "flash-attn"

    def __init__(self) -> None:
        self._kernels = importlib.import_module("flash_attn.flash_attn_interface")

    def forward(self, q: Q, k: K, v: K, scale: float, causal: bool) -> tuple[Q, LSE]:
        out, lse, *_ = self._kernels._wrapped_flash_attn_forward(
            *(x.transpose(1, 2) for x in (q, k, v)), 0.0, scale, causal, -1, -1, 0.0, None, False
        )
        return out.transpose(1, 2), lse

    def backward(self, grad: Q, q: Q, k: K, v: K, out: Q, lse: LSE, scale: float, causal: bool) -> tuple[Q, K, K]:
        grad, q, k, v, out = (x.transpose(1, 2).contiguous() for x in (grad, q, k, v, out))
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        self._kernels._wrapped_flash_attn_backward(
            *(grad, q, k, v, out, lse, *grads, 0.0, scale, causal, -1, -1, 0.0, None, False, None)
        )
        d_q, d_k, d_v = (x.transpose(1, 2) for x in grads)
        return d_q, d_k, d_v


class XFormers:
    """xformers' memory-efficient attention, which keeps sequences before heads."""

    name = "xformers"

    def __init__(self) -> None:
        self._ops = importlib.import_module("xformers.ops")

    def _mask(self, causal: bool):
        return self._ops.LowerTriangularMask() if causal else None

    def forward(self, q: Q, k: K, v: K, scale: float, causal: bool) -> tuple[Q, LSE]:
        out, lse = self._ops.memory_efficient_attention_forward_requires_grad(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_bias=self._mask(causal), scale=scale
        )
        return out.transpose(1, 2), lse[:, :, : q.shape[2]]

    def backward(self, grad: Q, q: Q, k: K, v: K, out: Q, lse: LSE, scale: float, causal: bool) -> tuple[Q, K, K]:
        grad, q, k, v, out = (x.transpose(1, 2).contiguous() for x in (grad, q, k, v, out))
        grads = self._ops.memory_efficient_attention_backward(
            grad, out, lse, q, k, v, attn_bias=self._mask(causal), scale=scale
        )
        d_q, d_k, d_v = (x.transpose(1, 2) for x in grads)
        return d_q, d_k, d_v


MATH = MathAttention()


@dataclass(frozen=True)
class Choice:
    """The back end of a device and dtype, and why: ``tried`` has a line for every one that was passed over."""

    attention: Attention
    reason: str
    tried: tuple[str, ...] = ()


@cache
def choose(device: torch.device, dtype: torch.dtype) -> Choice:
    """The first of flash-attn, xformers (GPU), SDPA that passes :func:`probe` on the device; else plain products."""
    if device.type == "meta":
        return Choice(SDPAOnCUDA(), "sdpa: a plan for a GPU")
    on_gpu: list[type[Attention]] = [FlashAttention, XFormers, SDPAOnCUDA]
    candidates = on_gpu if device.type == "cuda" else [SDPAOnCPU]
    tried: list[str] = []
    for candidate in candidates:
        try:
            attention = candidate()
            probe(attention, device, dtype)
        except ModuleNotFoundError as error:
            tried.append(f"{candidate.name}: {error.name} is not installed")
        except Exception as error:  # whatever a kernel says about a device or dtype it was not built for
            tried.append(f"{candidate.name}: {' '.join(str(error).split())[:120]}")
        else:
            place = f"{device.type} in {str(dtype).removeprefix('torch.')}"
            return Choice(attention, f"{attention.name}: agrees with plain products on {place}", tuple(tried))
    return Choice(MATH, "math: no other back end serves here", tuple(tried))


def probe(attention: Attention, device: torch.device, dtype: torch.dtype) -> None:
    """Runs a back end forward and backward beside plain products. Raises ValueError where they disagree."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> Tensor:
        return torch.randn(1, 2, length, 64, generator=generator).to(device, dtype)

    q, grad = draw(8), draw(8)
    for keys, causal in ((24, False), (8, True)):
        k, v = draw(keys), draw(keys)
        expected_out, expected_lse = MATH.forward(q, k, v, 0.125, causal)
        # As of a part: the merged log-sum-exp is larger than the part's.
        merged_lse = expected_lse + 0.5
        expected = MATH.backward(grad, q, k, v, expected_out, merged_lse, 0.125, causal)
        out, lse = attention.forward(q, k, v, 0.125, causal)
        gradients = attention.backward(grad, q, k, v, expected_out, merged_lse, 0.125, causal)
        tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2
        names, reference = ("output", "log-sum-exp", "dq", "dk", "dv"), (expected_out, expected_lse, *expected)
        for name, a, b in zip(names, (out, lse, *gradients), reference, strict=True):
            if a.shape != b.shape or not torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance):
                raise ValueError(f"{name} differs from plain products")
