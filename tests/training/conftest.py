"""The toy stage, and readers of what a run leaves behind."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOY = Path(__file__).with_name("toy.py")


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """tests/training/toy.py as a module; ``toy.__file__`` is the script to start as a process."""
    spec = importlib.util.spec_from_file_location("toy", TOY)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def log_lines() -> Callable[[Path], list[dict[str, Any]]]:
    """All lines of a run's log without their wall-clock time."""

    def read(run_dir: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "time"} for line in lines]

    return read
