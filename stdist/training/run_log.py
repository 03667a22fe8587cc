"""A run's log: one JSON object a line in ``log.jsonl``, the same scalars in TensorBoard."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from stdist.errors import DamageError
from stdist.files import to_json, write_atomically
from stdist.scalars import defined


class RunLog:
    """Appends to ``RUN/log.jsonl`` and ``RUN/tensorboard``. One writer a run."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / "log.jsonl"
        self._tensorboard_dir = run_dir / "tensorboard"
        self._writers: dict[str, SummaryWriter] = {}

    def rewind(self, stage: str, step: int) -> None:
        """Forgets what a killed process logged of ``stage`` after the checkpoint at ``step``; −1: there is none."""
        if self._path.exists():
            write_atomically(self._path, "".join(f"{line}\n" for line in self._kept(stage, step)))
        self._writers[stage] = SummaryWriter(str(self._tensorboard_dir / stage), purge_step=step + 1)

    def write(self, stage: str, step: int, scalars: dict[str, float]) -> None:
        """A training line: loss and whatever else the stage reports."""
        self._append({"stage": stage, "step": step, **defined(scalars), "time": time.time()})
        self._scalars(stage, step, scalars)

    def start(self, stage: str, step: int, run_info: dict[str, str]) -> None:
        """A line on the process that trains the stage from ``step`` on."""
        self._append({"stage": stage, "step": step, "event": "start", **run_info, "time": time.time()})

    def evaluation(self, stage: str, step: int, metrics: dict[str, float | None]) -> None:
        self._append({"stage": stage, "step": step, "event": "evaluation", "metrics": metrics, "time": time.time()})
        known = {f"evaluation/{name}": value for name, value in metrics.items() if value is not None}
        self._scalars(stage, step, known)

    def _kept(self, stage: str, step: int) -> Iterator[str]:
        lines = self._path.read_text(errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                after = entry["stage"] == stage and entry["step"] > step
            except (ValueError, KeyError, TypeError):
                if number == len(lines):
                    return  # the half line of a killed process
                raise DamageError(f"{self._path} is damaged in line {number}; remove that line") from None
            if not after:
                yield line

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _scalars(self, stage: str, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writers[stage].add_scalar(name, value, step)

    def _append(self, entry: dict) -> None:
        with open(self._path, "a") as file:
            file.write(to_json(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
