"""`stdist serve` of a tiny policy on a city of 100 x 100 cells: what a forecast costs, and 200 clients for a minute.

A warm forecast, of all cells by a model that is loaded, from the opening of the store to the arrays that are served,
against a window of a sweep over many, in turn in one process. Then the service in a process of its own, and clients in
this one, over loopback: each asks for a place, waits for the answer, and asks at once for the next; then each once in
`--pause` seconds. The clients take a core of the same machine. Every answer must be 200 and hold the place.

    pip install -c constraints.txt '.[serve]'
    python benchmarks/serve.py --json
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from _harness import comparison, figure, parser, publish, seconds

try:
    from stdist.serving import service  # noqa: F401
except ValueError as error:
    sys.exit(str(error))

from data_prep import READERS
from stdist.runs import recipes
from stdist.runs.forecast_request import NEXT, ForecastRequest
from stdist.serving.city import CityForecaster

SIDE, TRAINED, WINDOWS = 100, 8, 2
STAGE = {"trainable": "full", "max_steps": 2, "save_steps": 2, "eval_steps": 2, "warmup_steps": 1, "eval_windows": 1}
MAIN = "import sys; sys.argv[0] = 'stdist'; from stdist.cli import main; main()"


def city(path: Path, side: int) -> Path:
    READERS["synthetic"].prepare([], path, height=side, width=side, days=8, cadence=60, seed=1)
    return path


def train(folder: Path) -> Path:
    """A policy that has seen next to nothing: what it costs does not depend on what it says."""
    store = city(folder / "small.zarr", TRAINED)
    tree = {
        "name": "bench",
        "output_dir": str(folder),
        "stages": ["sft"],
        "data": {"store": str(store), "history": 6, "horizon": 6, "region": "0:2,0:2"},
        "numerals": {"mantissa_digits": 2},
        "policy": {"base": "tiny"},
        "forecast": {"decoding": "direct", "windows_per_batch": WINDOWS},
        "sft": STAGE,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    recipes.train(recipes.load_config(folder / "config.yaml"), lambda line: None)
    return folder / "bench"


def forecasts(run: Path, store: Path, runs: int) -> tuple[list[float], list[float]]:
    """Seconds of a warm forecast, and of one window of a sweep, in turn."""
    config = recipes.read_run_config(run)
    forecaster = CityForecaster(ForecastRequest(run, store, None, NEXT, Path(), places="all"), lambda line: None)
    forecaster.make()  # loads the model
    request = ForecastRequest(run, store, None, "test", Path(), places="all")
    sweep = recipes.recipe_of(config).open_sweep(config, request)
    grid, _ = sweep.predictor.grid(sweep.windows)
    chunks = [chunk for chunk in grid.chunks() if chunk.windows.stop <= WINDOWS]
    windows = len({chunk.windows.start for chunk in chunks}) * grid.windows_per_chunk

    def swept() -> None:
        for _ in sweep.predictor.predict(sweep.windows, chunks):
            pass

    swept()
    ours, peer = [], []
    for _ in range(runs):
        ours.append(seconds(forecaster.make))
        peer.append(seconds(swept) / windows)
    return ours, peer


async def ask(port: int, pause: float, until: float, times: list[float]) -> int:
    """One client; returns its errors."""
    errors, reader, writer = 0, None, None
    await asyncio.sleep(random.random() * pause)
    while time.perf_counter() < until:
        place = random.randint(1, SIDE * SIDE)
        began = time.perf_counter()
        try:
            if reader is None or writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"GET /forecast?places={place} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.split("content-length:")[1].split("\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            errors += not (head.startswith("http/1.1 200") and body["places"][0]["id"] == place)
        except (OSError, EOFError, LookupError, ValueError):
            errors, reader = errors + 1, None
        times.append(time.perf_counter() - began)
        await asyncio.sleep(max(0, pause - times[-1]))
    return errors


async def load(port: int, clients: int, length: float, pause: float) -> dict[str, Any]:
    times: list[float] = []
    began = time.perf_counter()
    errors = sum(await asyncio.gather(*(ask(port, pause, began + length, times) for _ in range(clients))))
    took = time.perf_counter() - began
    p50, p99 = np.quantile(times, (0.5, 0.99)) * 1000
    return {
        "requests": len(times),
        "errors": errors,
        "per_second": figure(len(times) / took),
        "p50_ms": figure(float(p50)),
        "p99_ms": figure(float(p99)),
        "seconds": figure(took),
    }


def serve(run: Path, store: Path, options: Namespace) -> dict[str, Any]:
    command = [sys.executable, "-c", MAIN, "serve", str(run), str(store), "--places", "all", "--port", "0"]
    with subprocess.Popen([*command, "--rate", "0", "--json"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(json.loads(process.stdout.readline())["url"].rpartition(":")[2])
        memory = psutil.Process(process.pid)
        asyncio.run(load(port, options.clients, 3, 0))  # connections and threads are there
        resident = [memory.memory_info().rss]
        result = {"closed_loop": asyncio.run(load(port, options.clients, options.seconds, 0))}
        resident.append(memory.memory_info().rss)
        result["paced"] = asyncio.run(load(port, options.clients, options.seconds / 3, options.pause))
        resident.append(memory.memory_info().rss)
        process.terminate()
    return result | {"resident_mb_before_between_after": [figure(rss / 1e6) for rss in resident]}


def main() -> None:
    options = parser(__doc__, runs=3)
    options.add_argument("--clients", type=int, default=200)
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--pause", type=float, default=1.0)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = city(folder / "city.zarr", SIDE)
        run = train(folder)
        ours, peer = forecasts(run, store, chosen.runs)
        served = serve(run, store, chosen)
    publish(
        comparison(
            name="serve",
            unit="seconds of a warm forecast of all cells",
            values=ours,
            peer="one window of a sweep",
            peer_values=peer,
            setting=f"preset tiny, {SIDE} x {SIDE} cells, S 6, K 6, decoding direct; {chosen.clients} clients",
            better="less",
            **served,
        ),
        chosen.json,
    )


if __name__ == "__main__":
    main()
