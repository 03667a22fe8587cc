"""Cells of a grid's region as nodes, so that a forecaster of nodes stands beside the vision-LLM on the same cells."""

import json

import numpy as np
import pytest
import torch
import xarray
import yaml
from typer.testing import CliRunner

from stdist.cli import app
from stdist.data import GridSpec, GridStore, GridWriter, NodeRange, Region, Split, open_store
from stdist.nodes.graphs import grid_graph
from stdist.nodes.node_set import NodeSet
from stdist.runs import recipes

DAYS, FIRST_DAY = 9, np.datetime64("2024-03-04")
INSIDE = np.array([[1, 1, 1, 0], [1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]], bool)


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> GridStore:
    """4 x 4 cells, three of which are outside of the city; 5 days train, 2 validation, 2 test."""
    rng, hours = np.random.default_rng(0), np.arange(DAYS * 24)
    shape = 60 + 40 * np.sin(2 * np.pi * hours / 24)
    values = shape[:, None, None] * rng.uniform(0.5, 2, (4, 4)) * rng.uniform(0.95, 1.05, (len(hours), 4, 4))
    values = np.where(INSIDE, values, np.nan).astype(np.float32)
    last, ids = FIRST_DAY + DAYS - 1, np.arange(1, 17).reshape(4, 4)
    spec = GridSpec("toy grid", ("flow",), FIRST_DAY, last, ids, 60, 60, "vehicles", inside=INSIDE)
    with GridWriter(tmp_path_factory.mktemp("grid") / "grid.zarr", spec, {"made by": "a test"}) as writer:
        for day in range(DAYS):
            writer.write_day(day, {"flow": values[day * 24 : (day + 1) * 24]})
        split = Split.parse([FIRST_DAY, last - 4], [last - 3, last - 2], [last - 1, last])
        return open_store(writer.finalise(split))


def test_neighbours_share_a_side_and_lie_in_the_city():
    """Cells 0 1 . / 2 . 3 / 4 5 6 of a city, numbered row by row."""
    inside = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 1]], bool)
    expected = torch.zeros(7, 7)
    for one, other in [(0, 1), (0, 2), (2, 4), (3, 6), (4, 5), (5, 6)]:
        expected[one, other] = expected[other, one] = 1
    graph = grid_graph(inside)
    assert graph.is_coalesced() and torch.equal(graph.to_dense(), expected)


def test_nodes_are_the_citys_cells_of_a_region_row_by_row(grid, city, refused):
    nodes = NodeSet.of(grid, Region(0, 3, 1, 4))
    assert nodes.numbers.tolist() == [1, 2, 5, 7, 9, 10, 11]
    values = torch.arange(9).view(1, 1, 3, 3)
    assert nodes.select(values).tolist() == [[[0, 1, 3, 5, 6, 7, 8]]]
    part = nodes.part(slice(2, 4))
    assert part.numbers.tolist() == [5, 7] and part.select(values).tolist() == [[[3, 5]]]
    assert torch.equal(nodes.adjacency.to_dense(), grid_graph(INSIDE[:3, 1:]).to_dense())
    of_range = NodeSet.of(city, NodeRange(2, 8)).part(slice(1, 3))
    assert of_range.region == NodeRange(3, 5) and of_range.numbers.tolist() == [3, 4]
    refused(lambda: NodeSet.of(grid, Region(0, 1, 3, 4)), "0:1,3:4", "no cell inside the city")


@pytest.mark.parametrize("kind", ["stid", "stgcn", "graph_wavenet", "urbanpg"])
def test_cells_of_a_grid_are_trained_on_forecast_and_evaluated(make_config, grid, tmp_path, kind):
    data, training = {"region": "0:3,1:4", "history": 12}, {"max_epochs": 1, "train_batch_size": 16}
    run = make_config(grid, tmp_path, model={"kind": kind}, data=data, training=training)
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    trained = json.loads(invoke("train", path, "--json").splitlines()[-1])
    stage = trained["stages"]["train"]
    assert stage["after"]["mae"] < stage["before"]["mae"]
    test, part = run.run_dir / "forecasts" / "test.zarr", tmp_path / "part.zarr"
    invoke("forecast", run.run_dir, grid.path, "--out", part, "--region", "0:2,1:3", "--split", "test")
    with xarray.open_zarr(test) as forecasts, xarray.open_zarr(part) as of_part:
        values = forecasts["forecast"]
        assert values.dims == ("origin", "step", "row", "col")
        assert (np.isfinite(values.values) == INSIDE[:3, 1:]).all(), "no forecast outside of the city"
        np.testing.assert_allclose(of_part["forecast"], values[:, :, :2, :2], rtol=1e-6)
    scores = json.loads(invoke("evaluate", test, grid.path, "--json").splitlines()[-1])
    assert scores["contract"]["region"] == [0, 3, 1, 4] and scores["pooled"] == trained["test"]


def test_cells_do_not_join_one_after_the_other(make_config, grid, tmp_path, refused):
    names = "train", "validation", "test"
    first, second = ({name: [f"2024-03-0{day + i}"] * 2 for i, name in enumerate(names)} for day in (4, 7))
    periods = {"periods": [first | {"nodes": 4}, second | {"nodes": 6}]}
    continual = make_config(grid, tmp_path, recipe="continual", continual=periods)
    refused(lambda: recipes.train(continual, print), "node range 0:4 is of nodes, the store is a grid of 4 x 4")
