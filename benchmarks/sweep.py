"""Greedy forecasts of 1,000 cells of one window: the sampler against transformers' ``generate``.

See ``_generate.py`` for how the sides are set up. ``cost_of_more_visual_tokens`` is our time at 64 visual tokens a
frame over that at 16.

    python benchmarks/sweep.py --json
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

from _generate import check, measure
from _harness import figure, parser, publish
from _window import VISUAL_TOKENS, make_policy

CELLS, PEER_CELLS, PEER_BATCHES = 1000, 32, (4, 8, 16, 32, 64)


def main() -> None:
    arguments = parser(__doc__, runs=5).parse_args()
    policy = make_policy().eval()
    check(policy)
    few, many = (
        measure("sweep", policy, visual, CELLS, 1, PEER_CELLS, PEER_BATCHES, arguments.runs) for visual in VISUAL_TOKENS
    )
    few |= {
        f"at_{VISUAL_TOKENS[1]}_visual_tokens": many,
        "cost_of_more_visual_tokens": figure(many["value"] / few["value"]),
    }
    publish(few, arguments.json)


if __name__ == "__main__":
    main()
