"""A run's log: one JSON object a line in ``log.jsonl``, the same scalars in TensorBoard."""

import json
import os
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from stdist.files import write_atomically


class RunLog:
    """Appends to ``RUN/log.jsonl`` and ``RUN/tensorboard``. One writer a run."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / "log.jsonl"
        self._tensorboard_dir = run_dir / "tensorboard"
        self._writers: dict[str, SummaryWriter] = {}

    def rewind(self, stage: str, step: int) -> None:
        """Forgets what a killed process logged of ``stage`` after the checkpoint at ``step``; −1: there is none."""
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if not _is_after(line, stage, step)]
            write_atomically(self._path, "".join(f"{line}\n" for line in kept))
        self._writers[stage] = SummaryWriter(str(self._tensorboard_dir / stage), purge_step=step + 1)

    def write(self, stage: str, step: int, scalars: dict[str, float]) -> None:
        """A training line: loss and whatever else the stage reports."""
        self._append({"stage": stage, "step": step, **scalars, "time": time.time()})
        self._scalars(stage, step, scalars)

    def start(self, stage: str, step: int, run_info: dict[str, str]) -> None:
        """A line on the process that trains the stage from ``step`` on."""
        self._append({"stage": stage, "step": step, "event": "start", **run_info, "time": time.time()})

    def evaluation(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        self._append({"stage": stage, "step": step, "event": "evaluation", "metrics": metrics, "time": time.time()})
        self._scalars(stage, step, {f"evaluation/{name}": value for name, value in metrics.items()})

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _scalars(self, stage: str, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writers[stage].add_scalar(name, value, step)

    def _append(self, entry: dict) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _is_after(line: str, stage: str, step: int) -> bool:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return True  # the half line of a killed process
    return entry["stage"] == stage and entry["step"] > step
