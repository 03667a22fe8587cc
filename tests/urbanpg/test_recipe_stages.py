"""What a run of several stages refuses before its first step, and that whatever it accepts trains: leaks, stages in
which nothing gets a gradient, backbones that changed."""

import itertools
import shutil
from typing import Any

import numpy as np
import pytest
import torch

from stdist.data.audit import Fitted, data_digest
from stdist.errors import InputError
from stdist.nodes.checkpoints import ForecasterFiles, load_fitted
from stdist.nodes.dataset import open_period
from stdist.nodes.learners import nodes_of
from stdist.runs import recipes, training
from stdist.training.process_group import ProcessGroup
from stdist.urbanpg import UrbanPG, opening
from stdist.urbanpg.checkpoints import result_of, stage_names
from stdist.urbanpg.config import UrbanConfig
from stdist.urbanpg.continual import expanded, require_gradients

ALONE = ProcessGroup()
SHORT = {"max_epochs": 1, "train_batch_size": 16}


def train(config: UrbanConfig) -> dict[str, Any]:
    return recipes.train(config, lambda line: None)


def period(first: int, days: int, nodes: int, test: int | None = None) -> dict[str, Any]:
    """Trains on ``days`` days of March from ``first``, validates on the one behind them, tests on the next."""
    last = first + days - 1
    named = {"train": (first, last), "validation": (last + 1,) * 2, "test": (test or last + 2,) * 2}
    return {name: [f"2024-03-{day:02}" for day in span] for name, span in named.items()} | {"nodes": nodes}


PERIODS = [period(4, 2, 4), period(8, 2, 6)]
NONE_NEW = [period(4, 2, 6), period(8, 2, 6)]


@pytest.fixture
def unscored(monkeypatch) -> None:
    """Forecasts and their scores take longer than these trainings."""
    monkeypatch.setattr(training, "score_test", lambda *arguments: {})


# --- leaks ---------------------------------------------------------------------------------------------------------


def test_test_days_that_an_earlier_period_trained_on(make_config, city, tmp_path, refused):
    periods = [period(6, 3, 4), period(9, 2, 6, test=8)]
    config = make_config(city, tmp_path, recipe="continual", continual={"periods": periods})
    refused(lambda: train(config), "2024-03-06:2024-03-08", "2024-03-08:2024-03-08", "period-2", "continual.periods")
    assert list(tmp_path.iterdir()) == []


def test_a_period_may_train_on_days_that_an_earlier_one_was_tested_on(make_config, city, tmp_path):
    periods = [period(4, 2, 4), period(6, 4, 6)]
    tasks, _, fitted, _ = opening.open_run(
        make_config(city, tmp_path, recipe="continual", continual={"periods": periods}), ALONE
    )
    data = data_digest(city, "flow")
    first, second = (Fitted.on("weights", task.train.span, data) for task in tasks)
    assert fitted == [(first,), (first, second)]


def test_test_days_that_the_backbone_saw(make_config, city, tmp_path, refused):
    base = make_config(city, tmp_path)
    (task,), model, fitted, _ = opening.open_run(base, ALONE)
    (tmp_path / "saved").mkdir()
    ForecasterFiles(model, fitted[0]).snapshot()(tmp_path / "saved")
    days = {"train": ["2024-03-12", "2024-03-13"], "validation": ["2024-03-14"] * 2, "test": ["2024-03-11"] * 2}
    few = {"recipe": "few-shot", "few_shot": {"backbone": str(tmp_path / "saved")}}
    config = make_config(city, tmp_path / "runs", **few, data={"split": days})
    refused(lambda: train(config), "leak", f"{task.train.span}", "2024-03-11:2024-03-11", "data.split")
    assert not config.run_dir.exists()
    elsewhere = make_config(city, tmp_path / "runs", **few, data={"split": days | {"test": ["2024-03-15"] * 2}})
    assert len(opening.open_run(elsewhere, ALONE)[2][0]) == 2


# --- stages in which nothing trains --------------------------------------------------------------------------------

ABLATIONS = [{}, {"temporal": False}, {"spatial": False}, {"stca": False}, {"p": 0}]


@pytest.mark.parametrize("ablation", ABLATIONS, ids=str)
def test_every_ablation_trains_in_every_paradigm(make_config, city, small_city, tmp_path, unscored, ablation):
    base = make_config(city, tmp_path, training=SHORT, model=ablation)
    few = {"recipe": "few-shot", "few_shot": {"backbone": str(base.run_dir)}, "data": {"fraction": 0.25}}
    prompted = make_config(small_city, tmp_path, name="few", training=SHORT, model=ablation, **few)
    periods = {"recipe": "continual", "continual": {"periods": PERIODS}}
    continual = make_config(city, tmp_path, name="periods", training=SHORT, model=ablation, **periods)
    for config in (base, prompted, continual):
        for name, summary in train(config)["stages"].items():
            folder = config.run_dir / "checkpoints" / name
            before, after = (UrbanPG.from_pretrained(folder / step) for step in ("step-0", f"step-{summary['steps']}"))
            assert any(not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))


CHOICES = [
    {"temporal": temporal, "spatial": spatial, "stca": stca, "p": p, "q": q}
    for temporal, spatial, stca, (p, q) in itertools.product(
        (True, False), (True, False), (True, False), ((0.5, 0.5), (0, 0.5), (0.5, 0))
    )
]


def learns(model: UrbanPG) -> bool:
    """Whether some weight has a gradient of some of eight steps, each with its own perturbation."""
    history = 100 + 40 * torch.randn(2, 6, model.nodes, generator=torch.Generator().manual_seed(7))
    slot = weekday = torch.zeros(2, dtype=torch.int64)
    losses = [model.train()(history, slot, weekday, noise_seed=seed).square().mean() for seed in range(8)]
    if losses[0].requires_grad:
        sum(losses).backward()
    return any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("periods", [PERIODS, NONE_NEW], ids=["new nodes", "none new"])
@pytest.mark.parametrize("freeze", [{}, {"train_old_rows": True}, {"train_backbone": True}], ids=str)
def test_a_period_is_refused_where_no_weight_gets_a_gradient(make_config, city, tmp_path, periods, freeze, ranks):
    """On its first learner, which has the oldest nodes. Of every choice of what there is to train."""
    refusals, tasks = 0, []
    for choice in CHOICES:
        changes = {"model": choice, "continual": {"periods": periods, **freeze}, "nodes": {"ranks": ranks}}
        config = make_config(city, tmp_path, recipe="continual", **changes)
        tasks = tasks or [open_period(config.data, each) for each in config.continual.periods]
        model = expanded(config.model.build(tasks[0], 0), tasks[1], config.continual, 0)
        here = UrbanPG(model.backbone, model.prompts.part(0, nodes_of(0, ranks, 6).stop))
        try:
            require_gradients(config, stage_names(config), tasks)
        except InputError:
            assert not learns(here), choice
            refusals += 1
        else:
            assert learns(here), choice
    assert (refusals > 0) is ("train_backbone" not in freeze)


def test_stages_without_anything_to_train_are_refused(make_config, city, tmp_path, refused):
    bare = {"temporal": False, "spatial": False}
    few = make_config(city, tmp_path, recipe="few-shot", few_shot={"backbone": "/any"}, model=bare)
    refused(lambda: train(few), "stage prompts trains nothing", "model.temporal is false", "model.spatial is false")
    lone = {"temporal": False, "p": 0}
    none_new = make_config(city, tmp_path, recipe="continual", continual={"periods": NONE_NEW}, model=lone)
    refused(lambda: train(none_new), "stage period-2 trains nothing", "model.p or model.q is 0", "train_backbone")
    shared = {"nodes": {"ranks": 2}, "learners": {"num_workers": 2, "engine": "deepspeed"}}
    two = make_config(city, tmp_path, recipe="continual", continual={"periods": PERIODS}, model=lone, **shared)
    refused(
        lambda: opening.check(two, ProcessGroup(0, 2)),
        "stage period-2",
        "on the first of nodes.ranks 2",
        "no node there",
    )
    assert list(tmp_path.iterdir()) == []


def test_learners_do_not_share_batch_normalisation(make_config, city, tmp_path, refused):
    shared = {"learners": {"num_workers": 2, "engine": "deepspeed"}, "data": {"history": 12}}
    config = make_config(city, tmp_path, model={"kind": "graph_wavenet"}, **shared)
    refused(
        lambda: opening.check(config, ProcessGroup(0, 2)), "graph_wavenet has batch norm", "learners.num_workers to 1"
    )
    others = [make_config(city, tmp_path, model={"kind": kind}, **shared) for kind in ("stid", "stgcn")]
    for each in others:
        opening.check(each, ProcessGroup(0, 2))
        model = opening.open_run(each, ALONE)[1]
        assert not any(isinstance(module, torch.nn.modules.batchnorm._NormBase) for module in model.modules())


# --- backbones that change -----------------------------------------------------------------------------------------


def test_a_backbone_that_was_trained_again(make_config, city, small_city, tmp_path, unscored, refused):
    """Refused: prompts fit the weights they were fitted on. Where it is gone, its copy in the result serves."""
    base = make_config(city, tmp_path, training=SHORT)
    train(base)
    few = {"recipe": "few-shot", "few_shot": {"backbone": str(base.run_dir)}, "data": {"fraction": 0.25}}
    prompted, said = make_config(small_city, tmp_path, name="few", training=SHORT, **few), list[str]()
    first = train(prompted)
    fitted = load_fitted(result_of(prompted.run_dir, prompted))
    kept = base.run_dir.rename(tmp_path / "kept")
    assert recipes.train(prompted, said.append) == first
    assert any(f"{base.run_dir} is not there any more" in line for line in said)
    assert opening.open_run(prompted, ALONE)[2] == [fitted]
    train(make_config(city, tmp_path, training=SHORT, seed=1))
    refused(lambda: train(prompted), "began with other frozen weights", str(base.run_dir), "choose another name=")
    shutil.rmtree(base.run_dir)
    kept.rename(base.run_dir)
    assert train(prompted) == first


# --- periods and the week ------------------------------------------------------------------------------------------


def test_weekdays_begin_alike_in_the_period_that_first_holds_weeks(make_config, make_city, tmp_path):
    city = make_city(tmp_path / "longer.zarr", days=24)
    periods = [period(4, 3, 9), period(7, 15, 9)]
    config = make_config(city, tmp_path, recipe="continual", continual={"periods": periods})
    tasks, before, _, notes = opening.open_run(config, ALONE)
    assert (
        "2024-03-04:2024-03-06 does not hold every weekday twice: to the model all days are one until period 2" in notes
    )
    after = expanded(before, tasks[1], config.continual, 0)
    days = np.arange("2024-03-04", "2024-03-11", dtype="datetime64[D]").astype("datetime64[m]")
    assert (before.prompts.calendar(days)[1] == 0).all()
    slot, weekday = after.prompts.calendar(days)
    assert weekday.tolist() == [*range(7)]
    history = 60 + 10 * torch.randn(7, 6, 9, generator=torch.Generator().manual_seed(7))
    assert torch.equal(after.eval()(history, slot, weekday), before.eval()(history, slot, torch.zeros_like(weekday)))
    after.save_pretrained(tmp_path / "saved")
    assert UrbanPG.from_pretrained(tmp_path / "saved").prompts.calendar(days)[1].tolist() == [*range(7)]


# --- advice --------------------------------------------------------------------------------------------------------


def test_nodes_that_join_within_a_period(make_config, make_city, tmp_path):
    late = make_city(tmp_path / "late.zarr", late=4)
    config = make_config(
        late, tmp_path / "runs", recipe="continual", continual={"periods": [period(4, 2, 5), PERIODS[1]]}
    )
    with pytest.raises(InputError, match=r"node 4 \(id s4\).*give the period fewer nodes$"):
        train(config)
