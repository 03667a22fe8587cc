"""UrbanPG on four learners, who share a window's nodes, the batch, or both: the losses of one process, to the end of a
run, in every paradigm."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'stdist[cluster]'")

from data_prep import READERS, prepare
from stdist.runs import recipes
from stdist.runs.recipes import load_config

CONFIG: dict[str, Any] = {
    "name": "run",
    "recipe": "urbanpg-train",
    "data": {"channel": "flow_in", "history": 4, "horizon": 3},
    "model": {"d": 8},
    # Of a rounding AdamW makes a step, however small: at a higher rate it would grow.
    "training": {"max_epochs": 2, "train_batch_size": 16, "learning_rate": 1e-4, "logging_steps": 1, "warmup_steps": 2},
}
FOUR = ["learners.engine=deepspeed", "learners.num_workers=4"]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> Path:
    """A store of eleven zones, which four learners cannot share evenly; eight hourly days."""
    folder, rng = tmp_path_factory.mktemp("zones"), np.random.default_rng(0)
    hours = np.arange(8 * 24)
    flow = (2 + np.sin(2 * np.pi * hours / 24))[:, None] * rng.uniform(5, 50, 11) + rng.normal(0, 2, (len(hours), 11))
    np.savez(folder / "zones.npz", np.repeat(flow[:, :, None], 2, 2).astype(np.float32))
    plan = READERS["zones-npz"].plan([folder / "zones.npz"], start="2024-03-04T00:00", city="zones")
    return prepare(plan, folder / "zones.zarr").path


@pytest.fixture(scope="module")
def four(begin_learners, nodes):
    return begin_learners(CONFIG, nodes, 4)


@pytest.fixture(scope="module")
def alone(four) -> dict[str, Any]:
    return recipes.train(load_config(four.runs.config, ["name=alone"]), lambda line: None)


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("nodes", ["nodes.ranks=4", "learners.zero_stage=1"]),
        ("both", ["nodes.ranks=2", "learners.zero_stage=2", "nodes.block_nodes=4"]),
        ("batch", ["nodes.ranks=1", "learners.zero_stage=3"]),
    ],
)
def test_four_learners_lose_as_one(four, alone, name, shared):
    said = four.finish(name, *FOUR, *shared)
    ours, theirs = four.runs.log(name), four.runs.log("alone")
    assert len(ours) == len(theirs) > 10
    for mine, expected in zip(ours, theirs, strict=True):
        assert (mine["step"], mine.get("event")) == (expected["step"], expected.get("event"))
        pairs = (mine["metrics"], expected["metrics"]) if "metrics" in mine else (mine, expected)
        for key in ("loss", "grad_norm", "mae", "rmse"):
            if key in pairs[0]:
                assert pairs[0][key] == pytest.approx(pairs[1][key], rel=1e-5 if key != "grad_norm" else 1e-4), key
    report = json.loads((four.runs / name / "report" / "metrics.json").read_text())
    assert report["model"]["pooled"]["mae"] == pytest.approx(alone["test"]["mae"], rel=1e-5)
    assert any("test MAE" in line for line in said)


def require_close(four, name: str, expected: str) -> None:
    ours, theirs = ([line["loss"] for line in four.runs.log(each) if "loss" in line] for each in (name, expected))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_other_learners_go_on_with_a_run(four, alone):
    """Four along the nodes are told to stop in the second epoch; two by two, and blocks, go on where they were."""
    answers = four.train("handed-on", *FOUR, "nodes.ranks=4", trap="interrupt train 15 2")
    assert all(answer["error"].startswith("Interrupted") for answer in answers), answers
    said = four.finish("handed-on", *FOUR, "nodes.ranks=2", "nodes.block_nodes=3", "learners.zero_stage=2")
    assert any("test MAE" in line for line in said)
    require_close(four, "handed-on", "alone")


@pytest.mark.parametrize(
    ("trains", "ablations"),
    [
        ("all", []),
        ("the row of Eq. 4", ["model.temporal=false", "model.stca=false", "model.p=0.5"]),
        ("rows of nodes", ["model.temporal=false", "model.p=0", "continual.train_old_rows=true"]),
    ],
)
def test_continual_learning_on_four_learners(four, alone, nodes, trains, ablations):
    """Frozen rows of old nodes are some learners' only rows. ``trains``: in the second period, of every learner's."""
    march = [[f"2024-03-{first + day:02}" for day in range(4)] for first in (4, 8)]
    periods = [
        {"train": [first, last], "validation": [then, then], "test": [end, end], "nodes": count}
        for (first, last, then, end), count in zip(march, (7, 11), strict=True)
    ]
    changes = ["recipe=continual", f"continual={json.dumps({'periods': periods})}", "training.max_epochs=1", *ablations]
    shared, whole = f"{trains}, shared", f"{trains}, alone"
    recipes.train(load_config(four.runs.config, [f"name={whole}", *changes]), lambda line: None)
    four.finish(shared, *FOUR, "nodes.ranks=4", *changes)
    require_close(four, shared, whole)
    tables = [
        json.loads((four.runs / name / "report" / "metrics.json").read_text())["tables"] for name in (shared, whole)
    ]
    ours, theirs = ([value for row in table[0]["rows"] for value in row[1:] if value is not None] for table in tables)
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    ("shared", "reason"),
    [
        (["nodes.ranks=4", "learners.zero_stage=3"], "learners.zero_stage 3 does not go with nodes.ranks"),
        (["nodes.ranks=1", "training.train_batch_size=6"], "training.train_batch_size is 6, which 4 learners cannot"),
        (["nodes.ranks=2", "data.region=0:1"], "1 nodes cannot be shared by nodes.ranks 2"),
    ],
)
def test_what_four_learners_cannot_share(four, shared, reason):
    answers = four.train("refused", *FOUR, *shared)
    assert all(reason in answer["error"] for answer in answers), answers
    assert not (four.runs / "refused").exists()
