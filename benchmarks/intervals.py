"""Intervals on real data: coverage and CRPS of calibrated runs on days that neither the model nor the calibration saw,
beside ridge with Gaussian residuals and last week's value with the quantiles of its own.

UrbanPG on New York's zones, a week of Los Angeles and the 5 x 5 block of Milan, and ST-Vision-LLM on that block, each
trained for some minutes: what is measured is the calibration. Two ways to use it: once, on the validation days; and
anew at each midnight on the newest days, whose truth is known by then. Every step is kept below --work, so that a
benchmark that was broken off goes on where it was. The real data is public and not part of the project: --data, or
STDIST_TEST_DATA, is its folder.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from _harness import comparison, data_and_work, figure, opened, parser, publish
from urbanpg_accuracy import prepare

from data_prep import READERS
from stdist.data import GridStore, open_store
from stdist.errors import InputError
from stdist.evaluation import open_forecasts
from stdist.evaluation.conformal import ConformalQuantiles
from stdist.evaluation.levels import LEVELS
from stdist.evaluation.protocol import local_hours, match_windows, read_targets
from stdist.evaluation.quantile_scores import QuantileErrors
from stdist.runs import recipes
from stdist.runs.calibration import FORECASTS
from stdist.runs.forecast_request import ForecastRequest
from stdist.runs.forecasting import write_forecasts

SETTINGS = {"nyc": ("nyc", "flow_in", 25), "metr": ("metr", "speed", 50), "milan": ("block", "internet", 40)}
"""UrbanPG's runs: store, channel, epochs at most."""
NEWEST_DAYS = 7
REPOSITORY = Path(__file__).resolve().parents[1]
BLOCK = {"start": "2013-11-01", "cadence": 10, "channel": "internet", "row0": 41, "col0": 41, "id_width": 100}


def configurations(work: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Runs by name: their store and their tree."""
    found = {}
    for name, (store, channel, epochs) in SETTINGS.items():
        found[name] = (
            work / f"{store}.zarr",
            {
                "recipe": "urbanpg-train",
                "seed": 0,
                "data": {"store": str(work / f"{store}.zarr"), "channel": channel},
                "model": {"kind": "urbanpg", "d": 128},
                "training": {"patience": 15, "logging_steps": 100, "learning_rate": 1e-2, "max_epochs": epochs},
            },
        )
    tree = yaml.safe_load((REPOSITORY / "configs" / "milan_block.yaml").read_text())
    tree = {key: value for key, value in tree.items() if key not in ("alignment", "arithmetic", "grpo")}
    tree["data"]["store"], tree["stages"] = str(work / "block.zarr"), ["sft"]
    tree["sft"] |= {"max_steps": 1500, "save_steps": 250, "eval_steps": 500}
    found["vllm"] = work / "block.zarr", tree
    return {
        name: (store, tree | {"name": name, "output_dir": str(work / "runs")}) for name, (store, tree) in found.items()
    }


def calibrated(name: str, store: Path, tree: dict[str, Any], work: Path) -> dict[str, Any]:
    """Trains and calibrates one run unless that was done; returns ``quantiles`` of its metrics."""
    run = work / "runs" / name
    if not (run / "report" / "metrics.json").exists():
        path = work / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        recipes.train(recipes.load_config(path), print)
    if not (run / "calibration.json").exists():
        recipes.calibrate(ForecastRequest(run, store, None, "validation", run / FORECASTS), print)
    return dict(json.loads((run / "report" / "metrics.json").read_text())["quantiles"])


def recalibrated(name: str, store: GridStore, work: Path, days: int = NEWEST_DAYS) -> dict[str, Any]:
    """Scores of the test windows where each day's are calibrated at its midnight on the ``days`` before it, validation
    or test, whichever there are."""
    parts = {}
    config = recipes.read_run_config(work / "runs" / name)
    for part in ("validation", "test"):
        path = work / f"{name}-{part}.zarr"
        if not path.exists():
            request = ForecastRequest(work / "runs" / name, store.path, None, part, path, quantiles=False)
            sweep = recipes.recipe_of(config).open_sweep(config, request)
            sweep.predictor.ask_distribution()
            write_forecasts(config, sweep.predictor, sweep.windows, sweep.summary, path, print)
        forecasts = open_forecasts(path)
        windows, origins = match_windows(forecasts.header, store)
        values = forecasts.read(slice(0, len(origins)), forecasts.header.region, quantiles=True)
        arrays = *values, *read_targets(windows, forecasts.header.region, origins)
        parts[part] = (origins, *(array.reshape(*array.shape[:2], -1) for array in arrays))
    origins, point, *quantities = (
        np.concatenate(pair) for pair in zip(parts["validation"], parts["test"], strict=True)
    )
    *of_levels, truth, observed = quantities
    own = np.stack(of_levels) if of_levels else None
    K, places = point.shape[1:]
    day_of = store.local_times.astype("datetime64[D]")
    first, last, tested = day_of[origins + 1], day_of[origins + K], origins >= parts["test"][0][0]
    errors = QuantileErrors.empty(LEVELS, K, places)
    for day in np.unique(first[tested]):
        past, now = (last < day) & (first >= day - days), tested & (first == day)
        past_own, now_own = (None if own is None else own[:, chosen] for chosen in (past, now))
        fit = ConformalQuantiles.fit(point[past], truth[past], observed[past], past_own)
        quantiles = fit.quantiles(point[now], np.arange(places), now_own)
        hours = local_hours(store, origins[now], K)
        errors = errors.add(quantiles, truth[now], observed[now], hours, np.arange(places))
    return errors.summary()


def row(scores: dict[str, Any]) -> dict[str, Any]:
    """CRPS, and of each interval its coverage, the lowest and highest of the steps, and mean width."""
    pooled = scores["pooled"]
    result: dict[str, Any] = {"crps": figure(pooled["crps"])}
    for name, interval in pooled["intervals"].items():
        steps = [step["intervals"][name]["coverage"] for step in scores["per_horizon"]]
        groups = [group["intervals"][name]["coverage"] for group in scores["per_place_group"]]
        result[name] = {
            "coverage": figure(interval["coverage"]),
            "of_steps": [figure(min(steps)), figure(max(steps))],
            "of_place_groups": [figure(share) for share in groups],
            "width": figure(interval["width"]),
        }
    return result


def main() -> None:
    arguments = parser(__doc__, runs=1)
    data_and_work(arguments, "runs/intervals")
    options = arguments.parse_args()
    work = opened(options)
    prepare(options.data, work)
    if not (work / "block.zarr").exists():
        block = options.data / "milan_block_5x5" / "milan_grid_data.csv"
        READERS["table"].prepare([block], work / "block.zarr", **BLOCK)
    tables: dict[str, dict[str, Any]] = {}
    for name, (store, tree) in configurations(work).items():
        scores = calibrated(name, store, tree, work)
        tables[name] = {which: row(each) for which, each in scores.items()}
        try:
            tables[name][f"model, each midnight on {NEWEST_DAYS} days"] = row(
                recalibrated(name, open_store(store), work)
            )
        except InputError as error:
            print(f"{name}: {error}", file=sys.stderr)
        print(json.dumps({name: tables[name]}, indent=1))
    ridge = "ridge, Gaussian residuals by step"
    publish(
        comparison(
            "intervals",
            "test CRPS by 9 quantiles on nyc zones, trips an hour, calibrated once",
            [tables["nyc"]["model"]["crps"]],
            ridge,
            [tables["nyc"][ridge]["crps"]],
            "12 -> 12, one seed",
            "less",
            tables=tables,
        ),
        options.json,
    )


if __name__ == "__main__":
    main()
