"""The commands on a store of nodes, as a user types them."""

import json

import polars as pl
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


def test_a_plan_of_nodes_is_refused_in_a_line(city, make_config, tmp_path):
    path = tmp_path / "town.yaml"
    path.write_text(yaml.safe_dump(make_config(city, tmp_path).model_dump(mode="json")))
    result = CliRunner().invoke(app, ["plan", str(path)])
    assert "recipe urbanpg-train has no such command yet" in str(result.exception)
