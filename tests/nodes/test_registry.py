"""A backbone from outside of the package: one file and an entry point, and every command knows it."""

import json
from collections.abc import Iterator

import pytest
import yaml
from typer.testing import CliRunner

from stdist.cli import app
from stdist.nodes.forecaster import NodeForecaster
from stdist.nodes.kinds import BACKBONES
from stdist.runs.recipes import load_config, parse_config

TOY = """
from typing import Literal

from torch import nn

from stdist.nodes.forecaster import BackboneConfig, ForecasterSpec, NodeBackbone


class ToySpec(ForecasterSpec):
    uses_graph = False
    model_type: Literal["toy"] = "toy"
    width: int = 3

    def backbone(self):
        return Toy(self)


class ToyConfig(BackboneConfig):
    Spec = ToySpec
    kind: Literal["toy"] = "toy"
    width: int = 3


class Toy(NodeBackbone):
    def __init__(self, spec):
        super().__init__(spec)
        self.layers = nn.Sequential(nn.Linear(spec.history, spec.width), nn.Linear(spec.width, spec.horizon))

    def forward(self, features, slot, weekday, graph):
        return self.layers(features[..., 0].transpose(1, 2))
"""


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Iterator[None]:
    """An installed package with an entry point, as pip would leave it."""
    info = tmp_path / "site" / "toy-1.dist-info"
    info.mkdir(parents=True)
    info.with_name("toy_backbone.py").write_text(TOY)
    (info / "METADATA").write_text("Name: toy\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[stdist.backbones]\ntoy = toy_backbone:ToyConfig\n")
    monkeypatch.syspath_prepend(info.parent)
    yield
    BACKBONES._things.pop("toy", None)


def test_a_toy_trains(toy, city, make_config, tmp_path, refused):
    config = make_config(city, tmp_path / "runs", training={"max_epochs": 1})
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json") | {"model": {"kind": "toy"}}))
    result = CliRunner().invoke(app, ["train", str(path), "model.width=5", "--json"], catch_exceptions=False)
    stage = json.loads(result.stdout.splitlines()[-1])["stages"]["train"]
    assert stage["after"]["mae"] < stage["before"]["mae"]
    saved = NodeForecaster.from_pretrained(config.run_dir / "checkpoints" / "train" / stage["checkpoint"])
    assert (saved.spec.width, saved.nodes) == (5, 9)
    refused(lambda: load_config(path, ["model.widht=5"]), "unknown key 'model.widht'; did you mean 'width'?")


def test_every_kind_has_its_own_keys(city, make_config, tmp_path, refused):
    for kind in ("urbanpg", "stid", "stgcn", "graph_wavenet"):
        config = make_config(city, tmp_path, model={"kind": kind, "d": None})
        assert config.model.kind == kind and type(config.model) is BACKBONES[kind]
        assert parse_config(config.model_dump(mode="json"), "x").model == config.model
    refused(lambda: make_config(city, tmp_path, model={"kind": "stid", "dd": 3}), "unknown key 'model.dd'", "'d'")
    refused(lambda: make_config(city, tmp_path, model={"kind": "stdi"}), "model.kind 'stdi'", "stid")


def test_a_run_of_another_kind_that_noted_urbanpgs_options_is_read(city, make_config, tmp_path, refused):
    noted = {"kind": "stid", "d": None, "temporal": True, "spatial": True, "p": 0.1, "q": 0.5, "stca": True}
    noted |= {"stca_normalizer": "none", "residual": True}
    assert make_config(city, tmp_path, model=noted).model.model_dump() == {"kind": "stid", "d": None}
    refused(lambda: make_config(city, tmp_path, model=noted | {"p": 0.2}), "p is UrbanPG's, and kind is stid")
