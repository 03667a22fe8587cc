"""The commands on a store of nodes, as a user types them."""

import json

import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

from stdist.cli import app


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_train_forecast_evaluate_report(city, make_config, tmp_path):
    config = make_config(city, tmp_path, training={"max_epochs": 1})
    path = tmp_path / "town.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    trained = json.loads(invoke("train", path, "model.p=0", "--json").splitlines()[-1])
    run, table = config.run_dir, tmp_path / "town.parquet"
    assert trained["run"] == str(run) and trained["report"].endswith("index.html")
    invoke("forecast", run, city.path, "--out", table, "--region", "2:6", "--split", "validation")
    assert pl.read_parquet(table)["cell"].unique().sort().to_list() == ["s2", "s3", "s4", "s5"]
    said = invoke("evaluate", table, city.path)
    assert "region: [2, 6]" in said and "MAPE" in said
    assert "What it costs" in (run / "report" / "index.html").read_text()
    assert invoke("report", run).strip().endswith("index.html")


def test_a_plan_says_what_training_then_holds(city, make_config, tmp_path):
    """Against counts by hand: nine sensors, d 8, S 6, K 4, batches of 32 over two learners along the nodes."""
    path = tmp_path / "town.yaml"
    shared = {"nodes": {"ranks": 2}, "learners": {"num_workers": 2, "engine": "deepspeed"}}
    path.write_text(yaml.safe_dump(make_config(city, tmp_path, **shared).model_dump(mode="json")))
    (stage,) = json.loads(invoke("plan", path, "--device-memory", "1MiB", "--json").splitlines()[-1])["stages"]
    backbone = (6 * 8 + 8) + (8 * 24 + 24) + 2 * (8 * 8 + 8) + (8 * 4 + 4)
    prompts, rows = (24 + 7 + 1) * 8, 9 * 8
    assert stage["parameters"] == stage["trainable_parameters"] == backbone + prompts + 4 * 8, "four of the nine rows"
    assert (stage["nodes"], stage["windows"], stage["steps_per_epoch"]) == (9, 183, 5)
    sums = 32 * (8 + 1) * (6 + 1)
    assert sum(stage["bytes_sent"].values()) == 4 * (2 * sums + backbone + prompts)
    assert stage["phases"]["training"]["activations"] > 32 * 5 * 8 * 4, "more than one layer of five nodes' activations"
    said = invoke("plan", path, "--device-memory", "1MiB")
    assert "does not fit: set nodes.block_nodes" in said
    assert f"every learner also holds the whole city's rows: {4 * rows} bytes" in said
    alone = path.with_name("alone.yaml")
    alone.write_text(yaml.safe_dump(make_config(city, tmp_path).model_dump(mode="json")))
    assert "the whole city's rows" not in invoke("plan", alone)


def test_a_plan_counts_the_hidden_layer_that_blocks_keep(city, make_config, tmp_path):
    d, kept = 256, {}
    for nodes in (4, 8):
        path = tmp_path / f"{nodes}.yaml"
        blocks = {"nodes": {"block_nodes": 2}, "model": {"d": d}, "data": {"region": f"0:{nodes}"}}
        path.write_text(yaml.safe_dump(make_config(city, tmp_path, **blocks).model_dump(mode="json")))
        kept[nodes] = json.loads(invoke("plan", path, "--json").splitlines()[-1])["stages"][0]["bytes"][
            "training: activations"
        ]
    assert kept[8] - kept[4] >= 32 * 4 * d * 4


@pytest.mark.parametrize("kind", ["urbanpg", "stid", "graph_wavenet", "stgcn"])
def test_what_a_plan_counts_grows_with_the_batch(city, make_config, tmp_path, kind):
    """By the same for every window; what serves all of them is there once."""
    stages = []
    for batch in (16, 32, 64):
        path = tmp_path / f"{batch}.yaml"
        config = make_config(
            city, tmp_path, model={"kind": kind}, data={"history": 12}, training={"train_batch_size": batch}
        )
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        stages += json.loads(invoke("plan", path, "--json").splitlines()[-1])["stages"]
    kept = [stage["phases"]["training"]["activations"] for stage in stages]
    for small, middle, large in (kept, [stage["flops_per_learner"] for stage in stages]):
        assert large - middle == 2 * (middle - small) > 0 and middle <= 2 * small
    assert sum(stages[0]["bytes_sent"].values()) == 0
