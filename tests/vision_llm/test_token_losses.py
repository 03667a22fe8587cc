"""The head in tiles against all logits at once: values, gradients, what is computed, and what is held in memory."""

import math
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stdist.vision_llm.kernels import token_losses as module
from stdist.vision_llm.kernels.token_losses import argmax_tokens, head_logits, token_log_probs


@contextmanager
def tiles_of(logits: int, positions: int) -> Iterator[None]:
    """Tiles of at most so many float32 logits and so many positions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE_BYTES", {"cpu": 4 * logits})
        patch.setattr(module, "TILE_POSITIONS", positions)
        yield


def plain(hidden: Tensor, head: Sequence[Tensor], targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log P(target) by log-softmax over all logits at once."""
    log_p = (hidden @ torch.cat(list(head)).T / temperature).log_softmax(-1)
    return log_p[torch.arange(len(targets)), targets]


def drawn(
    positions: int, d: int, lengths: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, *rows = (
        torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (positions, *lengths)
    )
    return hidden, rows, torch.randint(sum(lengths), (positions,), generator=generator)


def test_log_probs_by_hand() -> None:
    """Logits (0, log 2, log 5): P = 1/8, 2/8, 5/8. At temperature 1/2 they double: P = 1/30, 4/30, 25/30."""
    hidden, head = torch.ones(3, 1), [torch.tensor([[0.0], [math.log(2)]]), torch.tensor([[math.log(5)]])]
    for temperature, p in ((1.0, [1 / 8, 2 / 8, 5 / 8]), (0.5, [1 / 30, 4 / 30, 25 / 30])):
        log_probs = token_log_probs(hidden, head, torch.tensor([0, 1, 2]), temperature)
        assert log_probs.tolist() == pytest.approx([math.log(x) for x in p])


def test_gradient_of_cross_entropy_by_hand() -> None:
    """d(−log P_t)/dz = (p − onehot) / temperature, here at p = (1/4, 3/4); the head is the identity."""
    for temperature in (1.0, 2.0):
        hidden = (torch.tensor([[0.25, 0.75]]).log() * temperature).requires_grad_()
        token_log_probs(hidden, torch.eye(2).split(1), torch.tensor([0]), temperature).neg().sum().backward()
        assert hidden.grad is not None
        assert hidden.grad[0].tolist() == pytest.approx([-0.75 / temperature, 0.75 / temperature])


@settings(max_examples=60, deadline=None)
@given(
    positions=st.integers(0, 7),
    d=st.integers(1, 5),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3).filter(any),
    tile=st.integers(1, 40),
    part=st.integers(1, 8),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    seed=st.integers(0, 9),
)
def test_value_and_gradients_equal_those_of_all_logits_at_once(
    positions: int,
    d: int,
    lengths: list[int],
    tile: int,
    part: int,
    temperature: float,
    seed: int,
) -> None:
    """Any number of positions, blocks and rows, whether or not tiles divide them; float32 against float64."""
    exact = drawn(positions, d, lengths, seed)
    hidden, rows, targets = drawn(positions, d, lengths, seed, torch.float32)
    weight = torch.linspace(-1, 2, positions)

    with tiles_of(tile, part):
        log_probs = token_log_probs(hidden, rows, targets, temperature)
        assert log_probs.dtype == torch.float32
        gradients = torch.autograd.grad((weight * log_probs).sum(), [hidden, *rows])

    expected = plain(*exact, temperature)
    expected_gradients = torch.autograd.grad((weight * expected).sum(), [exact[0], *exact[1]])
    for ours, theirs in zip((log_probs, *gradients), (expected, *expected_gradients), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_gradcheck() -> None:
    hidden, rows, targets = drawn(5, 3, [4, 6])
    with tiles_of(16, 2):
        assert torch.autograd.gradcheck(lambda x, *head: token_log_probs(x, head, targets, 0.7), (hidden, *rows))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bfloat16_sums_in_float32(device: str) -> None:
    """A bfloat16 base with float32 numeral rows beside it: rows round to bfloat16, nothing else rounds before the end.

    Gradients come back in the dtype of what they belong to, with no more error than that dtype's rounding; positions as
    sure as these would have none at all if p were rounded before the onehot is taken off.
    """
    hidden, (text, numerals), _ = drawn(6, 32, [40, 50])
    targets = (hidden @ torch.cat([text, numerals]).T).argmax(-1)
    inputs = [
        x.detach().to(device, dtype).requires_grad_()
        for x, dtype in ((hidden, torch.bfloat16), (text, torch.bfloat16), (numerals, torch.float32))
    ]
    exact = [x.detach().bfloat16().double().cpu().requires_grad_() for x in inputs]

    with tiles_of(64, 4):
        log_probs = token_log_probs(inputs[0], inputs[1:], targets.to(device))
        gradients = torch.autograd.grad(log_probs.sum(), inputs)
    expected = plain(exact[0], exact[1:], targets)
    expected_gradients = torch.autograd.grad(expected.sum(), exact)

    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs, given_ in zip(gradients, expected_gradients, inputs, strict=True):
        assert ours.dtype == given_.dtype
        # On CUDA the factors of a gradient's products are bfloat16 too.
        relative = 1e-5 if device == "cpu" and ours.dtype == torch.float32 else 2**-7
        error = (ours.double().cpu() - theirs).norm() / theirs.norm()
        assert error < relative


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_logits_at_once_are_one_row_a_position_in_float32(dtype: torch.dtype) -> None:
    """Blocks one behind the other; of meta tensors too, which take the half-precision products of a GPU."""
    hidden, head = torch.tensor([[1.0, 2.0]]), [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])]
    assert head_logits(hidden.to(dtype), head).tolist() == [[1, 2, 3]]
    planned = head_logits(hidden.to("meta", dtype), [block.to("meta") for block in head])
    assert planned.shape == (1, 3) and planned.dtype == torch.float32


def test_enormous_logits_neither_overflow_nor_vanish() -> None:
    """Logits of ±10,000: values are relative to the highest one; in gradients float32 tells apart thousandths."""
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    log_probs = token_log_probs(hidden, torch.tensor([[1.0], [-1.0], [1.0]]).split(1), torch.tensor([0, 0]))
    assert log_probs.tolist() == pytest.approx([-math.log(2), -2e4])
    log_probs.sum().backward()
    assert hidden.grad is not None and hidden.grad.flatten().tolist() == pytest.approx([0, 2], abs=2e-3)


def test_no_positions_give_gradients_of_zero() -> None:
    hidden, rows, targets = drawn(0, 3, [4, 5], dtype=torch.float32)
    log_probs = token_log_probs(hidden, rows, targets)
    assert log_probs.shape == (0,)
    log_probs.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, 3)
    assert all(block.grad is not None and block.grad.eq(0).all() for block in rows)
    assert argmax_tokens(hidden, rows).shape == (0,)


def test_a_target_outside_of_the_rows_is_nan() -> None:
    hidden, rows, _ = drawn(3, 2, [4, 5])
    log_probs = token_log_probs(hidden, rows, torch.tensor([8, 9, -1]))
    assert log_probs.isnan().tolist() == [False, True, True]


class Work(TorchDispatchMode):
    """Products made, the largest tensor made, and the most bytes alive at once of what was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = self.peak_bytes = 0
        self._bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._known.add(leaf.untyped_storage()._cdata)  # made outside, or counted when it was made
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.numel())
                self._made(leaf.untyped_storage())
        return result

    def _made(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self._bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self._bytes -= nbytes


POSITIONS, WIDTH, TEXT, NUMERALS = 60, 8, 500, 700


def test_nothing_of_positions_times_rows_is_ever_made() -> None:
    """Beside gradients and vectors: one tile. The plain way holds three matrices of all logits."""
    hidden, (text, numerals), targets = drawn(POSITIONS, WIDTH, [TEXT, NUMERALS], dtype=torch.float32)
    text.requires_grad_(False)
    tile, everything = 1024, POSITIONS * (TEXT + NUMERALS)

    with tiles_of(tile, 32), Work() as tiled:
        token_log_probs(hidden, [text, numerals], targets).sum().backward()
    with Work() as peer:
        plain(hidden, [text, numerals], targets).sum().backward()

    gradients = numerals.numel() + 2 * hidden.numel()  # hidden states' own, and their multiple for the rows'
    vectors = 25 * POSITIONS
    assert tiled.largest <= numerals.numel() < everything
    assert tiled.peak_bytes <= 4 * (gradients + tile + vectors)
    assert peer.largest >= everything and peer.peak_bytes >= 3 * 4 * everything, "the count itself works"


@pytest.mark.parametrize(("positions", "d", "tokens"), [(5_000, 8, 256_000), (3, 2_048, 3_000)])
def test_a_tile_of_a_cpu_and_the_weights_behind_it_are_four_mebibytes(positions: int, d: int, tokens: int) -> None:
    """As it ships, with most of it used; all logits, or all of the head, would be more."""
    head = module._Head(torch.empty(positions, d), [torch.empty(tokens, d)])
    weights = max(tile.weights.nbytes for tile in head.tiles())
    assert 2**21 < max(head._buffer.nbytes, weights) <= 2**22 < max(4 * positions * tokens, 4 * tokens * d)


def test_a_plan_counts_the_tiles_that_a_gpu_will_hold() -> None:
    """A plan of a GPU's memory runs on meta tensors."""
    assert module.TILE_BYTES["meta"] == module.TILE_BYTES["cuda"] == 2**28


@pytest.mark.parametrize("trains", ["hidden and numerals", "numerals", "hidden", "everything"])
def test_only_what_trains_is_computed(trains: str) -> None:
    """Tiles of 8 × 32 logits: 16 of text and 22 of numerals, for each of 8 parts. A product each for the logits of
    forward; in backward, where anything trains on a tile, for its logits, for hidden states, and for its rows."""
    hidden, (text, numerals), targets = drawn(POSITIONS, WIDTH, [TEXT, NUMERALS], dtype=torch.float32)
    needs = {
        "hidden and numerals": (True, False, True),
        "numerals": (False, False, True),
        "hidden": (True, False, False),
        "everything": (True, True, True),
    }[trains]
    inputs = (hidden, text, numerals)
    for tensor, need in zip(inputs, needs, strict=True):
        tensor.requires_grad_(need)
    with tiles_of(256, 8), Work() as work:
        token_log_probs(hidden, [text, numerals], targets).sum().backward()
    parts, text_tiles, numeral_tiles = 8, 16, 22
    products = {
        "hidden and numerals": 3 * (text_tiles + numeral_tiles) + numeral_tiles,
        "numerals": text_tiles + numeral_tiles + 2 * numeral_tiles,
        "hidden": 3 * (text_tiles + numeral_tiles),
        "everything": 4 * (text_tiles + numeral_tiles),
    }[trains]
    assert work.calls["addmm_"] == parts * products and work.calls["mm"] == 0
    assert [tensor.grad is not None for tensor in inputs] == list(needs)


@settings(max_examples=60, deadline=None)
@given(
    positions=st.integers(0, 7),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3).filter(any),
    tile=st.integers(1, 40),
    part=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_argmax_tokens_are_the_argmax_and_the_first_of_equals(
    positions: int, lengths: list[int], tile: int, part: int, seed: int
) -> None:
    """Small whole numbers: logits are exact, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    hidden, *rows = (
        torch.randint(-1, 2, (n, 2), generator=generator).float().requires_grad_() for n in (positions, *lengths)
    )
    with tiles_of(tile, part):
        best = argmax_tokens(hidden, rows)
    logits = (hidden @ torch.cat(rows).T).tolist()
    assert best.tolist() == [row.index(max(row)) for row in logits]
    assert not best.requires_grad
