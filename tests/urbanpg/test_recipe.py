"""Forecasters of nodes from a configuration to a scored forecast, on a town of nine sensors."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray

from stdist.data import GridStore, NodeRange
from stdist.evaluation import evaluate
from stdist.nodes.dataset import open_dataset
from stdist.nodes.learners import NodeLearners
from stdist.nodes.stage import ForecastStage, WindowForecasts
from stdist.runs import recipes
from stdist.runs.forecast_request import ForecastRequest
from stdist.runs.recipes import train
from stdist.runs.run_folder import refuse_foreign_folder
from stdist.urbanpg import UrbanPG
from stdist.urbanpg.checkpoints import load_backbone, result_of
from stdist.urbanpg.config import UrbanConfig

KINDS = ("urbanpg", "stid", "graph_wavenet", "stgcn")
Finished = tuple[UrbanConfig, dict[str, Any], list[str]]


def forecast_to(run_dir: Path, store: Path, region: str | None, split: str, out: Path, log) -> dict[str, Any]:
    return recipes.forecast(ForecastRequest(run_dir, store, region, split, out), log)


def train_quietly(config: UrbanConfig) -> dict[str, Any]:
    return train(config, lambda line: None)


def weights_of(folder: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in UrbanPG.from_pretrained(folder).state_dict().items()}


def losses(run: Path) -> list[tuple[str, int, float]]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(e["stage"], e["step"], e["loss"]) for e in entries if "loss" in e]


@pytest.fixture(scope="module")
def finished(city, make_config, tmp_path_factory) -> Finished:
    """The one run of UrbanPG that several tests look at."""
    config, said = make_config(city, tmp_path_factory.mktemp("runs")), list[str]()
    return config, train(config, said.append), said


# --- training ------------------------------------------------------------------------------------------------------


def test_a_run_from_configuration_to_report(finished, city):
    config, result, said = finished
    run = config.run_dir
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    assert metrics["contract"]["region"] == [0, 9] and metrics["contract"]["S"] == 6
    assert metrics["model"]["pooled"] == result["test"] and set(metrics["model"]["pooled"]) >= {"mae", "rmse", "mape"}
    assert metrics["stages"]["train"]["after"]["mae"] < metrics["stages"]["train"]["before"]["mae"]
    (cost,) = metrics["efficiency"]
    assert cost["parameters"] == cost["trained_parameters"] and cost["batch_size"] == 32 and cost["hardware"]
    assert cost["seconds_per_epoch"] > 0 and cost["peak_memory_bytes"] > 2**20
    assert {"persistence", "ridge", "mean by weekday and slot"} <= set(metrics["baselines"])
    assert "Time of day" in (run / "report" / "embeddings.json").read_text()
    with xarray.open_zarr(run / "forecasts" / "test.zarr") as forecasts:
        assert forecasts["forecast"].dims == ("origin", "step", "node")
    assert evaluate(run / "forecasts" / "test.zarr", city).to_json()["pooled"] == metrics["model"]["pooled"]
    assert any("MAE" in line for line in said)


def test_the_result_is_the_epoch_with_the_smallest_validation_error(finished):
    config, result, _ = finished
    entries = [json.loads(line) for line in (config.run_dir / "log.jsonl").read_text().splitlines()]
    errors = {e["step"]: e["metrics"]["mae"] for e in entries if e.get("event") == "evaluation"}
    assert result["stages"]["train"]["checkpoint"] == f"step-{min(errors, key=errors.get)}"
    assert len(errors) == 4, "before training, and behind each of three epochs"


def test_a_finished_run_is_not_trained_again(finished):
    config, result, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (config.run_dir / "checkpoints").rglob("*") if path.is_file()}
    assert train_quietly(config)["test"] == result["test"]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_stage_that_is_redone_leaves_no_forecasts_of_its_first_weights(finished, make_config, city, tmp_path):
    """What every message on a damaged checkpoint advises: delete the stage's folder."""
    config = make_config(city, tmp_path)
    shutil.copytree(finished[0].run_dir, config.run_dir)
    shutil.rmtree(config.run_dir / "checkpoints")
    old = config.run_dir / "forecasts" / "test.zarr" / "old"
    old.touch()
    train_quietly(config)
    assert old.parent.exists() and not old.exists()


def test_a_run_that_broke_off_ends_as_an_undisturbed_one(finished, make_config, city, tmp_path, monkeypatch):
    config, _, _ = finished
    again = make_config(city, tmp_path)
    whole_step, seen = ForecastStage.step, []

    def breaking(stage, step, backward):
        seen.append(step)
        if step == 8:
            raise ZeroDivisionError("the power went off")
        return whole_step(stage, step, backward)

    monkeypatch.setattr(ForecastStage, "step", breaking)
    with pytest.raises(ZeroDivisionError):
        train_quietly(again)
    monkeypatch.undo()
    train_quietly(again)
    assert max(seen) == 8 and losses(again.run_dir) == losses(config.run_dir)
    assert weights_of(result_of(again.run_dir, again)) == weights_of(result_of(config.run_dir, config))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_baselines_train_in_the_same_harness(make_config, city, tmp_path, kind):
    config = make_config(city, tmp_path, model={"kind": kind}, training={"max_epochs": 1}, data={"history": 12})
    result = train_quietly(config)
    stage = result["stages"]["train"]
    assert stage["after"]["mae"] < stage["before"]["mae"]
    noted = config.run_dir / "config.yaml"  # as runs of a kind used to note it, with UrbanPG's options
    noted.write_text(noted.read_text().replace(f"kind: {kind}\n", f"kind: {kind}\n  p: 0.1\n  stca: true\n"))
    refuse_foreign_folder(config, city.digest)
    again = tmp_path / "again.zarr"
    forecast_to(config.run_dir, city.path, None, "test", again, lambda line: None)
    assert evaluate(again, city).to_json()["pooled"] == result["test"]


@pytest.mark.parametrize("changes", [{"temporal": False}, {"spatial": False}, {"p": 0}, {"stca": False}])
def test_ablations_are_configuration(make_config, city, tmp_path, changes):
    dataset = open_dataset(make_config(city, tmp_path).data)
    model = make_config(city, tmp_path, model=changes).model.build(dataset, 0)
    specs = model.prompts.spec.model_dump() | model.backbone.spec.model_dump()
    whole = make_config(city, tmp_path).model.build(dataset, 0)
    assert specs == whole.prompts.spec.model_dump() | whole.backbone.spec.model_dump() | changes


def test_the_loss_is_the_mean_over_observed_points_alone(make_config, city, tmp_path):
    """Masked MAE in the data's units, on the windows that the sampler drew, against a loop over points."""
    config = make_config(city, tmp_path, model={"p": 0})
    dataset = open_dataset(config.data)
    model, learners = config.model.build(dataset, 0).train(), NodeLearners(9)
    stage = ForecastStage(
        "train", *(WindowForecasts(model, dataset.train, learners) for _ in range(2)), config.training, 5
    )
    back: list[torch.Tensor] = []
    scalars = stage.step(3, back.append)
    indices, _ = next(WindowForecasts(model, dataset.train, learners).sampler(32, seed=5).batches(0, 3 * 32))
    batch = dataset.train.read(indices)
    slot, weekday = model.prompts.calendar(city.local_times[batch.origin_index])
    made = model(torch.from_numpy(batch.history), slot, weekday).detach().numpy()
    errors = [
        abs(float(f) - float(t))
        for f, t, seen in zip(made.flat, batch.target.flat, batch.target_observed.flat, strict=True)
        if seen
    ]
    assert 0 < len(errors) < made.size, "some points are not observed"
    assert scalars["loss"] == pytest.approx(np.mean(errors), rel=1e-5) and back[0].item() == scalars["loss"]


def test_blocks_of_nodes_train_as_all_nodes_do(finished, make_config, city, tmp_path):
    config, _, _ = finished
    blocks = make_config(city, tmp_path, nodes={"block_nodes": 4})
    train_quietly(blocks)
    ours, theirs = (np.array([loss for *_, loss in losses(each.run_dir)]) for each in (blocks, config))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_span_without_two_weeks_has_one_kind_of_day(finished, make_config, make_city, tmp_path):
    """A weekday that training never saw would otherwise be forecast with a row that nobody taught."""
    config, _, said = finished
    assert "2024-03-04:2024-03-11 does not hold every weekday twice: to the model all days are one" in said
    model = UrbanPG.from_pretrained(result_of(config.run_dir, config))
    days = np.arange("2024-03-04", "2024-03-11", dtype="datetime64[D]").astype("datetime64[m]")
    assert model.prompts.calendar(days)[1].tolist() == [0] * 7
    assert "Day of week" not in (config.run_dir / "report" / "embeddings.json").read_text()
    longer = open_dataset(make_config(make_city(tmp_path / "longer.zarr", days=18), tmp_path).data)
    assert longer.holds_weeks
    assert config.model.build(longer, 0).prompts.calendar(days)[1].tolist() == [*range(7)]


# --- few-shot (Eq. 8) ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_shot(finished, small_city, make_config, tmp_path_factory) -> Finished:
    config, said = finished[0], list[str]()
    changes = {"recipe": "few-shot", "few_shot": {"backbone": str(config.run_dir)}, "data": {"fraction": 0.25}}
    prompted = make_config(small_city, tmp_path_factory.mktemp("runs"), **changes, model={"d": None})
    return prompted, train(prompted, said.append), said


def test_few_shot_fits_prompts_on_a_frozen_backbone(few_shot, finished, small_city):
    config, _, said = few_shot
    given = UrbanPG.from_pretrained(result_of(finished[0].run_dir, finished[0]), "toy-town")
    fitted = UrbanPG.from_pretrained(result_of(config.run_dir, config), "hamlet")
    for name, weight in given.backbone.state_dict().items():
        assert weight.numpy().tobytes() == fitted.backbone.state_dict()[name].numpy().tobytes()
    size = sum(weight.nbytes for weight in given.backbone.parameters())
    assert any(f"{size:,} bytes of frozen weights" in line for line in said)
    metrics = json.loads((config.run_dir / "report" / "metrics.json").read_text())
    (cost,) = metrics["efficiency"]
    assert cost["parameters"] - cost["trained_parameters"] == size // 4
    assert metrics["stages"]["prompts"]["after"]["mae"] < metrics["stages"]["prompts"]["before"]["mae"]
    days = {each.first_day + ":" + each.last_day for each in load_backbone(config.run_dir)[1]}
    assert days == {"2024-03-04:2024-03-11", "2024-03-04:2024-03-05"}, "the backbone's days and the quarter's"


def test_frozen_weights_that_changed_end_the_run(few_shot, make_config, small_city, tmp_path, monkeypatch):
    """By a single bit, in the stage's result."""
    whole_step = ForecastStage.step

    def touching(stage, step, backward):
        scalars = whole_step(stage, step, backward)
        stage._train.model.backbone.embed.bias.data.view(torch.int32)[0] ^= 1
        return scalars

    changes = few_shot[0].model_dump(mode="json", include={"recipe", "few_shot"})
    config = make_config(
        small_city, tmp_path, **changes, model={"d": None}, data={"fraction": 0.25}, training={"max_epochs": 1}
    )
    monkeypatch.setattr(ForecastStage, "step", touching)
    with pytest.raises(RuntimeError, match=r"frozen weights are not in .* as they were"):
        train_quietly(config)


def test_a_run_killed_between_forecasts_and_their_speed_is_reported(finished, city, tmp_path):
    config = finished[0].model_copy(update={"output_dir": tmp_path})
    shutil.copytree(finished[0].run_dir, config.run_dir)
    (config.run_dir / "forecasts" / "written.json").unlink()
    assert train_quietly(config)["test"] == finished[1]["test"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model": {"d": 16}}, ["model.d is 16 and the backbone's is 8"]),
        ({"model": {"stca": False}}, ["model.stca is False and the backbone's is True"]),
        ({"model": {"stca_normalizer": "sum"}}, ["model.stca_normalizer is sum and the backbone's is none"]),
        ({"model": {"residual": False}}, ["model.residual is False and the backbone's is True"]),
        ({"data": {"history": 5}}, ["data.history is 5 and the backbone's is 6"]),
        ({"few_shot": {"backbone": "/nowhere/at/all"}}, ["/nowhere/at/all does not exist", "urbanpg-train"]),
    ],
)
def test_a_backbone_that_does_not_fit(few_shot, make_config, small_city, tmp_path, changes, parts, refused):
    config = few_shot[0]
    base = {"recipe": "few-shot", "few_shot": config.few_shot.model_dump(mode="json"), "model": {"d": None}}
    tree = {key: base.get(key, {}) | value if isinstance(value, dict) else value for key, value in changes.items()}
    refused(lambda: train_quietly(make_config(small_city, tmp_path, **(base | tree))), *parts)
    assert list(tmp_path.iterdir()) == []


# --- continual (Eq. 9–10) ------------------------------------------------------------------------------------------

PERIODS = [
    {"train": ["2024-03-04", "2024-03-06"], "nodes": 4},
    {"train": ["2024-03-08", "2024-03-10"], "nodes": 6},
    {"train": ["2024-03-12", "2024-03-13"], "nodes": 9},
]
for _period in PERIODS:
    _last = np.datetime64(_period["train"][1])
    _period |= {name: [str(_last + day)] * 2 for name, day in (("validation", 1), ("test", 2))}


@pytest.mark.parametrize("trained", [(), ("train_backbone", "train_old_rows")])
def test_continual_learning_keeps_what_it_froze(make_config, city, tmp_path, trained):
    continual = {"periods": PERIODS, **dict.fromkeys(trained, True)}
    config = make_config(city, tmp_path, recipe="continual", continual=continual, training={"max_epochs": 2})
    result = train_quietly(config)
    assert list(result["stages"]) == ["period-1", "period-2", "period-3"]
    folders = [
        config.run_dir / "checkpoints" / name / summary["checkpoint"] for name, summary in result["stages"].items()
    ]
    weights = [weights_of(folder) for folder in folders]
    backbone = [{name: w for name, w in each.items() if name.startswith("backbone.")} for each in weights]
    rows = [each["prompts.node_rows.0"] for each in weights]
    assert (backbone[0] == backbone[1] == backbone[2]) is not bool(trained)
    assert (rows[0] == rows[1] == rows[2]) is not bool(trained)
    assert UrbanPG.from_pretrained(folders[2]).prompts.spec.periods == (4, 2, 3)
    metrics = json.loads((config.run_dir / "report" / "metrics.json").read_text())
    (table,) = metrics["tables"]
    assert [row[:3] for row in table["rows"]] == [["1", 4, 4], ["2", 6, 2], ["3", 9, 3]]
    before, after = table["rows"][1][3:5]
    assert before > 0 and after > 0 and table["rows"][2][6] == pytest.approx(metrics["model"]["pooled"]["mae"])
    assert len(metrics["efficiency"]) == 3
    assert any("frozen weights" in note for note in metrics["notes"]) is not bool(trained)


# --- forecasts -----------------------------------------------------------------------------------------------------


def test_forecasts_of_some_nodes_are_those_of_all(finished, city, tmp_path):
    """Their history is all nodes': attention reads them all."""
    config = finished[0]
    forecast_to(config.run_dir, city.path, "3:5", "test", tmp_path / "some.zarr", lambda line: None)
    with (
        xarray.open_zarr(tmp_path / "some.zarr") as some,
        xarray.open_zarr(config.run_dir / "forecasts" / "test.zarr") as everywhere,
    ):
        np.testing.assert_allclose(some["forecast"], everywhere["forecast"][:, :, 3:5], rtol=1e-6)
        assert some["cell"].values.tolist() == ["s3", "s4"]


def test_forecasts_that_do_not_fit(finished, city, small_city, make_city, tmp_path, refused):
    config, out = finished[0], tmp_path / "x.zarr"

    def forecast(store: GridStore, region: str | None = None) -> None:
        forecast_to(config.run_dir, store.path, region, "test", out, lambda line: None)

    refused(lambda: forecast(small_city), "5 nodes, ids s0 to s4", "the 9 that", "ids s0 to s8", "few-shot")
    refused(lambda: forecast(city, "5:12"), "node range 5:12 leaves the 9 nodes")
    assert list(tmp_path.iterdir()) == []
    unfinished = tmp_path / "unfinished"
    shutil.copytree(config.run_dir, unfinished)
    (unfinished / "checkpoints" / "train" / "finished.json").unlink()
    refused(lambda: forecast_to(unfinished, city.path, None, "test", out, print), "has not finished its stage")


def test_forecasts_of_another_cadence(finished, city, tmp_path, refused):
    from data_prep import READERS, prepare

    np.savez(tmp_path / "halves.npz", np.random.default_rng(0).random((6 * 48, 9, 1), np.float32))
    (tmp_path / "ids.txt").write_text("\n".join(city.cell_ids))
    options = {"start": "2024-03-04T00:00", "cadence": 30, "channels": "flow", "node_ids": tmp_path / "ids.txt"}
    store = prepare(READERS["zones-npz"].plan([tmp_path / "halves.npz"], **options), tmp_path / "halves.zarr").path
    out = tmp_path / "x.zarr"
    refused(
        lambda: forecast_to(finished[0].run_dir, store, None, "test", out, lambda line: None),
        "has a value every 30 min, prompts 'toy-town' are of 60 min",
        "few-shot",
    )
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("x.")]


# --- bad input -----------------------------------------------------------------------------------------------------


def test_nodes_that_join_later_are_named(make_city, make_config, tmp_path, refused):
    late = make_city(tmp_path / "late.zarr", late=4)
    runs = tmp_path / "runs"
    refused(lambda: train_quietly(make_config(late, runs)), "node 4 (id s4) on 2024-03-06", "continual")
    assert not runs.exists()
    nodes = make_config(late, runs, data={"region": "0:4"}, training={"max_epochs": 1})
    assert open_dataset(nodes.data).nodes.region == NodeRange(0, 4)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"data": {"region": "0:20"}}, ["node range 0:20 leaves the 9 nodes"]),
        ({"data": {"channel": "speed"}}, ["no channel 'speed'", "flow"]),
        (
            {"training": {"train_batch_size": 100_000}},
            ["183 windows of the training days", "training.train_batch_size 100000; lower it"],
        ),
        ({"model": {"kind": "stid", "p": 0.2}}, ["p is UrbanPG's, and kind is stid"]),
        ({"model": {"kind": "rnn"}}, ["model.kind", "stgcn"]),
        ({"recipe": "few-shot"}, ["recipe few-shot and the key few_shot go together"]),
        ({"recipe": "urbanpg-trian"}, ["recipe 'urbanpg-trian' is none", "urbanpg-train"]),
        ({"nodes": {"ranks": 2}}, ["learners.num_workers 1 is no multiple of nodes.ranks 2"]),
        ({"training": {"epochs": 3}}, ["unknown key 'training.epochs'", "max_epochs"]),
    ],
)
def test_input_that_cannot_be_trained_on(make_config, city, tmp_path, changes, parts, refused):
    refused(lambda: train_quietly(make_config(city, tmp_path, **changes)), *parts)
    assert list(tmp_path.iterdir()) == []
