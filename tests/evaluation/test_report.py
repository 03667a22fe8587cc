"""The report holds the numbers of its metrics, says where the model loses, and what is missing."""

import json
import re
import runpy
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from stdist.data import NodeRange, Region
from stdist.errors import InputError
from stdist.evaluation import (
    Embeddings,
    Projection,
    build_report,
    figures,
    report,
    score_baselines,
    write_embeddings,
    write_metrics,
)
from stdist.evaluation.figures import horizon_curves, node_errors, smoothed
from stdist.evaluation.figures import projections as draw_projections
from stdist.evaluation.report import change, memory, percent, readable, representative_cells, verdict
from stdist.evaluation.run_files import RunMetrics, read_embeddings, read_log, read_metrics

from .conftest import make_forecasts, score, write_forecasts, write_nodes


@pytest.fixture
def laid_out(as_people_see_them, monkeypatch):
    monkeypatch.setattr(figures, "page_figure", as_people_see_them["page_figure"])
    monkeypatch.setattr(report, "DOTS_PER_INCH", as_people_see_them["DOTS_PER_INCH"])


@pytest.fixture
def metrics(store):
    """Of forecasts a little off the truth, so that every baseline is beaten."""
    windows = store.windows("test", 6, 4, channel="flow", region=Region(0, 4, 0, 3))
    scores = score(make_forecasts(windows, error=1.0), store).to_json()
    contract = scores.pop("contract")
    stages = {
        "sft": {"before": {"nrmse": 1.25}, "after": {"nrmse": 0.5}, "summary": "Learns the day."},
        "grpo": {"before": {"nrmse": 0.5}, "after": {"nrmse": 0.45}, "summary": "Gains a tenth."},
    }
    return {
        "contract": contract,
        "model": scores,
        "baselines": score_baselines(store, "train", windows),
        "stages": stages,
        "notes": ["12 values clipped <at> t_max"],
    }


@pytest.fixture
def run_dir(tmp_path, store, metrics):
    run = tmp_path / "runs" / "toy-run"
    windows = store.windows("test", 6, 4, channel="flow", region=Region(0, 4, 0, 3))
    write_forecasts(make_forecasts(windows, error=1.0, quantiles=True), run / "forecasts" / "test.zarr")
    (run / "config.yaml").write_text(f"data:\n  store: {store.path}\nseed: 11\n")
    lines = [
        {"stage": "sft", "step": s, "loss": 3.0 / s, "learning_rate": 1e-3, "time": 1.7e9 + s} for s in range(1, 30)
    ]
    lines.append({"stage": "sft", "step": 29, "event": "evaluation", "metrics": {"nrmse": 0.5}})
    lines += [{"stage": "grpo", "step": s, "loss": 0.01, "reward": 0.4, "kl": 0.0} for s in range(1, 5)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_metrics(run, metrics)
    return run


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"data:image[^\"]+", "", page.read_text())))


def test_the_page_holds_the_numbers(run_dir, metrics):
    text = text_of(build_report(run_dir))
    for scores in (metrics["model"], *metrics["baselines"].values()):
        for convention in ("pooled", "mean_of_horizons"):
            for error in ("mae", "rmse", "nrmse"):
                assert readable(scores[convention][error]) in text
            assert percent(scores[convention]["mape"]) in text
    ridge = metrics["model"]["pooled"]["nrmse"] / metrics["baselines"]["ridge"]["pooled"]["nrmse"]
    assert f"{ridge:.3f}" in text
    assert "toyville" in text and "vehicles" in text and metrics["contract"]["store_digest"] in text
    assert "Learns the day." in text and "-60.0 %" in text and "Gains a tenth." in text
    assert "12 values clipped &lt;at&gt; t_max" in text, "autoescaped"
    assert "seed: 11" in text
    assert "The model beats every baseline (5)" in text


def test_the_page_is_self_contained_and_its_figures_are_files_too(laid_out, run_dir):
    page = build_report(run_dir)
    assert page == run_dir / "report" / "index.html"
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page.read_text())
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    names = {
        "horizons", "error-map", "training-sft", "training-grpo",
        "forecast-largest-cell", "forecast-median-cell", "forecast-small-cell",
    }  # fmt: skip
    files = {path.stem: path.read_bytes() for path in (run_dir / "report" / "figures").iterdir()}
    assert set(files) == names and len(sources) == len(names)
    for data in files.values():
        width, height = struct.unpack(">II", data[16:24])
        assert data[:4] == b"\x89PNG" and width > 1000 and height > 300


@pytest.fixture
def node_run(tmp_path):
    """A run on nodes; the function takes the places of the ten of them, if they are known."""

    def make(**places):
        store = write_nodes(tmp_path / "sensors.zarr", **places)
        run, windows = tmp_path / "run", store.windows("test", 6, 4, channel="flow", region=NodeRange(1, 10))
        forecasts = make_forecasts(windows, error=1.0)
        write_forecasts(forecasts, run / "forecasts" / "test.zarr")
        (run / "config.yaml").write_text(f"data:\n  store: {store.path}\n")
        scores = score(forecasts, store).to_json()
        metrics = {
            "contract": scores.pop("contract"),
            "model": scores,
            "baselines": score_baselines(store, "train", windows),
            "efficiency": [
                {
                    "name": "pre-training", "parameters": 123456, "trained_parameters": 23456, "batch_size": 64,
                    "hardware": "2 cores", "seconds_per_epoch": 12.5, "peak_memory_bytes": 3 * 2**29,
                }
            ],
            "tables": [{"title": "Old nodes", "columns": ["period", "MAE"], "rows": [["2024", 1.25], ["<5>", None]]}],
        }  # fmt: skip
        write_metrics(run, metrics)
        return run, metrics

    return make


@pytest.mark.parametrize("known", [True, False], ids=["places", "no places"])
def test_a_run_on_nodes(laid_out, node_run, known):
    rng = np.random.default_rng(0)
    places = {"latitude": rng.uniform(32, 33, 10), "longitude": rng.uniform(-118, -117, 10)} if known else {}
    run, metrics = node_run(**places)
    text = text_of(page := build_report(run))
    assert "Largest node" in page.read_text() and "No figures of forecasts" not in text
    for scores in (metrics["model"], *metrics["baselines"].values()):
        for convention in ("pooled", "mean_of_horizons"):
            assert percent(scores[convention]["mape"]) in text and readable(scores[convention]["mae"]) in text
    assert "pre-training 123,456 23,456 64 12.50 – – 1.50 GiB 2 cores" in text
    assert "Old nodes period MAE 2024 1.2500 &lt;5&gt; –" in text
    names = {path.stem for path in (run / "report" / "figures").iterdir()}
    nodes = {f"forecast-{size}-node" for size in ("largest", "median", "small")}
    assert names == {"horizons", "error-map", *nodes}


def test_node_figure_draws_every_node_that_was_scored():
    nrmse, mae, mean = np.array([0.3, np.nan, 0.1]), np.array([3.0, np.nan, 4.0]), np.array([10.0, 0.0, 40.0])
    places = np.array([[-118.0, -117.5, -117.0], [32.0, 32.5, 33.0]])
    spots, against = (axes.collections[0] for axes in node_errors(nrmse, mae, mean, places, "cars").axes[:2])
    np.testing.assert_array_equal(spots.get_offsets(), [[-118, 32], [-117, 33]])
    np.testing.assert_array_equal(spots.get_array(), [0.3, 0.1])
    np.testing.assert_array_equal(against.get_offsets(), [[10, 3], [40, 4]])
    np.testing.assert_array_equal(node_errors(nrmse, mae, mean, None, "cars").axes[0].lines[0].get_ydata(), [0.3, 0.1])


def test_embeddings_are_drawn_where_there_are_any(laid_out, run_dir):
    projections = [
        Projection(title="Nodes", points=[(0, 1), (2, 3)], values=[5, None], quantity="mean"),
        Projection(title="Days", points=[(0, 1), (2, 3)], values=[0, 1], quantity="day", names=["Mon", "Tue"]),
    ]
    write_embeddings(run_dir, Embeddings(projections=projections, caption="t-SNE of <a city>"))
    assert "What the prompts learnt" in text_of(page := build_report(run_dir))
    assert "t-SNE of &lt;a city&gt;" in page.read_text()
    assert (run_dir / "report" / "figures" / "embeddings.png").is_file()
    nodes, _bar, days = draw_projections(projections).axes
    np.testing.assert_array_equal(nodes.collections[0].get_offsets(), [[0, 1], [2, 3]])
    assert [text.get_text() for text in days.texts] == ["Mon", "Tue"]
    shutil.rmtree(run_dir / "forecasts")
    (run_dir / "log.jsonl").unlink()
    write_embeddings(run_dir, Embeddings(projections=[], caption="none"))
    assert "What the prompts learnt" not in text_of(build_report(run_dir))
    (run_dir / "report" / "embeddings.json").write_text('{"projections": 3}')
    with pytest.raises(InputError, match=r"embeddings\.json: 'projections'"):
        read_embeddings(run_dir)


def test_metrics_of_before_there_was_mape_are_read(run_dir, metrics):
    for errors in (metrics["model"]["pooled"], metrics["model"]["mean_of_horizons"]):
        del errors["mape"]
    write_metrics(run_dir, metrics)
    assert read_metrics(run_dir).model.pooled.mape is None and percent(None) == "–"


def test_a_lost_comparison_is_said_plainly(run_dir, metrics):
    metrics["baselines"]["ridge"]["pooled"]["nrmse"] = metrics["model"]["pooled"]["nrmse"] / 1.25
    write_metrics(run_dir, metrics)
    text = text_of(build_report(run_dir))
    assert "The model loses to 1 of 5 baselines: ridge (by NRMSE 1.25 ×). It beats the other 4." in text
    assert "model worse: 1.25" in text
    for scores in metrics["baselines"].values():
        scores["pooled"]["nrmse"] = 1e-6
    lost = verdict(RunMetrics.model_validate(metrics))
    assert lost.startswith("The model loses to 5 of 5 baselines") and lost.endswith("It beats none by all of them.")


def test_what_weakens_the_figures_is_said(run_dir, metrics):
    metrics["variants"] = {"without frames": json.loads(json.dumps(metrics["model"]))}
    metrics["variants"]["without frames"]["pooled"]["nrmse"] *= 0.9
    metrics["baselines"]["ridge"]["pooled"]["points"] -= 1
    metrics["contract"]["windows"] -= 10
    metrics["model"]["pooled"]["nrmse"] *= 1.01
    write_metrics(run_dir, metrics)
    text = text_of(build_report(run_dir))
    assert "variant &#39;without frames&#39; is no worse than the model itself" in text
    assert "ridge was scored on" in text and "not comparable" in text
    assert "Scored on 83 of the 93 windows" in text
    assert "they were not made together" in text
    fallbacks = metrics["baselines"]["same time last week"]["fallbacks"]
    points = metrics["baselines"]["same time last week"]["pooled"]["points"]
    assert not fallbacks or f"{fallbacks:,} of {points:,} points had no source" in text


def test_an_unfinished_run_says_what_is_missing(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    text = text_of(build_report(tmp_path))
    assert "has not been evaluated" in text and "has logged nothing" in text
    assert "No figures of forecasts" in text and "no such forecasts" in text


def test_no_run_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no run folder .*config\.yaml"):
        build_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_moved_store_is_a_note_not_a_failure(run_dir):
    (run_dir / "config.yaml").write_text("data:\n  store: /nowhere/city.zarr\n")
    assert "No figures of forecasts: /nowhere/city.zarr" in text_of(build_report(run_dir))


def test_metrics_round_trip_without_nan(run_dir, metrics):
    metrics["model"]["per_horizon"][0]["mae"] = float("nan")
    path = write_metrics(run_dir, metrics)
    assert json.loads(path.read_text())["model"]["per_horizon"][0]["mae"] is None
    assert read_metrics(run_dir).baselines["ridge"].pooled.nrmse == metrics["baselines"]["ridge"]["pooled"]["nrmse"]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]


def test_misshapen_metrics_are_refused_by_name(run_dir, metrics):
    before = (run_dir / "report" / "metrics.json").read_text()
    del metrics["model"]["pooled"]["rmse"]
    with pytest.raises(InputError, match=r"'model\.pooled\.rmse'"):
        write_metrics(run_dir, metrics)
    assert (run_dir / "report" / "metrics.json").read_text() == before
    (run_dir / "report" / "metrics.json").write_text(before[: len(before) // 2])
    with pytest.raises(InputError, match=r"metrics\.json is damaged"):
        read_metrics(run_dir)


def test_log_of_a_resumed_and_killed_run(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"stage": "sft", "step": 1, "loss": 9.0}\n{"stage": "sft", "step": 2, "loss": 8.0}\n'
        '{"stage": "sft", "step": 2, "loss": 7.0, "time": 5, "note": "resumed", "ok": true}\n'
        '{"stage": "sft", "step": 3, "loss": NaN}\n'
        '{"stage": "sft", "step": 2, "event": "evaluation", "metrics": {"nrmse": 0.5}}\n{"stage": "sf'
    )
    log = read_log(path)["sft"]
    assert log.training == {"loss": {1: 9.0, 2: 7.0}}
    assert log.evaluation == {"nrmse": {2: 0.5}}
    path.write_text('{"stage": "sf\n{"stage": "sft", "step": 1}\n')
    with pytest.raises(InputError, match="line 1"):
        read_log(path)


def test_representative_cells():
    mean = np.array([0.0, 5.0, 1.0, np.nan, 9.0, 3.0])
    assert representative_cells(mean) == {"Largest": 4, "Median": 1, "Small": 2}
    assert representative_cells(np.array([2.0])) == {"Largest": 0}
    assert representative_cells(np.zeros(3)) == {}


def test_curves_are_drawn_as_given():
    figure = horizon_curves([0.2, 0.3], {"ridge": [0.1, 0.4]}, 10)
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    np.testing.assert_array_equal(lines["model"], [0.2, 0.3])
    np.testing.assert_array_equal(lines["ridge"], [0.1, 0.4])
    assert "10 min" in figure.axes[0].get_xlabel()


def test_smoothing_is_a_centred_mean():
    curve = np.arange(80.0) ** 2
    expected = [np.mean(curve[max(0, i - 2) : i + 3]) for i in range(80)]
    np.testing.assert_allclose(smoothed(curve), expected)
    np.testing.assert_array_equal(smoothed(curve[:5]), curve[:5])


def test_the_picture_of_a_run_shows_its_errors(run_dir, metrics):
    """docs/make_picture.py: bars from the largest error to the smallest, and a day of the busiest cell."""
    script = Path(__file__).parents[2] / "docs" / "make_picture.py"
    day, bars = runpy.run_path(str(script))["picture"](run_dir).axes
    errors = sorted((scores["pooled"]["nrmse"] for scores in metrics["baselines"].values()), reverse=True)
    assert [bar.get_width() for bar in bars.patches] == [*errors, metrics["model"]["pooled"]["nrmse"]]
    assert [label.get_text() for label in bars.get_yticklabels()][-1] == "this model"
    assert len(day.lines) > 2 and day.get_ylabel() == "vehicles"


def test_readable_numbers():
    assert [readable(v) for v in (None, 0.19494, 9.5, 38.517, 53.0, 12345.6)] == [
        "–", "0.1949", "9.5000", "38.52", "53.00", "12,346",
    ]  # fmt: skip
    assert [readable(v) for v in ("2024", 3, 1234567)] == ["2024", "3", "1,234,567"]
    assert [percent(v) for v in (None, 0.1234, 12.0)] == ["–", "12.3 %", "1,200.0 %"]
    assert [memory(v) for v in (None, 5 * 2**20, 3 * 2**29)] == ["–", "5 MiB", "1.50 GiB"]
    assert [change(b, a) for b, a in ((2.0, 1.0), (0.001, 0.97), (0.0, 1.0), (None, 1.0))] == [
        "-50.0 %", "× 970", "–", "–",
    ]  # fmt: skip
