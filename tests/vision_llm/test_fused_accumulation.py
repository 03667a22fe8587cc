"""Gradients that kernels add where they are held, against autograd's own adding: the same bits, nothing as large as the
rows beside them, and only where the engine lets them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stdist.training.engine import ParameterGroup, TorchEngine, cosine_schedule
from stdist.training.fused_accumulation import set_fused_accumulation
from stdist.vision_llm.kernels.embedding import embedding
from stdist.vision_llm.kernels.token_losses import shared_log_probs, token_log_probs

ROWS, WIDTH, PASSES = 3000, 8, 3


def looked_up(rows: Tensor, number: int) -> Tensor:
    """With repeated ids, each with a factor of its own."""
    ids = torch.tensor([[5, 2, 5], [7, 2999, 5]], device=rows.device) - number
    return (embedding(ids, rows) * torch.arange(1.0, 7, device=rows.device).view(2, 3, 1)).pow(2).sum()


def scored(rows: Tensor, number: int) -> Tensor:
    hidden, targets = drawn(number, 4, WIDTH).to(rows.device), torch.tensor([0, 7, 2000, 5], device=rows.device)
    return token_log_probs(hidden, [torch.ones(5, WIDTH, device=rows.device), rows], targets).sum()


def scored_together(rows: Tensor, number: int) -> Tensor:
    hidden, targets = drawn(number, 2, WIDTH), torch.tensor([[1, 2, 1], [2999, 0, 1]])
    return shared_log_probs(hidden.to(rows.device), rows, targets.to(rows.device)).sum()


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient(loss: Callable[[Tensor, int], Tensor], fused: bool, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    rows = nn.Parameter(drawn(0, ROWS, WIDTH).to(device, dtype))
    set_fused_accumulation([rows], fused)
    for number in range(PASSES):
        loss(rows, number).backward()
    assert rows.grad is not None
    return rows.grad


@pytest.mark.parametrize("loss", [looked_up, scored])
def test_gradients_are_autograds_to_the_bit(loss):
    fused = gradient(loss, True, torch.float32)
    assert torch.equal(fused, gradient(loss, False, torch.float32)) and fused.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [looked_up, scored, scored_together])
def test_gradients_on_a_gpu_are_autograds_and_a_cpus(loss, dtype):
    """Sums have no fixed order there."""
    fused, plain = (gradient(loss, each, dtype, "cuda").float().cpu() for each in (True, False))
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(fused, gradient(loss, True, dtype).float(), rtol=10 * tolerance, atol=10 * tolerance)


def test_rows_that_a_pass_uses_twice_get_the_same_sums_in_another_order():
    fused, plain = (gradient(scored_together, each, torch.float32) for each in (True, False))
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [looked_up, scored])
def test_half_precision_rounds_once_a_pass(loss):
    """Sums of a pass are float32 and are rounded when they are added: as near to float32 rows' as bfloat16 is."""
    fused, plain = (gradient(loss, each, torch.bfloat16).float() for each in (True, False))
    torch.testing.assert_close(fused, plain, rtol=2**-6, atol=2**-6)


def test_an_embedding_is_torchs():
    rows = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, 2], [2, 0]])
    assert torch.equal(embedding(ids, rows), nn.functional.embedding(ids, rows))
    assert torch.autograd.gradcheck(lambda few: embedding(ids, few), rows[:3].detach().requires_grad_())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("loss", [looked_up, scored, scored_together])
def test_nothing_as_large_as_the_rows_is_made(loss, device, largest_made, monkeypatch):
    """From the second pass on: the first one makes the gradient itself. With tiles of 64 rows."""
    monkeypatch.setattr(
        "stdist.vision_llm.kernels.token_losses.TILE_BYTES", dict.fromkeys(["cpu", device], 64 * 4 * WIDTH)
    )
    rows = nn.Parameter(torch.ones(ROWS, WIDTH, device=device))
    made = {}
    for fused in (True, False):
        set_fused_accumulation([rows], fused)
        loss(rows, 0).backward()
        with largest_made() as largest:
            loss(rows, 1).backward()
        made[fused] = largest.elements
    assert made[True] <= 64 * WIDTH < rows.numel() <= made[False]


def test_an_engine_of_plain_torch_lets_kernels_add_until_it_is_closed():
    rows = nn.Parameter(torch.zeros(ROWS, WIDTH))
    engine = TorchEngine([ParameterGroup({"rows": rows}, 1e-3, 0.0)], cosine_schedule(1, 2), 1e9)
    engine.backward(looked_up(rows, 0) + embedding(torch.tensor([2]), rows).sum())
    assert rows.grad is not None
    held = rows.grad
    engine.backward(embedding(torch.tensor([2]), rows).sum())
    assert rows.grad is held, "added to, not made anew"
    assert held[2].tolist() == [2.0] * WIDTH, "rows of zeros: what was looked up has no slope but the ones"
    engine.step()
    engine.close()
    embedding(torch.tensor([2]), rows).sum().backward()
    first = rows.grad
    set_fused_accumulation([rows], False)
    assert first is not None and first[2].tolist() == [1.0] * WIDTH
