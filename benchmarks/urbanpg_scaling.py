"""What UrbanPG costs as a city grows: seconds and memory of a training step and of a forecast, batch 1, S = K = 12.

The curve: UrbanPG (d 256), the same model with softmax attention over nodes, STID of basicts (hidden width 256) and
Graph WaveNet of torch-spatiotemporal (its authors' sizes), on as many nodes as LargeST's cities have. Then UrbanPG on
more nodes than any, all at once and in blocks (``stdist.urbanpg.blocks``), against the cost per node of the largest
city; and a training step on a million nodes in blocks.

Each point is a process of its own, so that its peak memory is its own; rounds take all points in turn. Peers live in an
environment of their own (README.md), whose Python is named by --peer-python or STDIST_PEER_PYTHON.

    python benchmarks/urbanpg_scaling.py --json --figure benchmarks/results/urbanpg_scaling.png
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import json
import statistics
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from _harness import comparison, figure, parser, publish
from matplotlib import pyplot

from stdist.progress import progress_bar

HERE = Path(__file__).parent
WIDTH, BLOCK, STEPS = 256, 4096, 3
MODES = ("training", "inference")
NAMES = {
    "urbanpg": "UrbanPG",
    "quadratic": "UrbanPG with softmax attention",
    "stid": "STID (basicts)",
    "graph_wavenet": "Graph WaveNet (torch-spatiotemporal)",
}
PEERS = ("stid", "graph_wavenet")
WAYS = {
    "all at once": (None, None),
    "in blocks": (BLOCK, BLOCK),
    "in blocks against all at once": (BLOCK, None),
}
"""How the nodes pass of the large city, and of the one that it is compared with. The last is the faster way at each."""


class Point(NamedTuple):
    model: str
    nodes: int
    mode: str
    block_nodes: int | None = None


class Measured(NamedTuple):
    """Over all rounds: seconds of each step, peak bytes of each process."""

    seconds: list[float]
    peaks: list[int]
    parameters: int

    @property
    def time(self) -> float:
        return statistics.median(self.seconds)

    @property
    def peak(self) -> float:
        return statistics.median(self.peaks)


def points(options: Namespace) -> list[Point]:
    city = max(options.nodes)
    curve = [Point(model, nodes, mode) for nodes in options.nodes for mode in MODES for model in NAMES]
    large = [Point("urbanpg", options.large, mode) for mode in MODES]
    blocks = [Point("urbanpg", nodes, mode, BLOCK) for nodes in (city, options.large) for mode in MODES]
    return [*curve, *large, *blocks, Point("urbanpg", options.largest, "training", BLOCK)]


def measure(wanted: list[Point], options: Namespace) -> dict[Point, Measured]:
    rounds: list[dict[Point, dict[str, Any]]] = []
    with progress_bar("measuring", "points") as progress:
        for _ in range(options.runs):
            done = len(rounds) * len(wanted)
            rounds.append({})
            for number, point in enumerate(wanted, 1):
                rounds[-1][point] = measure_once(point, options.peer_python)
                progress(done + number, options.runs * len(wanted))
    return {
        point: Measured(
            [taken for each in rounds for taken in each[point]["seconds"]],
            [each[point]["peak_bytes"] for each in rounds],
            rounds[0][point]["parameters"],
        )
        for point in wanted
    }


def measure_once(point: Point, peer_python: str) -> dict[str, Any]:
    peer = point.model in PEERS
    what = {key: value for key, value in point._asdict().items() if value is not None}
    what |= {"module": "_urban_peers" if peer else "_urban_ours", "width": WIDTH, "steps": STEPS}
    command = [peer_python if peer else sys.executable, str(HERE / "_urban_point.py"), json.dumps(what)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"error: {point} failed:\n{ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def require_peers(python: str | None) -> None:
    """Ends with exit code 2 where there is no such Python, or it has not all peers."""
    why = "none is named"
    if python:
        try:
            ran = subprocess.run([python, "-c", "import _urban_peers"], cwd=HERE, capture_output=True, text=True)
            why = ran.stderr.strip().splitlines()[-1] if ran.returncode else ""
        except OSError as error:
            why = str(error)
    if why:
        print(
            f"error: no Python with the peers ({why}); make one as benchmarks/README.md says and name it with "
            "--peer-python or STDIST_PEER_PYTHON",
            file=sys.stderr,
        )
        raise SystemExit(2)


def result(measured: dict[Point, Measured], options: Namespace) -> dict[str, Any]:
    city = max(options.nodes)

    def times(model: str, mode: str) -> float:
        return measured[Point(model, city, mode)].time / measured[Point("urbanpg", city, mode)].time

    def less(model: str, mode: str) -> float:
        return measured[Point(model, city, mode)].peak / measured[Point("urbanpg", city, mode)].peak

    def per_node(mode: str, block_of_large: int | None, block_of_small: int | None, what: str) -> float:
        large = measured[Point("urbanpg", options.large, mode, block_of_large)]
        small = measured[Point("urbanpg", city, mode, block_of_small)]
        return getattr(large, what) / options.large / (getattr(small, what) / city)

    ours, peer = (measured[Point(model, city, "training")] for model in ("urbanpg", "graph_wavenet"))
    largest = measured[Point("urbanpg", options.largest, "training", BLOCK)]
    others = [model for model in NAMES if model != "urbanpg"]
    return comparison(
        "urbanpg_scaling",
        "seconds a training step",
        ours.seconds,
        NAMES["graph_wavenet"],
        peer.seconds,
        f"{city} nodes, batch 1, S = K = 12, UrbanPG and STID {WIDTH} wide, Graph WaveNet at its authors' sizes, AdamW",
        "less",
        times_the_seconds={mode: {model: figure(times(model, mode)) for model in others} for mode in MODES},
        times_the_peak={mode: {model: figure(less(model, mode)) for model in others} for mode in MODES},
        a_node_of_the_large_city_against_one_of_this={
            f"{mode}, {how}": {what: figure(per_node(mode, *blocks, what)) for what in ("time", "peak")}
            for mode in MODES
            for how, blocks in WAYS.items()
        },
        largest={
            "nodes": options.largest,
            "seconds": figure(largest.time),
            "peak_bytes": round(largest.peak),
            "parameters": largest.parameters,
        },
        points=[row(point, each) for point, each in measured.items()],
    )


def row(point: Point, measured: Measured) -> dict[str, Any]:
    return {
        **point._asdict(),
        "seconds": figure(measured.time),
        "spread": [figure(min(measured.seconds)), figure(max(measured.seconds))],
        "peak_bytes": round(measured.peak),
        "parameters": measured.parameters,
    }


def draw(measured: dict[Point, Measured], options: Namespace) -> None:
    shown, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for model, name in NAMES.items():
        for mode, style in zip(MODES, ("o-", "o--"), strict=True):
            curve = [measured[Point(model, nodes, mode)] for nodes in options.nodes]
            colour, label = f"C{[*NAMES].index(model)}", name if mode == "training" else None
            for axis, values in zip(
                axes, ([each.time for each in curve], [each.peak / 2**20 for each in curve]), strict=True
            ):
                axis.loglog(options.nodes, values, style, color=colour, label=label, markersize=4)
    for axis, what in zip(axes, ("seconds a step, batch 1", "peak above the model, MiB"), strict=True):
        axis.set_xlabel("nodes")
        axis.set_ylabel(what)
        axis.set_xticks(options.nodes, [f"{nodes:,}" for nodes in options.nodes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].plot([], [], "k-", label="training step")
    axes[0].plot([], [], "k--", label="forecast")
    shown.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    shown.savefig(options.figure, dpi=120)


def main() -> None:
    arguments = parser(__doc__, runs=3)
    arguments.add_argument("--peer-python", default=os.environ.get("STDIST_PEER_PYTHON"), help="Python with the peers")
    arguments.add_argument("--nodes", type=int, nargs="+", default=[716, 2352, 3834, 8600], help="sizes of the curve")
    arguments.add_argument("--large", type=int, default=200_000, help="nodes of the large city (default: %(default)s)")
    arguments.add_argument("--largest", type=int, default=1_000_000, help="nodes in blocks (default: %(default)s)")
    arguments.add_argument("--figure", type=Path, help="where to draw the curve")
    options = arguments.parse_args()
    require_peers(options.peer_python)
    measured = measure(points(options), options)
    if options.figure:
        draw(measured, options)
    publish(result(measured, options), options.json)


if __name__ == "__main__":
    main()
