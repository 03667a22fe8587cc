"""Nights of two real cities, by the commands that an operator's cron calls: `stdist append` of the day before, `stdist
watch`, `stdist calibrate --newest 7`.

UrbanPG on New York's zones (two months of nights, Thanksgiving and Christmas in them) and on the 5 x 5 block of Milan
(five nights), each trained for minutes on the days before. Counted: nights on which a place was named, nights that were
called a drift, and the coverage of the intervals of all nights together. Then, on some of these nights, the same day
once more in a copy of store and run, with the values of three places multiplied: how many of them are named, and how
many others. The real data is public and not part of the project: --data, or STDIST_TEST_DATA, is its folder.

    python benchmarks/watch.py --json
"""

import csv
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from _harness import data_and_work, figure, opened, parser

from stdist.cli import app

NEWEST = 7
FACTORS = (0.0, 1.5, 2.5)
EVERY = 6
"""Nights between two on which places are altered."""
PLACES = 3


@dataclass(frozen=True)
class City:
    name: str
    values: np.ndarray  # [T, places], the first frame at midnight of the first day
    first_day: np.datetime64
    cadence: int  # minutes
    split: dict[str, str]
    first_night: np.datetime64
    last_night: np.datetime64
    model: dict[str, Any]

    def write(self, path: Path, first: np.datetime64, last: np.datetime64, factors: np.ndarray | None = None) -> Path:
        """Days as a table, a column a place."""
        a_day = 24 * 60 // self.cadence
        begin, end = (int((day - self.first_day).astype(int)) * a_day for day in (first, last + 1))
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["time", *(f"z{place}" for place in range(self.values.shape[1]))])
            for frame in range(begin, end):
                stamp = self.first_day + np.timedelta64(frame * self.cadence, "m")
                values = self.values[frame] * (1 if factors is None else factors)
                rows.writerow([str(stamp), *(f"{value:g}" for value in values)])
        return path


def cities(data: Path) -> Iterator[City]:
    flows = np.load(next((data / "nyc_zones").glob("*.npz")))["arr_0"][..., 0]
    new_york = {
        "train": "2019-01-01:2019-08-31",
        "validation": "2019-09-01:2019-10-24",
        "test": "2019-10-25:2019-10-31",
    }
    model = {"data": {"history": 12, "horizon": 12}, "model": {"kind": "urbanpg", "d": 64}}
    yield City(
        "new_york",
        flows.astype(np.float64),
        np.datetime64("2019-01-01"),
        60,
        new_york | {"test": "2019-10-25:2019-10-31"},
        np.datetime64("2019-11-01"),
        np.datetime64("2019-12-31"),
        model | {"training": {"learning_rate": 1e-2, "max_epochs": 12, "patience": 5}},
    )
    block = np.loadtxt(next((data / "milan_block_5x5").glob("*.csv")), delimiter=",")
    milan = {"train": "2013-11-01:2013-11-16", "validation": "2013-11-17:2013-11-23", "test": "2013-11-24:2013-11-25"}
    yield City(
        "milan",
        block,
        np.datetime64("2013-11-01"),
        10,
        milan,
        np.datetime64("2013-11-26"),
        np.datetime64("2013-11-30"),
        model | {"training": {"learning_rate": 1e-2, "max_epochs": 30, "patience": 8}},
    )


def stdist(*arguments: object) -> dict[str, Any]:
    """One command in this process; its JSON result. Raises SystemExit where it fails."""
    out, said = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(said):
        code = app([*map(str, arguments), "--json"], prog_name="stdist", standalone_mode=False)
    if code not in (None, 0, 6):
        raise SystemExit(f"stdist {arguments[0]} ended with {code}: {said.getvalue()}")
    return dict(json.loads(out.getvalue().splitlines()[-1]))


def nights(city: City, work: Path) -> dict[str, Any]:
    folder = work / city.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    store, run, table = folder / "city.zarr", folder / "runs" / "watched", folder / "day.csv"
    city.write(table, city.first_day, city.first_night - 1)
    split = [part for name, days in city.split.items() for part in (f"--{name}", days)]
    stdist("prepare", "table", table, "--out", store, "--cadence", city.cadence, "--channel", "value", *split)
    tree = {"recipe": "urbanpg-train", "name": "watched", "output_dir": str(folder / "runs"), **city.model}
    tree["data"] = {**tree["data"], "store": str(store), "channel": "value"}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    stdist("train", folder / "config.yaml")
    stdist("calibrate", run, store, "--newest", NEWEST)
    found, altered = [], {factor: {"places": 0, "named": 0, "others": 0} for factor in FACTORS}
    generator = np.random.default_rng(0)
    busy = np.argsort(city.values.mean(0))[city.values.shape[1] // 2 :]
    for night, day in enumerate(np.arange(city.first_night, city.last_night + 1)):
        for factor in FACTORS if night % EVERY == 0 else ():
            places = generator.choice(busy, PLACES, replace=False)
            named = _altered(city, folder, store, run, day, places, factor)
            count = altered[factor]
            count["places"] += PLACES
            count["named"] += len(named & set(places.tolist()))
            count["others"] += len(named - set(places.tolist()))
        stdist("append", store, city.write(table, day, day))
        found.append({"day": str(day), **stdist("watch", run, store)})
        stdist("calibrate", run, store, "--newest", NEWEST)
    points = np.array([each["scores"]["points"] for each in found])
    return {
        "nights": len(found),
        "nights_with_a_place_named": sum(bool(each["unusual_places"] or each["silent_places"]) for each in found),
        "places_named": sum(each["unusual_places"] + each["silent_places"] for each in found),
        "drifts": [each["day"] for each in found if each["drift"]],
        "nights_with_places": {each["day"]: each["unusual_places"] for each in found if each["unusual_places"]},
        "coverage": {
            name: figure(float(np.average([each["scores"]["coverage"][name] for each in found], weights=points)))
            for name in found[0]["scores"]["coverage"]
        },
        "altered": {f"times {factor:g}": count for factor, count in altered.items()},
    }


def _altered(
    city: City, folder: Path, store: Path, run: Path, day: np.datetime64, places: np.ndarray, factor: float
) -> set[int]:
    """Numbers of the places that are named where some of the day's values are others, in copies that are thrown
    away."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(store, copy / "city.zarr")
    shutil.copytree(run, copy / "watched")
    factors = np.ones(city.values.shape[1])
    factors[places] = factor
    stdist("append", copy / "city.zarr", city.write(copy / "day.csv", day, day, factors))
    result = stdist("watch", copy / "watched", copy / "city.zarr", "--out", copy / "all.csv")
    shutil.rmtree(copy)
    names = [entry["place"] for entry in result["unusual"]] + list(result["silent"])
    return {int(str(name).removeprefix("z")) for name in names}


def main() -> None:
    arguments = parser(__doc__, runs=1)
    data_and_work(arguments, "runs/watch")
    options = arguments.parse_args()
    work = opened(options)
    tables = {city.name: nights(city, work) for city in cities(options.data)}
    clean = tables["new_york"]
    result = {
        "name": "watch",
        "value": figure(clean["nights_with_a_place_named"] / clean["nights"]),
        "unit": "share of New York's nights on which a place was named, nothing being altered",
        "setting": f"UrbanPG of some minutes, 12 -> 12, calibrated each night on {NEWEST} days, one seed",
        "tables": tables,
    }
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
