"""Peak memory and time of the head's loss and gradients: tiles of logits against all logits at once.

Forward and backward of −log P at every target position, over frozen text rows and trainable numeral rows. The peer is
what most trainers do: logits of all positions over all rows, then ``cross_entropy``. A run is a process of its own, so
that a peak is a side's alone; the sides alternate, on one core, and must agree on the loss and both gradients.

At its full size the peer needs about 18 GB; on a smaller machine choose a smaller size:

    python benchmarks/head_memory.py --json
    python benchmarks/head_memory.py --json --positions 512 --text-rows 17000 --numeral-rows 23000
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from _harness import Cost, comparison, cost_in_fresh_process, figure, parser, publish
from torch import Tensor
from torch.nn import functional as F

from stdist.vision_llm.kernels.token_losses import token_log_probs


class Size(NamedTuple):
    positions: int
    text_rows: int
    numeral_rows: int
    d: int


def tiled(hidden: Tensor, text: Tensor, numerals: Tensor, targets: Tensor) -> Tensor:
    return -token_log_probs(hidden, [text, numerals], targets).mean()


def whole(hidden: Tensor, text: Tensor, numerals: Tensor, targets: Tensor) -> Tensor:
    # One matrix of rows instead would be slower: it would get a gradient for the text rows as well.
    return F.cross_entropy(torch.cat([hidden @ text.T, hidden @ numerals.T], dim=1), targets)


def prepare(loss: Callable[..., Tensor], size: Size) -> Callable[[], tuple[float, ...]]:
    """Makes inputs, warms torch up on a few of them, and returns forward + backward.

    That returns what the sides must agree on: the loss, and the norms of the gradients of hidden states and numerals.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden = normal(size.positions, size.d).requires_grad_()
    text, numerals = normal(size.text_rows, size.d) / size.d**0.5, normal(size.numeral_rows, size.d) / size.d**0.5
    numerals.requires_grad_()
    targets = torch.randint(size.text_rows + size.numeral_rows, (size.positions,), generator=generator)
    few = hidden[:2].detach().requires_grad_(), text[:2], numerals[:2].detach().requires_grad_()
    loss(*few, torch.tensor([0, 3])).backward()

    def forward_backward() -> tuple[float, ...]:
        value = loss(hidden, text, numerals, targets)
        value.backward()
        assert hidden.grad is not None and numerals.grad is not None
        return value.item(), hidden.grad.norm().item(), numerals.grad.norm().item()

    return forward_backward


def measure(runs: int, size: Size) -> dict[str, Any]:
    ours: list[Cost] = []
    peer: list[Cost] = []
    for _ in range(runs):
        for loss, costs in ((tiled, ours), (whole, peer)):
            costs.append(cost_in_fresh_process(prepare, loss, size))
        agree = all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(ours[-1].result, peer[-1].result, strict=True))
        if not agree:
            raise SystemExit(f"error: the sides disagree: {ours[-1].result} and {peer[-1].result}")
    seconds, peer_seconds = (statistics.median(cost.seconds for cost in costs) for costs in (ours, peer))
    return comparison(
        name="head_memory",
        unit="bytes of peak extra memory, forward and backward",
        values=[cost.peak_bytes for cost in ours],
        peer="cross_entropy of all logits at once",
        peer_values=[cost.peak_bytes for cost in peer],
        setting=(
            f"{size.positions} target positions, {size.text_rows} frozen text rows, {size.numeral_rows} trainable "
            f"numeral rows, d = {size.d}, float32, torch {torch.__version__}"
        ),
        better="less",
        seconds=figure(seconds),
        peer_seconds=figure(peer_seconds),
        seconds_spread={
            "value": [figure(pick(cost.seconds for cost in ours)) for pick in (min, max)],
            "peer_value": [figure(pick(cost.seconds for cost in peer)) for pick in (min, max)],
        },
        times_the_peers_seconds=figure(seconds / peer_seconds),
    )


def main() -> None:
    arguments = parser(__doc__, runs=3)
    arguments.add_argument("--positions", type=int, default=4096)
    arguments.add_argument("--text-rows", type=int, default=152_000)
    arguments.add_argument("--numeral-rows", type=int, default=200_000)
    arguments.add_argument("--width", type=int, default=256, help="d")
    given = arguments.parse_args()
    publish(measure(given.runs, Size(given.positions, given.text_rows, given.numeral_rows, given.width)), given.json)


if __name__ == "__main__":
    main()
