"""A worker's process: a Ray actor around a recipe's program; it refuses work for weights that it has not verified."""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from stdist.runs.workers import Version, VersionError, WorkerProgram


@dataclass(frozen=True)
class Failed:
    """An error that the worker survived, in words: pickled exceptions lose their causes. ``memory``: its machine has
    too little, which is no fault of the work."""

    reason: str
    memory: bool = False


@ray.remote(max_restarts=0, max_task_retries=0)  # a task that Ray repeats could run twice
class WorkerActor:
    """Every method is one thing at a time: Ray queues what comes while one runs."""

    def __init__(self) -> None:
        self._version: str | None = None

    def start(self, make_program: Callable[[], WorkerProgram]) -> str | Failed:
        """Makes the program. Returns where it is, as HOST (pid N)."""
        try:
            self._program = make_program()
        except Exception as error:
            return _failed(error)
        self._version = ""
        return f"{socket.gethostname()} (pid {os.getpid()})"

    def load(self, version: Version, tensors: dict[str, Any]) -> float | Failed:
        """Fetches and verifies; until it has, the worker holds no version. Returns seconds."""
        began, self._version = time.perf_counter(), None
        try:
            self._program.load(Version(version.step, version.name, version.manifest, tensors))
        except Exception as error:
            return _failed(error)
        self._version = version.name
        return time.perf_counter() - began

    def run(self, version: str, payload: bytes) -> tuple[bytes, dict[str, float]] | Failed:
        if version != self._version:
            return Failed(f"asked for weights {version[:12]} with {str(self._version)[:12]} at hand")
        try:
            return self._program.run(payload)
        except Exception as error:
            return _failed(error)


def _failed(error: Exception) -> Failed:
    sys.stderr.write("".join(traceback.format_exception(error)))
    text = " ".join(str(error).split())[:300]
    # torch's own is a RuntimeError, and programs without torch need not import it.
    memory = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "allocate memory" in text
    return Failed(text if isinstance(error, VersionError) else f"{type(error).__name__}: {text}", memory)
