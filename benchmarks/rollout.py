"""Candidates of GRPO: 121 cells × 8 samples of one window, the sampler against transformers' ``generate``.

See ``_generate.py`` for how the sides are set up; the peer draws with ``num_return_sequences=8``.

    python benchmarks/rollout.py --json
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

from _generate import check, measure
from _harness import parser, publish
from _window import VISUAL_TOKENS, make_policy

CELLS, CANDIDATES, PEER_CELLS, PEER_BATCHES = 121, 8, 8, (1, 2, 4, 8, 16)


def main() -> None:
    arguments = parser(__doc__, runs=5).parse_args()
    policy = make_policy().eval()
    check(policy)
    few, many = (
        measure("rollout", policy, visual, CELLS, CANDIDATES, PEER_CELLS, PEER_BATCHES, arguments.runs)
        for visual in VISUAL_TOKENS
    )
    publish(few | {f"at_{VISUAL_TOKENS[1]}_visual_tokens": many}, arguments.json)


if __name__ == "__main__":
    main()
