"""A third party's recipe: an installed package that nothing in stdist names is planned, trained and asked for
forecasts by the same commands."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars
import pytest
import yaml

from stdist.runs.recipes import RECIPES

PACKAGE = Path(__file__).with_name("scaled_persistence.py")
NAME = "scaled-persistence"


@pytest.fixture
def install(tmp_path, monkeypatch) -> Iterator:
    """Installs a package of one module, with an entry point each for recipes of the names and values that it is given.
    After the test nothing is left of it."""

    def install(**recipes: str) -> None:
        site = tmp_path / "site"
        information = site / "third_party-1.0.dist-info"
        information.mkdir(parents=True)
        shutil.copy(PACKAGE, site)
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
        lines = [f"{name.replace('_', '-')} = {value}" for name, value in recipes.items()]
        (information / "entry_points.txt").write_text("\n".join(["[stdist.recipes]", *lines, ""]))
        monkeypatch.syspath_prepend(site)

    monkeypatch.setattr(RECIPES, "_things", dict(RECIPES._things))
    yield install
    sys.modules.pop(PACKAGE.stem, None)


@pytest.fixture
def config(tmp_path, monkeypatch, city) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "factor.yaml"
    tree = {"recipe": NAME, "name": "factor", "data": {"store": str(city), "history": 3, "horizon": 2}}
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_recipe_from_outside_is_planned_trained_and_forecasts(install, stdist, config, tmp_path, city):
    install(scaled_persistence="scaled_persistence:ScaledPersistenceRecipe")
    plan = stdist("plan", config, "--json")
    assert plan.code == 0 and plan.json == {"parameters": 1}
    assert stdist("plan", config).out.splitlines() == ["parameters 1", "one number trains", "fits"]

    trained = stdist("train", config, "--json")
    assert trained.code == 0, trained.err
    run = tmp_path / "runs" / "factor"
    assert trained.json["test"]["mae"] > 0 and Path(trained.json["report"]).is_file()
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3, 4, 5, 6]
    log = (run / "log.jsonl").read_text()
    assert stdist("train", config, "--json").json == trained.json and (run / "log.jsonl").read_text() == log

    made = stdist("forecast", run, city, "--out", "test.parquet", "--json")
    assert made.code == 0, made.err
    summary = json.loads((run / "checkpoints" / "fit" / "finished.json").read_text())
    factor = json.loads((run / "checkpoints" / "fit" / summary["checkpoint"] / "factor.json").read_text())
    assert factor != 1.0
    table = polars.read_parquet("test.parquet")
    steps_of_a_window = table.group_by("origin", "cell").agg(polars.col("forecast").n_unique())
    assert steps_of_a_window["forecast"].to_list() == [1] * len(steps_of_a_window)  # the last value, whatever the step
    assert np.isfinite(table["forecast"].to_numpy()).all() and len(table) == made.json["windows"] * 9 * 2


def test_a_recipe_that_nobody_installed_is_one_line_that_names_those_there_are(install, refused, config):
    line = refused("train", config)
    assert f"recipe '{NAME}' is none; choose one of " in line and "vision-llm" in line


@pytest.mark.parametrize("value", ["scaled_persistence:Recipes", "scaled:ScaledPersistenceRecipe"])
def test_a_package_that_is_broken_is_one_line_and_stops_no_other_recipe(install, refused, stdist, config, value):
    install(scaled_persistence=value)
    assert refused("plan", config).startswith(f"recipe '{NAME}' cannot be loaded from {value} (")
    assert NAME in refused("plan", config, "recipe=vision")
