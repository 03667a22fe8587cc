"""GRPO's instruments in the report: what the log says of its rollouts, at the stage's beginning and at its end."""

import json
from pathlib import Path
from statistics import fmean

from stdist.evaluation import Table
from stdist.files import own_file

QUANTITIES = {
    "reward": "reward",
    "reward/accuracy": "its accuracy term",
    "reward/length": "its length term",
    "reward/decoding": "its decoding term",
    "reward_std": "spread of rewards within a group",
    "equal_rewards": "share of groups with equal rewards, which teach nothing",
    "right_length": "share of candidates of the right length",
    "kl": "KL to the reference",
    "clip_ratio": "share of clipped tokens",
    "mismatch_kl": "KL of what wrote to what learns",
    "effective_samples": "effective share of samples",
    "staleness": "rollouts behind the weights",
    "staleness/worst": "the same, worst",
    "seconds/prefill": "seconds encoding windows",
    "seconds/decode": "seconds sampling",
    "worker_seconds/prefill": "seconds encoding windows, of all workers",
    "worker_seconds/decode": "seconds sampling, of all workers",
    "seconds/wait": "seconds waiting for candidates",
    "seconds/score": "seconds scoring",
    "seconds/update": "seconds forward and backward",
    "seconds/sync": "seconds publishing weights",
    "workers/utilisation": "utilisation of workers",
    "workers/lost_leases": "leases lost",
}
"""Scalars of a step in ``log.jsonl``, and what people call them."""


def rollout_table(run_dir: Path) -> Table | None:
    """Means over the first and the last tenth of the logged steps; None where no step was logged."""
    with own_file(run_dir / "log.jsonl", "remove the line that is no JSON"):
        lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["stage"] == "grpo" and "event" not in line]
    if not steps:
        return None
    tenth = max(1, len(steps) // 10)
    rows: list[list[str | int | float | None]] = [
        [title, *(round(fmean(step[name] for step in part), 4) for part in (steps[:tenth], steps[-tenth:]))]
        for name, title in QUANTITIES.items()
        if name in steps[0]
    ]
    title = f"GRPO's rollouts, {len(steps)} logged steps"
    return Table(title=title, columns=["per step", "first tenth", "last tenth"], rows=rows)
