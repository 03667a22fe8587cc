"""A model of a small city and a batch, the same for every test that asks for the same sizes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stdist.urbanpg import Backbone, BackboneSpec, ContextPrompts, PromptSpec, UrbanPG

S, K, D, MEAN, STD = 6, 4, 8, 100.0, 40.0
Batch = tuple[Tensor, Tensor, Tensor]


def make_model(nodes: int = 30, *, backbone: dict | None = None, prompts: dict | None = None) -> UrbanPG:
    torch.manual_seed(3)
    spec = PromptSpec(**{"scenario": "a", "periods": (nodes,), "cadence": 60, "d": D} | (prompts or {}))
    of_backbone = BackboneSpec(**{"history": S, "horizon": K, "d": D} | (backbone or {}))
    model = UrbanPG(Backbone(of_backbone), ContextPrompts(spec, MEAN, STD))
    with torch.no_grad():  # as after training: embeddings that say something
        for embeddings in model.prompts.parameters():
            embeddings.mul_(30)
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
