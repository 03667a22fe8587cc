"""UrbanPG on real data: against baselines trained in the same harness, its own ablations, a backbone from another city
on a tenth of the data, and zones that are added period by period.

Every run is a `stdist train` of its own below --work, with a report of its own, so that a benchmark that was broken off
goes on where it was; other settings need another --work. The real data is public and not part of the project: --data,
or STDIST_TEST_DATA, is its folder. With two --jobs on two cores it takes some hours; runs differ by their seed alone,
which decides the first weights, the order of windows, perturbation and dropout.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import yaml
from _harness import comparison, data_and_work, opened, parser, publish

from data_prep import READERS

METRICS = ("mae", "rmse", "mape")
COSTS = {
    "seconds_per_epoch": "s/epoch",
    "samples_per_second": "windows/s",
    "peak_memory_bytes": "peak bytes of the process",
    "parameters": "parameters",
}
"""Of training in batches of 64 windows (few-shot 32), one thread."""
CONVENTIONS = ("pooled", "mean_of_horizons")
SETTINGS: dict[str, dict[str, Any]] = {
    "urbanpg": {"learning_rate": 1e-2, "max_epochs": 60},
    "stid": {"learning_rate": 2e-3, "max_epochs": 60},
    "graph_wavenet": {"learning_rate": 2e-3, "max_epochs": 15},
}
"""Learning rates of UrbanPG and STID were chosen on validation days, seed 0, of 2e-3, 4e-3 and 1e-2. Graph WaveNet's
was not tuned, and its epochs are what half an hour of a core allows for a seed of both cities. Every model keeps its
best epoch."""
STID_RATES = {"nyc": 4e-3}
"""UrbanPG has one rate, STID the best one of each city: on metr 2e-3 is better."""
LONG = {"max_epochs": 300, "patience": 30}
"""Of a few days' training, where an epoch is a few steps."""
FEWER = 3
"""Seeds of ablations and periods, which are not asked to be better than anything."""
ABLATIONS = {
    "w/o TC": {"temporal": False},
    "w/o SC": {"spatial": False},
    "w/o RPR": {"p": 0.0},
    "w/o STCA": {"stca": False},
}
PERIODS = [(2019, 1, 40), (2019, 7, 50), (2020, 1, 60), (2020, 7, 69)]
"""Year, first month and nodes: four months train, one validates, one tests."""


@dataclass(frozen=True)
class Job:
    """One training: its place in the tables, and its configuration."""

    table: str
    row: str
    seed: int
    config: dict[str, Any]
    after: str | None = None

    @property
    def name(self) -> str:
        row = "".join(letter if letter.isalnum() else "-" for letter in self.row)
        return f"{self.table}-{row}-{self.seed}"


# --- data ----------------------------------------------------------------------------------------------------------


def prepare(data: Path, work: Path) -> None:
    """The four stores, those that are not there yet."""
    zones, week = data / "nyc_zones", data / "metr_la_week"
    splits = {"train": "2019-01-01:2019-08-31", "validation": "2019-09-01:2019-10-31", "test": "2019-11-01:2019-12-31"}
    sources: dict[str, tuple[str, list[Path], dict[str, Any]]] = {
        "nyc": (
            "zones-npz",
            sorted(zones.glob("*.npz")),
            {"start": "2019-01-01T00:00", "utc_offset": -300, "adjacency": zones / "adjacency.csv", **splits},
        ),
        "metr": (
            "table",
            [week / "los_speed.csv"],
            {
                **{"header": True, "start": "2012-03-01T00:00", "cadence": 5, "channel": "speed", "utc_offset": -480},
                **{"adjacency": week / "los_adj.csv", "meta": week / "graph_sensor_locations.csv"},
                # 6 : 2 : 2 of seven days, in whole days
                **{"train": "2012-03-01:2012-03-04", "validation": "2012-03-05:2012-03-05"},
                "test": "2012-03-06:2012-03-07",
            },
        ),
        "milan": (
            "table",
            [_with_ids(next((data / "milan_block_5x5").glob("*.csv")), work / "milan_nodes.csv")],
            {
                **{"header": True, "start": "2013-11-01T00:00", "cadence": 10, "utc_offset": 60},
                **{"channel": "internet", "train": "2013-11-01:2013-11-20"},
                **{"validation": "2013-11-21:2013-11-25", "test": "2013-11-26:2013-11-30"},
            },
        ),
        "taxi": (
            "table",
            [_as_nodes(data / "nyc_taxi_10x20", work / "taxi_nodes.csv")],
            {
                **{"header": True, "start": "2015-01-01T00:00", "cadence": 30, "utc_offset": -300},
                **{"channel": "flow_in", "train": "2015-01-01:2015-01-20"},
                **{"validation": "2015-01-21:2015-01-25", "test": "2015-01-26:2015-01-31"},
            },
        ),
    }
    for city, (reader, files, options) in sources.items():
        if not (work / f"{city}.zarr").exists():
            READERS[reader].prepare(files, work / f"{city}.zarr", city=city, **options)


def _with_ids(source: Path, out: Path) -> Path:
    """The 5 x 5 block of Milan as 25 nodes: a header with the squares' ids."""
    ids = [str(row * 100 + col + 1) for row in range(41, 46) for col in range(41, 46)]
    out.write_text(",".join(ids) + "\n" + source.read_text())
    return out


def _as_nodes(folder: Path, out: Path) -> Path:
    """A month of pick-ups on 10 x 20 cells of New York as 200 nodes."""
    frames = np.concatenate([np.load(folder / f"volume_{part}.npz")["volume"] for part in ("train", "test")])
    rows = frames.reshape(len(frames), -1)
    header = ",".join(f"{row}-{col}" for row, col in np.ndindex(frames.shape[1:3]))
    np.savetxt(out, rows, "%g", ",", header=header, comments="")
    return out


# --- runs ----------------------------------------------------------------------------------------------------------


def jobs(work: Path, seeds: int, d: int) -> Iterator[Job]:
    """All trainings, those that others wait for first."""

    def config(city: str, channel: str, kind: str = "urbanpg", **changes: Any) -> dict[str, Any]:
        tree: dict[str, Any] = {
            "recipe": "urbanpg-train",
            "output_dir": str(work / "runs"),
            "data": {"store": str(work / f"{city}.zarr"), "channel": channel},
            "model": {"kind": kind} | ({"d": d} if kind == "urbanpg" else {}),
            "training": {"patience": 15, "logging_steps": 100} | SETTINGS[kind],
        }
        if kind == "stid" and city in STID_RATES:
            tree["training"]["learning_rate"] = STID_RATES[city]
        for key, value in changes.items():
            tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
        return tree

    cities = {"nyc": "flow_in", "metr": "speed"}
    for seed in range(seeds):
        for city, channel in cities.items():
            yield Job(city, "UrbanPG", seed, config(city, channel))
            yield Job(city, "STID", seed, config(city, channel, "stid"))
    few = {"metr": ("speed", 0.25, 32), "milan": ("internet", 0.1, 32), "taxi": ("flow_in", 0.1, 32)}
    for seed in range(seeds):
        for city, (channel, fraction, batch) in few.items():
            little = {"data": {"fraction": fraction}, "training": {"train_batch_size": batch, **LONG}}
            table = f"few-shot {city}".replace(" ", "-")
            backbone = f"nyc-UrbanPG-{seed}"
            fitted = config(city, channel, **little, recipe="few-shot")
            fitted["few_shot"] = {"backbone": str(work / "runs" / backbone)}
            yield Job(table, "prompts on the backbone of nyc", seed, fitted, after=backbone)
            yield Job(table, "UrbanPG from scratch", seed, config(city, channel, **little))
            yield Job(table, "STID from scratch", seed, config(city, channel, "stid", **little))
    for seed in range(min(seeds, FEWER)):
        short = {"training": {"max_epochs": 20}}
        continual = config("nyc", "flow_in", **short, recipe="continual") | {"continual": {"periods": _periods()}}
        yield Job("continual", "frozen (Eq. 9-10)", seed, continual)
        everything = {"periods": _periods(), "train_backbone": True, "train_old_rows": True}
        yield Job("continual", "everything fine-tuned", seed, continual | {"continual": everything})
        for number, period in enumerate(_periods(), 1):
            nodes = period.pop("nodes")
            data = {"split": period, "region": f"0:{nodes}"}
            yield Job("continual", f"retrained, period {number}", seed, config("nyc", "flow_in", **short, data=data))
    for seed in range(min(seeds, FEWER)):
        for row, change in ABLATIONS.items():
            for city, channel in cities.items():
                yield Job(city, row, seed, config(city, channel, model=change))
    for seed in range(seeds):
        for city, channel in cities.items():
            yield Job(city, "Graph WaveNet", seed, config(city, channel, "graph_wavenet"))


def _periods() -> list[dict[str, Any]]:
    ends = {1: (("01-01", "04-30"), ("05-01", "05-31"), ("06-01", "06-30"))}
    ends[7] = (("07-01", "10-31"), ("11-01", "11-30"), ("12-01", "12-31"))
    names = ("train", "validation", "test")
    return [
        {
            **{name: [f"{year}-{day}" for day in span] for name, span in zip(names, ends[month], strict=True)},
            "nodes": nodes,
        }
        for year, month, nodes in PERIODS
    ]


def wanted(every: list[Job], tables: list[str] | None) -> list[Job]:
    """The jobs of these tables, and those that they wait for."""
    needed = {job.after for job in every if not tables or job.table in tables}
    return [job for job in every if not tables or job.table in tables or job.name in needed]


def run(job: Job, work: Path, needed: Future[bool] | None) -> bool:
    """`stdist train` in a process of its own with one thread, once the run it ``needed`` has ended; nothing if it was
    made before. Returns whether its result is there."""
    if needed:
        needed.result()
    folder = work / "runs" / job.name
    if (folder / "report" / "metrics.json").exists():
        return True
    path = work / f"{job.name}.yaml"
    path.write_text(yaml.safe_dump({"name": job.name, "seed": job.seed, **job.config}))
    ended = subprocess.run(
        [sys.executable, "-c", "from stdist.cli import main; main()", "train", str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        print(f"{job.name}: {ended.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    return not ended.returncode


# --- tables --------------------------------------------------------------------------------------------------------


def collect(done: list[Job], work: Path) -> dict[str, dict[str, Any]]:
    """Table → row → over seeds: errors of both conventions as [mean, standard deviation], medians of costs."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for job in done:
        path = work / "runs" / job.name / "report" / "metrics.json"
        if not path.exists():
            continue
        metrics = json.loads(path.read_text())
        found.setdefault(job.table, {}).setdefault(job.row, []).append(metrics)
        if job.row == "UrbanPG":
            for name in ("mean by weekday and slot", "ridge"):
                found[job.table].setdefault(name, [{"model": metrics["baselines"][name]}])
    return {table: {row: _row(runs) for row, runs in rows.items()} for table, rows in found.items()}


def _row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"seeds": len(runs)}
    for convention in CONVENTIONS:
        values = {name: [each["model"][convention][name] for each in runs] for name in METRICS}
        row[convention] = {name: _spread(each) for name, each in values.items()}
    if costs := [cost for each in runs for cost in each.get("efficiency", [])]:
        for key in COSTS:
            row[key] = round(median(cost[key] for cost in costs), 2)
    if tables := [each["tables"][0]["rows"] for each in runs if each.get("tables")]:
        row["periods"] = [[_cell(values) for values in zip(*lines, strict=True)] for lines in zip(*tables, strict=True)]
    return row


def _cell(values: tuple[Any, ...]) -> list[float] | None:
    return None if None in values else _spread([float(value) for value in values])


def errors_of(done: list[Job], table: str, row: str, work: Path) -> list[float]:
    """Pooled test MAE of every seed; infinite where none was trained."""
    paths = [work / "runs" / j.name / "report" / "metrics.json" for j in done if (j.table, j.row) == (table, row)]
    found = [json.loads(path.read_text())["model"]["pooled"]["mae"] for path in paths if path.exists()]
    return found or [float("inf")]


def _spread(values: list[float]) -> list[float]:
    return [round(mean(values), 4), round(stdev(values), 4) if len(values) > 1 else 0.0]


def as_markdown(tables: dict[str, dict[str, Any]]) -> str:
    """For people: both conventions, and what it costs."""
    lines = []
    for table, rows in tables.items():
        lines += [
            f"{table}",
            "",
            "| | seeds | MAE | RMSE | MAPE | mean of horizons: MAE | RMSE | MAPE | "
            + " | ".join(COSTS.values())
            + " |",
            "|---|" + "---:|" * (7 + len(COSTS)),
        ]
        for name, row in rows.items():
            errors = [_shown(row[convention][metric]) for convention in CONVENTIONS for metric in METRICS]
            cost = [f"{row[key]:,.4g}" if key in row else "" for key in COSTS]
            lines.append("| " + " | ".join([name, str(row["seeds"]), *errors, *cost]) + " |")
        lines.append("")
    return "\n".join(lines)


def _shown(spread: list[float]) -> str:
    return f"{spread[0]:.4g} ± {spread[1]:.2g}"


def main() -> None:
    arguments = parser(__doc__, runs=5)
    data_and_work(arguments, "runs/urbanpg_accuracy")
    arguments.add_argument("--jobs", type=int, default=1, help="trainings at a time, a thread each")
    arguments.add_argument("--d", type=int, default=128, help="hidden width of UrbanPG; STID's is 128")
    arguments.add_argument("--tables", nargs="*", help="some of the tables, as nyc metr; all by default")
    options = arguments.parse_args()
    work = opened(options)
    prepare(options.data, work)
    asked = wanted(list(jobs(work, options.runs, options.d)), options.tables)
    with ThreadPoolExecutor(options.jobs) as pool:
        running: dict[str, Future[bool]] = {}
        for job in asked:
            running[job.name] = pool.submit(run, job, work, running.get(job.after or ""))
    tables = collect(asked, work)
    print(as_markdown(tables))
    if lost := [name for name, ended in running.items() if not ended.result()]:
        print(
            f"error: {len(lost)} trainings failed, first {lost[0]}; the same command tries them again", file=sys.stderr
        )
        raise SystemExit(1)
    publish(
        comparison(
            "urbanpg_accuracy",
            "test MAE on nyc zones, trips an hour",
            errors_of(asked, "nyc", "UrbanPG", work),
            "the better of STID and Graph WaveNet in the same harness",
            min((errors_of(asked, "nyc", name, work) for name in ("STID", "Graph WaveNet")), key=mean),
            f"12 -> 12, one thread, d {options.d}",
            "less",
            settings=SETTINGS | {"stid_rates": STID_RATES},
            tables=tables,
        ),
        options.json,
    )


if __name__ == "__main__":
    main()
