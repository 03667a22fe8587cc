"""The ledger of a training's rollouts: what was issued, leased, returned, trained, lost and voided, a line an event.

Keys are enough: what was lost is recomputed identically. ``proof`` reads it.
"""

import json
from pathlib import Path
from typing import Any

from stdist.runs.workers import WorkKey

LEDGER = Path("rollouts") / "ledger.jsonl"
"""In a run's folder."""


class Ledger:
    """Appends events to a file. One writer a run; ``flush`` before what is written must survive this process."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_half_line(path)
        self._file = path.open("a")

    def note(self, event: str, key: WorkKey, **details: Any) -> None:
        line: dict[str, Any] = {"event": event, "step": key.step, "window": key.window}
        # Cells stand where the unit begins; until then a step's window has one unit (docs/decisions.md).
        self._write(line | ({"cells": key.cells} if event == "issued" else {"first": key.cells[0]}) | details)

    def resume(self, step: int, stage: str, every: int) -> None:
        """All that was learnt from ``step`` on is void: the weights of ``stage`` are older."""
        self._write({"event": "resumed", "step": step, "stage": stage, "every": every})
        self.flush()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")


def _cut_half_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
