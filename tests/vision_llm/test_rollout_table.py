"""The report's table of GRPO's instruments, from a log by hand."""

import json
from pathlib import Path

from stdist.vision_llm.rollout_table import rollout_table


def test_means_of_the_first_and_last_tenth_of_the_logged_steps(tmp_path: Path) -> None:
    """Of the stage's steps alone, evaluations and starts aside; instruments that a run does not have have no row."""
    lines = [{"stage": "sft", "step": 1, "reward": 9.0}, {"stage": "grpo", "step": 0, "event": "start"}]
    lines += [{"stage": "grpo", "step": step, "reward": step / 10, "kl": 1.0} for step in range(1, 21)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = rollout_table(tmp_path)
    assert table is not None and table.title == "GRPO's rollouts, 20 logged steps"
    assert table.rows == [["reward", 0.15, 1.95], ["KL to the reference", 1.0, 1.0]]
    (tmp_path / "log.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert rollout_table(tmp_path) is None
