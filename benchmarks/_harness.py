"""What the benchmarks share: running two sides in turn, the peak memory of a call, and the JSON line of the result.

Import it after OMP_NUM_THREADS is set: numerical libraries read that once.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

Call = Callable[[], object]


# --- time --------------------------------------------------------------------------------------------------------


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(ours: Call, peer: Call, runs: int) -> tuple[list[float], list[float]]:
    """Seconds of each run of each side, alternating, after one run of each that is not counted."""
    ours(), peer()
    pairs = [(seconds(ours), seconds(peer)) for _ in range(runs)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


# --- memory ------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Of one call: what it returned, its seconds, and its peak of resident bytes above those from before it."""

    result: Any
    seconds: float
    peak_bytes: int


def cost_in_fresh_process(prepare: Callable[..., Call], *arguments: Any) -> Cost:
    """Runs ``prepare(*arguments)``, which makes inputs and returns the call, and then the call, in a new process.

    The call's result travels back by pickle. ``prepare`` is found by its name, so the script must guard its ``main``.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_cost, prepare, arguments).result()


def reset_peak() -> int:
    """Resident bytes now, from where :func:`peak_bytes` counts: what was freed goes back to the system before.

    Raises SystemExit where the system cannot tell; Linux can. getrusage would not do: its maximum has no reset, holds
    the inputs' making, and in a new process even the parent's size.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError) as error:
        raise SystemExit(
            f"error: no peak memory without Linux's /proc and glibc ({error}); run this on Linux"
        ) from None
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """Most resident bytes since :func:`reset_peak`."""
    return _status_bytes("VmHWM")


def _cost(prepare: Callable[..., Call], arguments: Sequence[Any]) -> Cost:
    call = prepare(*arguments)
    before = reset_peak()
    start = time.perf_counter()
    result = call()
    return Cost(result, time.perf_counter() - start, peak_bytes() - before)


def _status_bytes(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) * 1024


# --- result ------------------------------------------------------------------------------------------------------


def comparison(
    name: str,
    unit: str,
    values: Sequence[float],
    peer: str,
    peer_values: Sequence[float],
    setting: str,
    better: Literal["more", "less"],
    **extra: Any,
) -> dict[str, Any]:
    """The result as README.md describes it; ``extra`` adds keys, and replaces those of the same name."""
    value, peer_value = statistics.median(values), statistics.median(peer_values)
    ratio = value / peer_value if better == "more" else peer_value / value
    return {
        "name": name,
        "value": figure(value),
        "unit": unit,
        "peer": peer,
        "peer_value": figure(peer_value),
        "ratio": figure(ratio),
        "runs": len(values),
        "spread": {
            "value": [figure(min(values)), figure(max(values))],
            "peer_value": [figure(min(peer_values)), figure(max(peer_values))],
        },
        "setting": f"{setting}, Python {platform.python_version()}, {processor()}",
        **extra,
    }


def figure(value: float) -> float:
    """Four significant figures, or all before the point."""
    return round(value) if abs(value) >= 1000 else float(f"{value:.4g}")


def processor() -> str:
    """How many cores numerical libraries use, of how many, of what."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    used, cores = os.environ.get("OMP_NUM_THREADS", "all"), os.cpu_count()
    return f"{used} of {cores} cores of {names[0] if names else platform.processor() or platform.machine()}"


def parser(doc: str | None, runs: int) -> argparse.ArgumentParser:
    """``--json`` and ``--runs``; a benchmark adds what else it needs."""
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments.add_argument("--runs", type=int, default=runs, help="runs a side (default: %(default)s)")
    return arguments


def data_and_work(arguments: argparse.ArgumentParser, work: str) -> None:
    """Adds ``--data`` and ``--work`` to a benchmark on real data."""
    default = os.environ.get("STDIST_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    arguments.add_argument("--data", type=Path, default=Path(default), help="folder of the real data")
    arguments.add_argument("--work", type=Path, default=Path(work), help="stores and runs")


def opened(options: argparse.Namespace) -> Path:
    """Makes the folder of ``--work`` and returns it. Ends the process with 2 where there is no data."""
    if not options.data.is_dir():
        print(f"error: no real data at {options.data}; name its folder with --data", file=sys.stderr)
        raise SystemExit(2)
    work: Path = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    return work


def publish(result: dict[str, Any], as_json: bool) -> None:
    """Prints the result: as one JSON object, or as a line to read."""
    if as_json:
        print(json.dumps(result))
        return
    print(
        f"{result['name']}: {result['value']:,} {result['unit']}; {result['ratio']} times better than {result['peer']}"
    )
