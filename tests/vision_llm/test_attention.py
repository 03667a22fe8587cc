"""Partial attention: every back end computes what plain autograd computes, and only such a one is taken.

Tests marked ``gpu`` run the same equalities in half precision on a CUDA device.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from stdist.vision_llm.kernels import attention
from stdist.vision_llm.kernels.attention import (
    MATH,
    Attention,
    FlashAttention,
    MathAttention,
    SDPAOnCPU,
    SDPAOnCUDA,
    XFormers,
    choose,
    probe,
)

CPU = torch.device("cpu")
SCALE = 0.3
# Absolute, for outputs and gradients of order 1: bfloat16 has 8 bits of mantissa and rounds products and results.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}
Shapes = tuple[int, int, bool]
SHAPES: list[Shapes] = [(5, 9, False), (7, 7, True), (1, 1, True), (3, 1, False)]


@pytest.fixture(autouse=True)
def fresh_choices() -> Iterator[None]:
    choose.cache_clear()
    yield
    choose.cache_clear()


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(scale·Q·Kᵀ)·V and log Σ exp, as written in books; ``hidden`` is True where a key is not seen."""
    scores = (q @ k.transpose(-1, -2) * SCALE).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def causal_mask(queries: int, keys: int, causal: bool) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).triu(1) if causal else torch.zeros(queries, keys).bool()


def check(
    backend: Attention, q: Tensor, k: Tensor, v: Tensor, causal: bool, tolerance: float, device: torch.device = CPU
) -> None:
    """Output, log-sum-exp and gradients against plain autograd in float64, over some of the keys and over all.

    Over some of the keys: the rest's are as many, and the merged output and log-sum-exp come from all of them.
    """
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    hidden = causal_mask(q.shape[2], k.shape[2], causal)
    expected_out, expected_lse = plain(*wide, hidden)
    here = [x.to(device) for x in (q, k, v)]
    out, lse = backend.forward(*here, SCALE, causal)
    assert out.dtype == q.dtype and lse.dtype == torch.promote_types(q.dtype, torch.float32)
    close(out, expected_out, tolerance)
    close(lse, expected_lse, tolerance)

    rest = draw(*k.shape, seed=7), draw(*v.shape, seed=8)
    for others in (None, rest):
        keys, values, unseen = wide[1], wide[2], hidden
        if others:
            keys, values = torch.cat([keys, others[0]], dim=2), torch.cat([values, others[1]], dim=2)
            unseen = torch.cat([hidden, torch.zeros_like(hidden)], dim=1)
        whole, whole_lse = plain(wide[0], keys, values, unseen)
        grad = draw(*q.shape, seed=9)
        d_q, d_k, d_v = torch.autograd.grad(whole, wide, grad)
        if others:  # of the query's gradient a part computes its share: what the other keys add is theirs
            other = MATH.backward(grad, q.double(), *others, whole.detach(), whole_lse.detach(), SCALE)
            d_q = d_q - other[0]
        merged = whole.detach().to(device, q.dtype), whole_lse.detach().to(device, lse.dtype)
        found = backend.backward(grad.to(device, q.dtype), *here, *merged, SCALE, causal)
        for ours, theirs in zip(found, (d_q, d_k, d_v), strict=True):
            assert ours.dtype == q.dtype
            close(ours, theirs, tolerance)


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.detach().cpu().double(), theirs.detach(), rtol=tolerance, atol=tolerance)


def inputs(shapes: Shapes, dtype: torch.dtype, d: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Two sequences, three heads; values that the dtype holds exactly, so that only the arithmetic differs."""
    queries, keys, _ = shapes
    return (
        draw(2, 3, queries, d, dtype=dtype, seed=1),
        draw(2, 3, keys, d, dtype=dtype, seed=2),
        draw(2, 3, keys, d, dtype=dtype, seed=3),
    )


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", [MathAttention(), SDPAOnCPU()], ids=lambda backend: backend.name)
def test_a_back_end_equals_plain_autograd(backend: Attention, dtype: torch.dtype, shapes: Shapes) -> None:
    check(backend, *inputs(shapes, dtype), causal=shapes[2], tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("logit", [1e4, -1e4])
@pytest.mark.parametrize("backend", [MathAttention(), SDPAOnCPU()], ids=lambda backend: backend.name)
def test_extreme_logits_stay_finite(backend: Attention, logit: float) -> None:
    """One key far above, or far below, all others: it takes everything, or nothing."""
    q, k, v = inputs((5, 9, False), torch.float32)
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[:, :, 4, 0] = logit / SCALE
    out, lse = backend.forward(q, k, v, SCALE, False)
    grads = backend.backward(torch.ones_like(q), q, k, v, out, lse, SCALE, False)
    assert all(x.isfinite().all() for x in (out, lse, *grads))
    if logit > 0:
        torch.testing.assert_close(out, v[:, :, 4:5].expand_as(out))
    else:
        seen = [i for i in range(9) if i != 4]
        torch.testing.assert_close(out, backend.forward(q, k[:, :, seen], v[:, :, seen], SCALE, False)[0])
        assert all((x[:, :, 4] == 0).all() for x in grads[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_behind_a_length_are_as_if_they_were_not_there(dtype: torch.dtype) -> None:
    q, k, v = inputs((5, 9, False), dtype)
    lengths = torch.tensor([4, 9])
    out, lse = MATH.forward(q, k, v, SCALE, lengths=lengths)
    for i, length in enumerate(lengths.tolist()):
        one = slice(i, i + 1)
        alone = MATH.forward(q[one], k[one, :, :length], v[one, :, :length], SCALE)
        torch.testing.assert_close((out[one], lse[one]), alone)


# --- which one is taken --------------------------------------------------------------------------------------------


def wrong(change: Callable[[list[Tensor]], None]) -> type[MathAttention]:
    """A back end that changes what plain products compute: output, log-sum-exp, dq, dk, dv."""

    class Wrong(MathAttention):
        name = "wrong"

        def forward(self, *args) -> tuple[Tensor, Tensor]:
            results = [*super().forward(*args), *[torch.zeros(())] * 3]
            change(results)
            return results[0], results[1]

        def backward(self, *args) -> tuple[Tensor, Tensor, Tensor]:
            results = [*[torch.zeros(())] * 2, *super().backward(*args)]
            change(results)
            return results[2], results[3], results[4]

    return Wrong


WRONG = ["output", "log-sum-exp", "dq", "dk", "dv"]


@pytest.mark.parametrize("number", range(5), ids=WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probe_names_what_is_wrong(number: int, dtype: torch.dtype) -> None:
    def off(results: list[Tensor]) -> None:
        results[number] = results[number] * 1.2

    with pytest.raises(ValueError, match=f"^{WRONG[number]} differs"):
        probe(wrong(off)(), CPU, dtype)
    probe(MATH, CPU, dtype)


def test_probe_finds_what_shows_only_with_a_merged_log_sum_exp() -> None:
    """Gradients from a part's own softmax: right where a part is the whole, wrong in a tree."""

    class OwnSoftmax(MathAttention):
        name = "own softmax"

        def backward(self, grad, q, k, v, out, lse, scale, causal=False):
            out, lse = self.forward(q, k, v, scale, causal)
            return super().backward(grad, q, k, v, out, lse, scale, causal)

    with pytest.raises(ValueError, match=r"^d[qkv] differs"):
        probe(OwnSoftmax(), CPU, torch.float32)


def test_probe_finds_a_mask_that_is_not_applied() -> None:
    class NeverCausal(MathAttention):
        name = "never causal"

        def forward(self, q, k, v, scale, causal=False):
            return super().forward(q, k, v, scale, False)

    with pytest.raises(ValueError, match=r"^output differs"):
        probe(NeverCausal(), CPU, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpus_kernel_is_taken_with_its_reason(dtype: torch.dtype) -> None:
    choice = choose(CPU, dtype)
    assert isinstance(choice.attention, SDPAOnCPU) and choice.tried == ()
    assert choice.reason == f"sdpa: agrees with plain products on cpu in {str(dtype).removeprefix('torch.')}"
    assert choose(CPU, dtype) is choice, "probed once"


def test_a_wrong_back_end_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(results: list[Tensor]) -> None:
        results[4] = results[4] * 2

    monkeypatch.setattr(attention, "SDPAOnCPU", wrong(off))
    choice = choose(CPU, torch.float32)
    assert choice.attention is MATH
    assert choice.tried == ("wrong: dv differs from plain products",)


def test_the_next_one_that_serves_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU where one library is missing and the next has no kernel for the card."""

    class Unbuilt(MathAttention):
        name = "xformers"

        def forward(self, *args):
            raise RuntimeError("no kernel image is available\n  for execution on the device" + " …" * 200)

    class Serves(MathAttention):
        name = "serves"

    def missing() -> Attention:
        raise ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn")

    missing.name = "flash-attn"
    monkeypatch.setattr(attention, "FlashAttention", missing)
    monkeypatch.setattr(attention, "XFormers", Unbuilt)
    monkeypatch.setattr(attention, "SDPAOnCUDA", Serves)
    probed: list[torch.device] = []
    monkeypatch.setattr(
        attention, "probe", lambda back_end, device, dtype: probed.append(device) or probe(back_end, CPU, dtype)
    )
    cuda = torch.device("cuda")
    choice = choose(cuda, torch.bfloat16)
    assert choice.attention.name == "serves" and probed == [cuda, cuda]
    assert choice.reason == "serves: agrees with plain products on cuda in bfloat16"
    assert choice.tried[0] == "flash-attn: flash_attn is not installed"
    name, _, reason = choice.tried[1].partition(": ")
    assert (name, reason[:57]) == ("xformers", "no kernel image is available for execution on the device ")
    assert "\n" not in reason and len(reason) <= 120


# --- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("shapes", [*SHAPES, (300, 700, False), (260, 260, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [FlashAttention, XFormers, SDPAOnCUDA, MathAttention], ids=lambda kind: kind.name)
def test_a_back_end_on_the_gpu_equals_plain_autograd(
    cuda: torch.device, kind: Callable[[], Attention], dtype: torch.dtype, shapes: Shapes
) -> None:
    """Bounds as for bfloat16 on a CPU; skipped where the library is not installed."""
    try:
        backend = kind()
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    tolerance = TOLERANCES[torch.bfloat16]
    check(backend, *inputs(shapes, dtype, d=64), causal=shapes[2], tolerance=tolerance, device=cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_some_back_end_serves_on_the_gpu(cuda: torch.device, dtype: torch.dtype) -> None:
    """In half precision a kernel, not plain products."""
    choice = choose(cuda, dtype)
    assert dtype == torch.float32 or choice.attention is not MATH, choice
