"""Backbones and prompts put together, frozen, expanded, saved and loaded, and input that does not fit."""

import json

import numpy as np
import pytest
import torch

from stdist.urbanpg import Backbone, ContextPrompts, PromptSpec, UrbanPG


def bytes_of(module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()}


def train(model: UrbanPG, inputs, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        optimizer.step()


def test_equation_8_new_prompts_on_a_frozen_backbone(model, batch):
    backbone = model().backbone.requires_grad_(False)
    before = bytes_of(backbone)
    prompts = ContextPrompts(PromptSpec(scenario="b", periods=(12,), cadence=30, d=8, p=0.9), 5.0, 2.0)
    untrained = bytes_of(prompts)
    train(UrbanPG(backbone, prompts), batch(12))
    assert bytes_of(backbone) == before
    changed = {name for name, value in bytes_of(prompts).items() if value != untrained[name]}
    assert changed == {"time_of_day", "day_of_week", "shared", "node_rows.0"}


@pytest.mark.parametrize("train_old_rows", [False, True])
def test_equations_9_and_10_old_rows_are_kept_and_frozen(model, batch, train_old_rows):
    first = model().prompts
    second = first.expand(4, train_old_rows=train_old_rows)
    third = second.expand(2, train_old_rows=train_old_rows)
    assert third.spec.periods == (30, 4, 2)
    embeddings = [prompts.node_embeddings().detach().numpy() for prompts in (first, second, third)]
    assert embeddings[2][:34].tobytes() == embeddings[1].tobytes()
    assert embeddings[2][:30].tobytes() == embeddings[0].tobytes()
    before, backbone = bytes_of(third), model().backbone.requires_grad_(False)
    train(UrbanPG(backbone, third), batch(36))
    changed = [bytes_of(third)[name] != before[name] for name in ("node_rows.0", "node_rows.1", "node_rows.2")]
    assert changed == [train_old_rows, train_old_rows, True]
    assert first.node_rows[0].requires_grad, "the prompts it was made of are untouched"


def test_one_node_alone_may_join(model, batch):
    """The fewest that Eq. 9 knows; it has a row of its own, and forecasts come for it too."""
    grown = model().prompts.expand(1)
    assert grown.spec.periods == (30, 1) and [len(rows) for rows in grown.node_rows] == [30, 1]
    assert UrbanPG(model().backbone, grown).eval()(*batch(31)).shape[2] == 31


def test_prompts_that_know_no_figures_of_their_city_change_no_value():
    """Without a mean and a standard deviation the data's units are the backbone's z-scores, bit for bit."""
    prompts = ContextPrompts(PromptSpec(scenario="a", periods=(3,), cadence=60, d=8))
    values = torch.tensor([[[-2.5, 0.0, 7.25]]])
    scores = prompts.normalise(values)
    assert torch.equal(scores, values.mT) and torch.equal(prompts.restore(scores), values)


def test_a_part_keeps_rows_and_what_is_frozen(model):
    grown = model().prompts.expand(10)
    part = grown.part(25, 33)
    assert part.spec.periods == (5, 3)
    assert [rows.requires_grad for rows in part.node_rows] == [False, True]
    assert torch.equal(part.node_embeddings(), grown.node_embeddings()[25:33])
    assert part.node_rows[0].data_ptr() != grown.node_rows[0][25:].data_ptr()


@pytest.mark.parametrize("prompts", [{}, {"spatial": False}, {"temporal": False, "periods": (10, 20)}])
def test_save_and_load_are_bitwise_and_share_a_backbone(model, batch, tmp_path, prompts):
    saved = model(prompts=prompts).eval()
    saved.save_pretrained(tmp_path)
    backbone_file = tmp_path / "backbone" / "model.safetensors"
    stamp = backbone_file.stat().st_mtime_ns
    ContextPrompts(PromptSpec(scenario="b", periods=(3,), cadence=60, d=8)).save_pretrained(tmp_path / "prompts" / "b")
    loaded = UrbanPG.from_pretrained(tmp_path, "a")
    assert bytes_of(loaded) == bytes_of(saved)
    assert (loaded.backbone.spec, loaded.prompts.spec) == (saved.backbone.spec, saved.prompts.spec)
    assert torch.equal(loaded(*batch()), saved(*batch()))
    assert UrbanPG.from_pretrained(tmp_path, "b").prompts.spec.nodes == 3
    assert backbone_file.stat().st_mtime_ns == stamp
    assert sorted(p.name for p in (tmp_path / "backbone").iterdir()) == ["config.json", "model.safetensors"]
    train(loaded, batch(), steps=1)  # what is loaded trains


@pytest.mark.parametrize("blocks", [False, True])
def test_input_that_does_not_fit(model, batch, blocks, refused):
    call = model()
    call.block_nodes = 7 if blocks else None

    history, slot, weekday = batch()
    refused(lambda: call(*batch(31)), "31 nodes", "'a' have 30", "expand", "fit new prompts")
    refused(lambda: call(history[:, :5], slot, weekday), "[3, 5, 30]", "[B, 6, N]")
    refused(lambda: call(history, slot[:2], weekday), "slot [2]")
    refused(lambda: call(history, torch.tensor([0, 24, 1]), weekday), "slot 24", "24 slots of 60 min")
    refused(lambda: call(history, slot, torch.tensor([0, 7, 1])), "weekday 7")
    empty = history.clone()
    empty[1, :, 4] = torch.nan
    refused(lambda: call(empty, slot, weekday), "node 4", "sample 1", "impute")
    empty[1, 0, 4] = 90
    assert call(empty, slot, weekday).isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cadence": 7}, "7 min does not divide a day"),
        ({"cadence": 0}, "0 min does not divide a day"),
        ({"periods": ()}, "at least 1"),
        ({"p": 1.0}, "Eq. 4"),
        ({"scenario": "../b"}, "names a folder"),
    ],
)
def test_prompts_that_make_no_sense(change, words, refused):
    spec = {"scenario": "a", "periods": (3,), "cadence": 60, "d": 8} | change
    refused(lambda: ContextPrompts(PromptSpec(**spec)), words)


def test_parts_that_do_not_fit(model, tmp_path, refused):
    ours = model()
    other = ContextPrompts(PromptSpec(scenario="b", periods=(3,), cadence=60, d=16))
    refused(lambda: UrbanPG(ours.backbone, other), "d 8", "'b' have 16")
    refused(lambda: ContextPrompts(ours.prompts.spec, 1.0, 0.0), "std 0.0")
    refused(lambda: ours.prompts.expand(0), "0 new nodes")
    refused(lambda: ours.prompts.calendar(np.array(["2019-01-06T23:30"], "datetime64[m]")), "23:30", "60 min")
    ours.save_pretrained(tmp_path)
    refused(lambda: UrbanPG.from_pretrained(tmp_path, "b"), "no prompts 'b'", "it has: a")
    refused(lambda: Backbone.from_pretrained(tmp_path / "prompts" / "a"), "BackboneSpec", "model_type")
    refused(lambda: Backbone.from_pretrained(tmp_path), "no config.json")
    config = tmp_path / "backbone" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"d": 16}))
    refused(lambda: Backbone.from_pretrained(tmp_path / "backbone"), "embed.bias is [8]", "says [16]")
    weights = tmp_path / "prompts" / "a" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    refused(lambda: ContextPrompts.from_pretrained(weights.parent), "cannot be read", "copy the folder again")
