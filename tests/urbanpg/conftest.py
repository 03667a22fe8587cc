"""A small city, a model of it and a batch, the same for every test that asks for the same sizes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stdist.data import GridStore, GridWriter, NodeSpec, Split, open_store
from stdist.errors import InputError
from stdist.runs.recipes import parse_config
from stdist.urbanpg import Backbone, BackboneSpec, Prompts, PromptSpec, UrbanPG
from stdist.urbanpg.config import UrbanConfig

S, K, D, MEAN, STD = 6, 4, 8, 100.0, 40.0
Batch = tuple[Tensor, Tensor, Tensor]


def make_model(nodes: int = 30, *, backbone: dict | None = None, prompts: dict | None = None) -> UrbanPG:
    torch.manual_seed(3)
    spec = PromptSpec(**{"scenario": "a", "periods": (nodes,), "cadence": 60, "d": D} | (prompts or {}))
    model = UrbanPG(
        Backbone(BackboneSpec(**{"history": S, "horizon": K, "d": D} | (backbone or {}))), Prompts(spec, MEAN, STD)
    )
    with torch.no_grad():  # as after training: rows that say something
        for rows in model.prompts.parameters():
            rows.mul_(30)
    return model


def make_batch(nodes: int = 30, samples: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(7)
    history = MEAN + STD * torch.randn(samples, S, nodes, generator=generator)
    slot = torch.randint(24, (samples,), generator=generator)
    return history, slot, torch.randint(7, (samples,), generator=generator)


@pytest.fixture
def model() -> Callable[..., UrbanPG]:
    return make_model


@pytest.fixture
def batch() -> Callable[..., Batch]:
    return make_batch


SLOTS = 24
FIRST_DAY = np.datetime64("2024-03-04")


def write_city(
    out: Path, nodes: int = 9, days: int = 12, name: str = "toy town", late: int | None = None, first: int = 0
) -> GridStore:
    """Hourly flow of sensors of unlike size, some values missing; 8 days train, 2 validation, 2 test; on a ring.

    ``late``: a node that is there from the third day on; ``first``: number in the first one's id.
    """
    rng = np.random.default_rng(nodes)
    t = np.arange(days * SLOTS)
    shape = 60 + 40 * np.sin(2 * np.pi * t / SLOTS) + 10 * np.sin(2 * np.pi * t / (7 * SLOTS))
    values = shape[:, None] * rng.uniform(0.5, 2, nodes) * rng.uniform(0.95, 1.05, (len(t), nodes))
    values[rng.random(values.shape) < 0.02] = np.nan
    since = np.full(nodes, FIRST_DAY)
    if late is not None:
        since[late] += 2
        values[: 2 * SLOTS, late] = np.nan
    ring = np.roll(np.eye(nodes, dtype=np.float32), 1, axis=1)
    ids = np.array([f"s{first + number}" for number in range(nodes)])
    last = FIRST_DAY + days - 1
    spec = NodeSpec(name, ("flow",), FIRST_DAY, last, ids, 60, 60, "vehicles", since=since, adjacency=ring)
    with GridWriter(out, spec, {"made by": "a test"}) as writer:
        for day in range(days):
            writer.write_day(day, {"flow": values[day * SLOTS : (day + 1) * SLOTS].astype(np.float32)})
        split = Split.parse([FIRST_DAY, last - 4], [last - 3, last - 2], [last - 1, last])
        return open_store(writer.finalise(split))


@pytest.fixture(scope="session")
def city(tmp_path_factory: pytest.TempPathFactory) -> GridStore:
    return write_city(tmp_path_factory.mktemp("city") / "city.zarr")


@pytest.fixture(scope="session")
def small_city(tmp_path_factory: pytest.TempPathFactory) -> GridStore:
    return write_city(tmp_path_factory.mktemp("small") / "small.zarr", nodes=5, name="hamlet")


def config_of(store: GridStore, runs: Path, **changes: Any) -> UrbanConfig:
    """A few short epochs; groups of keys in ``changes`` are merged into those here."""
    tree: dict[str, Any] = {
        "recipe": "urbanpg-train",
        "name": "tiny",
        "output_dir": str(runs),
        "data": {"store": str(store.path), "channel": "flow", "history": 6, "horizon": 4},
        "model": {"d": 8},
        "training": {"max_epochs": 3, "train_batch_size": 32, "learning_rate": 1e-2, "warmup_steps": 1},
    }
    tree["training"]["logging_steps"] = 1
    for key, value in changes.items():
        tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
    config = parse_config(tree, where="test")
    assert isinstance(config, UrbanConfig)
    return config


@pytest.fixture(scope="session")
def make_city() -> Callable[..., GridStore]:
    return write_city


@pytest.fixture(scope="session")
def make_config() -> Callable[..., UrbanConfig]:
    return config_of


@pytest.fixture(scope="session")
def refused() -> Callable[..., None]:
    """Calls what is to raise an InputError of one line that has these parts."""

    def check(call: Callable[[], object], *parts: str) -> None:
        with pytest.raises(InputError) as error:
            call()
        message = str(error.value)
        assert "\n" not in message and len(message) < 400, message
        for part in parts:
            assert part in message, message

    return check
