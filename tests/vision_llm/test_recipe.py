"""ST-Vision-LLM from a configuration to a scored forecast, on a tiny city, a few steps a stage."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import xarray
import yaml

from data_prep import READERS
from stdist.data import GridStore, open_store
from stdist.errors import InputError
from stdist.evaluation import evaluate
from stdist.runs import recipes
from stdist.runs.forecast_request import ForecastRequest
from stdist.runs.recipes import parse_config, train
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm import Policy
from stdist.vision_llm.config import RolloutsConfig, VisionLLMConfig
from stdist.vision_llm.dataset import open_dataset, policy_spec
from stdist.vision_llm.policy.checkpoints import load_policy
from stdist.vision_llm.predictor import PolicyPredictor
from stdist.vision_llm.recipe import VisionLLMRecipe
from stdist.vision_llm.run import NOTHING_GAINED
from stdist.vision_llm.stages.grpo import GRPOStage
from stdist.vision_llm.stages.sft import SFTStage

STAGES = {"alignment": 2, "arithmetic": 2, "sft": 4, "grpo": 4}


def forecast_to(run_dir: Path, store: Path, region: str | None, split: str, out: Path, log) -> dict[str, Any]:
    return recipes.forecast(ForecastRequest(run_dir, store, region, split, out), log)


def config_of(store: GridStore, output_dir: Path, **changes: Any) -> VisionLLMConfig:
    few = {"warmup_steps": 1, "logging_steps": 1, "save_steps": 2, "eval_steps": 4}
    numbers = {
        **few,
        "trainable": "full",
        "train_batch_size": 4,
        "values_per_example": 1,
        "eval_examples": 1,
    }
    windows = {**few, "windows_per_step": 2, "cells_per_window": 2, "eval_windows": 2, "learning_rate": 1e-3}
    tree = {
        "name": "tiny",
        "output_dir": str(output_dir),
        "data": {"store": str(store.path), "history": 4, "horizon": 3, "region": "1:4,1:3"},
        "numerals": {"mantissa_digits": 2},
        "frames": {"pixels_per_cell": 12},
        "policy": {"base": "tiny", "lora_r": 2},
        "alignment": {**numbers, "max_steps": STAGES["alignment"]},
        "arithmetic": {**numbers, "max_steps": STAGES["arithmetic"]},
        "sft": {**windows, "max_steps": STAGES["sft"]},
        "grpo": {**windows, "max_steps": STAGES["grpo"], "num_generations": 2, "num_iterations": 2},
        "forecast": {"windows_per_batch": 8},
    }
    return parse_config(tree | changes, where="test")


def quiet(line: str) -> None:
    pass


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def trained_losses(run: Path) -> list[tuple[str, int, float]]:
    return [(entry["stage"], entry["step"], entry["loss"]) for entry in logged(run) if "loss" in entry]


@pytest.fixture(scope="module")
def config(store: GridStore, tmp_path_factory: pytest.TempPathFactory) -> VisionLLMConfig:
    return config_of(store, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def result(config: VisionLLMConfig) -> dict[str, Any]:
    """The one whole run that the tests below look at."""
    return train(config, quiet)


@pytest.fixture(scope="module")
def run(config: VisionLLMConfig, result: dict[str, Any]) -> Path:
    return config.run_dir


@pytest.fixture(scope="module")
def other_city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another grid, 7×6, of six hourly days."""
    out = tmp_path_factory.mktemp("other") / "other.zarr"
    READERS["synthetic"].prepare([], out, city="elsewhere", height=7, width=6, days=6, cadence=60, seed=8)
    return out


def test_run_folder(run: Path, result: dict[str, Any]) -> None:
    for stage, steps in STAGES.items():
        folder = run / "checkpoints" / stage
        assert (folder / (folder / "latest").read_text().strip() / "trainer_state").is_dir()
        assert json.loads((folder / "finished.json").read_text())["steps"] == steps
        assert (run / "tensorboard" / stage).is_dir()
    assert not list(run.rglob("*.partial"))
    assert (run / "report" / "index.html").stat().st_size > 1000
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    assert metrics["model"]["pooled"] == result["test"]
    assert set(metrics["stages"]) == set(STAGES) and "persistence" in str(metrics["baselines"])
    assert metrics["contract"]["region"] == [1, 4, 1, 3] and metrics["contract"]["K"] == 3
    assert metrics["tables"][0]["title"] == "GRPO's rollouts, 4 logged steps"


@pytest.mark.parametrize("kept", ["step-0", "step-2"])
def test_the_report_says_so_where_grpo_gained_nothing(store: GridStore, tmp_path: Path, kept: str) -> None:
    class Trained:
        group = ProcessGroup()

        def checkpoints(self, stage: str) -> None:
            """Of stages that no other run gives: they are not looked at."""

        def fit(self, *_: object, **__: object) -> dict[str, str]:
            return {"checkpoint": kept}

    opened = VisionLLMRecipe().open(config_of(store, tmp_path), ProcessGroup())
    opened.fit("sft", Trained())  # type: ignore[arg-type]
    assert opened.notes == []
    opened.fit("grpo", Trained())  # type: ignore[arg-type]
    assert opened.notes == ([NOTHING_GAINED] if kept == "step-0" else [])


def test_every_step_is_logged_once_and_evaluations_stand_at_both_ends(run: Path, result: dict[str, Any]) -> None:
    assert [(s, n) for s, n, _ in trained_losses(run)] == [(s, n + 1) for s, k in STAGES.items() for n in range(k)]
    for stage, steps in STAGES.items():
        evaluations = [e for e in logged(run) if e["stage"] == stage and e.get("event") == "evaluation"]
        assert [e["step"] for e in evaluations] == [0, steps]
        assert evaluations[0]["metrics"] == result["stages"][stage]["before"]


def test_test_forecasts_are_of_the_region_and_scored(run: Path, store: GridStore, result: dict[str, Any]) -> None:
    forecast = xarray.open_zarr(run / "forecasts" / "test.zarr")["forecast"]
    windows = store.windows("test", 4, 3, channel="internet")
    assert forecast.dims == ("origin", "step", "row", "col") and forecast.shape == (len(windows), 3, 3, 2)
    assert np.array_equal(forecast["origin"].values.astype("datetime64[ns]"), windows.origin_times)
    assert np.isfinite(forecast.values).all()
    assert np.array_equal(forecast["cell"].values, store.cell_ids[1:4, 1:3])
    scores = evaluate(run / "forecasts" / "test.zarr", store).to_json()
    assert scores["pooled"] == result["test"]


def test_forecasts_are_the_final_checkpoints_own(run: Path, config: VisionLLMConfig, store: GridStore) -> None:
    """One window, one cell, by the notebook's call on the checkpoint that the run names."""
    final = run / "checkpoints" / "grpo"
    checkpoint = json.loads((final / "finished.json").read_text())["checkpoint"]
    policy = Policy.from_pretrained(final / checkpoint)
    forecast = xarray.open_zarr(run / "forecasts" / "test.zarr")["forecast"]
    origin = store.windows("test", 4, 3, channel="internet").origins[5]
    frames = store.values("internet", origin - 3, origin + 1)
    ours = policy.forecast(frames, [(2, 1), (3, 2)], store.local_times[origin])
    assert np.allclose(ours, [forecast.values[5, :, 1, 0], forecast.values[5, :, 2, 1]])


def test_the_log_says_what_every_stage_was_trained_with(run: Path) -> None:
    starts = [entry for entry in logged(run) if entry.get("event") == "start"]
    assert [(entry["stage"], entry["step"]) for entry in starts] == [(stage, 0) for stage in STAGES]
    assert all(entry["device"] == "cpu" and entry["attention"].startswith("sdpa: agrees") for entry in starts)
    trained = [entry for entry in logged(run) if entry["stage"] in ("sft", "grpo") and "loss" in entry]
    assert all(entry["tokens"] > 0 and entry["tokens_saved"] >= 0 for entry in trained)


def test_the_same_command_again_trains_nothing(run: Path, config: VisionLLMConfig, result: dict[str, Any]) -> None:
    log = (run / "log.jsonl").read_text()
    forecasts = (run / "forecasts" / "test.zarr" / "zarr.json").stat().st_mtime_ns
    again = train(config, quiet)
    assert (run / "log.jsonl").read_text() == log
    assert (run / "forecasts" / "test.zarr" / "zarr.json").stat().st_mtime_ns == forecasts
    assert again == result


def test_another_config_is_refused_by_the_key_that_differs(run: Path, config: VisionLLMConfig) -> None:
    before = (run / "config.yaml").read_text()
    sft = config.sft.model_copy(update={"learning_rate": 0.5})
    with pytest.raises(InputError, match=r"sft\.learning_rate is 0\.001 there, 0\.5 here"):
        train(config.model_copy(update={"sft": sft}), quiet)
    assert (run / "config.yaml").read_text() == before


def test_a_folder_from_before_an_option_goes_on_with_its_default(
    run: Path, config: VisionLLMConfig, result: dict[str, Any]
) -> None:
    """Who samples may change, how far ahead may not; another default than the run's is another training."""
    tree = yaml.safe_load((run / "config.yaml").read_text())
    del tree["rollouts"], tree["grpo"]["candidates"]
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    changed = {"rollouts": RolloutsConfig(num_workers=2)}
    assert VisionLLMRecipe().check(config.model_copy(update=changed), ProcessGroup())
    ahead = {"rollouts": RolloutsConfig(max_staleness=1)}
    with pytest.raises(InputError, match=r"rollouts\.max_staleness is 0 there, 1 here"):
        VisionLLMRecipe().check(config.model_copy(update=ahead), ProcessGroup())
    direct = {"grpo": config.grpo.model_copy(update={"candidates": "direct"})}
    with pytest.raises(InputError, match=r"grpo\.candidates is 'chain' there, 'direct' here"):
        VisionLLMRecipe().check(config.model_copy(update=direct), ProcessGroup())
    assert train(config, quiet) == result


def test_other_data_at_the_same_path_is_refused(run: Path, config: VisionLLMConfig) -> None:
    digest = (run / "store_digest").read_text()
    (run / "store_digest").write_text("0" * 64)
    try:
        with pytest.raises(InputError, match=rf"trained on other data, of digest 0{{12}}…, and .* has {digest[:12]}…;"):
            train(config, quiet)
    finally:
        (run / "store_digest").write_text(digest)


def test_a_killed_run_resumes_to_the_same_losses(
    run: Path, store: GridStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed twice between checkpoints, in fine-tuning and between two updates on one rollout of GRPO: log, forecasts
    and scores are those of ``run``."""
    config = config_of(store, tmp_path)
    for stage, name, last in ((SFTStage, "sft", 3), (GRPOStage, "grpo", 3)):
        step = stage.step

        def dying(self: Any, number: int, backward: Any, step: Any = step, last: int = last) -> dict[str, float]:
            if number == last:
                raise KeyboardInterrupt
            return step(self, number, backward)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(stage, "step", dying)
            train(config, quiet)
        assert trained_losses(config.run_dir)[-1][:2] == (name, last)
    assert not (config.run_dir / "forecasts").exists()
    resumed = train(config, quiet)
    assert trained_losses(config.run_dir) == trained_losses(run)
    ours, theirs = (xarray.open_zarr(r / "forecasts" / "test.zarr")["forecast"].values for r in (config.run_dir, run))
    assert np.array_equal(ours, theirs)
    assert resumed["test"] == json.loads((run / "report" / "metrics.json").read_text())["model"]["pooled"]


# --- stdist forecast ---------------------------------------------------------------------------------------------


def test_forecast_another_citys_grid(run: Path, other_city: Path, tmp_path: Path) -> None:
    """.zarr and .parquet hold the same values, of the region asked for, with the store's own cell ids."""
    outs = [tmp_path / "there.zarr", tmp_path / "there.parquet"]
    for out in outs:
        summary = forecast_to(run, other_city, "2:4,3:6", "test", out, quiet)
        assert summary["windows"] == 22
    zarr = xarray.open_zarr(outs[0])["forecast"]
    assert zarr.shape == (22, 3, 2, 3) and zarr["row"].values.tolist() == [2, 3] and np.isfinite(zarr.values).all()
    table = pl.read_parquet(outs[1])
    assert table.columns == ["origin", "target", "target_local", "cell", "step", "forecast"]
    assert len(table) == 22 * 3 * 2 * 3
    row = table.filter((pl.col("step") == 3) & (pl.col("cell") == int(zarr["cell"].values[1, 2])))
    assert np.allclose(row.sort("origin")["forecast"].to_numpy(), zarr.values[:, 2, 1, 2])
    assert ((row["target"] - row["origin"]).dt.total_hours() == 3).all()


def test_a_policy_on_another_store_is_told_its_city_cadence_and_grid(
    run: Path, config: VisionLLMConfig, store: GridStore, other_city: Path, tmp_path: Path, monkeypatch
) -> None:
    """t_max, in the data's units, is that of the other store's training days; on its own data the policy's."""
    half_hourly = tmp_path / "half.zarr"
    READERS["synthetic"].prepare([], half_hourly, city="half", height=4, width=4, days=6, cadence=30, seed=8)
    seen = []

    def spy(windows: Any, vocabulary: Any, clamp: bool) -> None:
        raise InputError("enough")

    check = PolicyPredictor.check

    def noting(predictor: PolicyPredictor, windows: Any) -> list[str]:
        try:
            return check(predictor, windows)
        finally:
            seen.append((predictor.policy.spec, {item.what: item.span for item in predictor.fitted}))

    monkeypatch.setattr("stdist.vision_llm.predictor.find_unwritable", spy)
    monkeypatch.setattr(PolicyPredictor, "check", noting)
    for path in (other_city, half_hourly, store.path):
        with pytest.raises(InputError, match="enough"):
            forecast_to(run, path, "0:1,0:1", "test", tmp_path / "x.zarr", quiet)
    trained = load_policy(next((run / "checkpoints" / "sft").glob("step-*"))).spec
    specs = [spec for spec, _ in seen]
    assert [(s.setting.city, s.setting.cadence) for s in specs[:2]] == [("elsewhere", 60), ("half", 30)]
    assert [(s.frames.height, s.frames.width) for s in specs[:2]] == [(7, 6), (4, 4)]
    for path, (spec, fitted) in zip((other_city, half_hourly), seen, strict=False):
        other = open_store(path)
        span = other.default_split.named("train")
        steps = other.step_range(span)
        largest = other.values("internet", *steps)[other.observed("internet", *steps)].max()
        assert spec.frames.t_max == pytest.approx(float(largest)) and spec.frames.t_max != trained.frames.t_max
        assert str(fitted["t_max of the frames"]) == str(span) and "weights" in fitted
    assert specs[2].frames.t_max == trained.frames.t_max


def test_training_days_of_another_city_are_forecast_with_the_policys_t_max(run: Path, other_city: Path) -> None:
    """Else what was fitted on them would be scored on them."""
    store, checkpoint = open_store(other_city), next((run / "checkpoints" / "sft").glob("step-*"))
    span = store.default_split.named("train")
    predictor = PolicyPredictor(load_policy(checkpoint), recipes.read_run_config(run))
    own = predictor.policy.spec.frames.t_max
    request = ForecastRequest(run, other_city, "0:1,0:1", "test", Path("x.zarr"))
    region, grid = predictor.regions(store, request, quiet)
    for name, kept in (("train", True), ("test", False)):
        predictor.regions(store, request, quiet)
        notes = predictor.check(store.windows(name, 4, 3, channel="internet", region=region, history_region=grid))
        assert (predictor.policy.spec.frames.t_max == own) is kept
        assert notes == [] if kept else "t_max of the frames" in notes[0] and str(span) in notes[0]


def test_forecast_quantiles_where_candidates_are_sampled(
    run: Path, config: VisionLLMConfig, store: GridStore, tmp_path: Path
) -> None:
    text = (run / "config.yaml").read_text()
    try:
        sampled = text.replace("decoding: median", "decoding: sample").replace(
            "num_generations: 1\n", "num_generations: 5\n"
        )
        (run / "config.yaml").write_text(sampled)
        forecast_to(run, store.path, "1:2,1:3", "validation", tmp_path / "q.zarr", quiet)
    finally:
        (run / "config.yaml").write_text(text)
    data = xarray.open_zarr(tmp_path / "q.zarr")
    quantiles = data["forecast"]
    assert quantiles["quantile"].values.tolist() == [0.1, 0.5, 0.9]
    low, middle, high = quantiles.values
    assert (low <= middle).all() and (middle <= high).all() and (low < high).any()
    assert np.allclose(data["point"].values, middle)


@pytest.mark.parametrize(
    ("region", "split", "out", "message"),
    [
        ("0:9,0:2", "test", "x.zarr", "leaves the grid of 5 rows x 4 columns"),
        ("3", "test", "x.zarr", "is not r0:r1,c0:c1"),
        (None, "holiday", "x.zarr", "holiday"),
        (None, "2020-01-01:2020-01-02", "x.zarr", "leaves the days"),
        (None, "test", "x.txt", "txt"),
    ],
)
def test_forecast_refuses_in_one_line(
    run: Path, store: GridStore, tmp_path: Path, region: str | None, split: str, out: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        forecast_to(run, store.path, region, split, tmp_path / out, quiet)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_forecast_of_an_unfinished_or_absent_run_is_refused(store: GridStore, tmp_path: Path, run: Path) -> None:
    with pytest.raises(InputError, match="no run folder"):
        forecast_to(tmp_path, store.path, None, "test", tmp_path / "x.zarr", quiet)
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(InputError, match="has not finished its stage grpo"):
        forecast_to(tmp_path, store.path, None, "test", tmp_path / "x.zarr", quiet)


# --- what a config asks for --------------------------------------------------------------------------------------


def test_nothing_is_written_for_bad_input(store: GridStore, tmp_path: Path) -> None:
    data = {"store": str(store.path), "history": 4, "horizon": 3}
    for changes, message in (
        ({"data": data | {"region": "0:6,0:4"}}, "leaves the grid"),
        ({"data": data | {"channel": "speed"}}, "no channel 'speed'"),
        ({"data": data | {"horizon": 200}}, "no window fits"),
        ({"policy": {"base": str(tmp_path / "nowhere")}}, "nowhere"),
    ):
        with pytest.raises(InputError, match=message):
            train(config_of(store, tmp_path / "runs", **changes), quiet)
    assert not (tmp_path / "runs").exists()


def test_a_config_without_stages_is_refused(store: GridStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stages"):
        train(config_of(store, tmp_path, stages=[]), quiet)


@pytest.mark.parametrize(
    ("changes", "base_is_trained"),
    [
        ({}, True),
        ({"stages": ["sft", "grpo"], "policy": {"base": "a/hub-name"}}, False),
        ({"stages": ["alignment"], "policy": {"base": "a/hub-name"}}, True),
        ({"stages": ["sft"]}, True),  # nobody can download a preset
    ],
)
def test_spec_says_what_the_task_and_the_config_say(
    store: GridStore, tmp_path: Path, changes: dict[str, Any], base_is_trained: bool
) -> None:
    config = config_of(store, tmp_path, **changes)
    spec = policy_spec(config, open_dataset(config))
    assert spec.base_is_trained == base_is_trained
    assert (spec.setting.city, spec.setting.cadence, spec.setting.history) == ("toy", 60, 4)
    statistics = store.statistics("internet", store.default_split.train)
    assert spec.frames is not None and spec.frames.t_max == statistics.maximum
    blind = policy_spec(config_of(store, tmp_path, frames={"enabled": False}), open_dataset(config))
    assert blind.frames is None


def test_few_shot_fits_on_the_first_days_alone(store: GridStore, tmp_path: Path) -> None:
    """docs/decisions.md, splits: windows, t_max and cell means come from the fraction; validation and test stay."""
    data = {"store": str(store.path), "history": 4, "horizon": 3}
    task = open_dataset(config_of(store, tmp_path, data=data | {"fraction": 0.25}))
    whole = open_dataset(config_of(store, tmp_path, data=data))
    assert len(task.train.span) == 1 and len(whole.train.span) == 4
    assert task.statistics.count == task.store.observed("internet", 0, 24).sum()
    assert task.statistics.maximum <= whole.statistics.maximum
    assert len(task.test) == len(whole.test) and len(task.validation) == len(whole.validation)


@pytest.mark.parametrize("published", [True, False])
def test_lora_on_a_base_that_stays_as_it_is(store: GridStore, base: Path, tmp_path: Path, published: bool) -> None:
    """Rows, then LoRA, then GRPO's second adapter. A published base is named, a preset's carried along; what the final
    checkpoint forecasts is what the run forecast, whatever the seed."""
    rows = {"trainable": "rows", "max_steps": 1, "train_batch_size": 2, "values_per_example": 1}
    few = {"windows_per_step": 1, "cells_per_window": 2, "eval_windows": 1, "max_steps": 1}
    config = config_of(
        store,
        tmp_path,
        seed=3,
        policy={"base": str(base) if published else "tiny", "lora_r": 2},
        alignment=rows | {"eval_examples": 1},
        stages=["alignment", "sft", "grpo"] if published else ["sft"],
        sft=few,
        grpo=few | {"num_generations": 2},
        forecast={"decoding": "direct"},
    )
    train(config, quiet)
    folder = config.run_dir / "checkpoints" / config.stages[-1]
    checkpoint = folder / json.loads((folder / "finished.json").read_text())["checkpoint"]
    assert (checkpoint / "adapter").is_dir() and (checkpoint / "model.safetensors").exists() != published
    out = tmp_path / "again.zarr"
    forecast_to(config.run_dir, store.path, None, "test", out, quiet)
    ours, theirs = (xarray.open_zarr(p)["forecast"].values for p in (out, config.run_dir / "forecasts" / "test.zarr"))
    assert np.array_equal(ours, theirs)
