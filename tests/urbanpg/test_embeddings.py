"""Projections of prompts: of any number of rows, coloured by what the rows stand for, and the same every time."""

import warnings

import numpy as np
import pytest
import torch

from stdist.evaluation.run_files import read_embeddings, write_embeddings
from stdist.urbanpg import ContextPrompts, PromptSpec, embeddings
from stdist.urbanpg.embeddings import project_embeddings


def make_prompts(nodes=(69,), **changes):
    torch.manual_seed(0)
    return ContextPrompts(PromptSpec(**{"scenario": "a", "periods": nodes, "cadence": 60, "d": 8} | changes))


def test_a_small_city_is_projected_without_a_warning(tmp_path):
    """24 slots, 7 days and 69 nodes of two periods, one of which has no mean."""
    means = np.append(np.arange(68.0), np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = project_embeddings(make_prompts((60, 9)), means, seed=1)
    tod, dow, nodes = made.projections
    assert [len(part.points) for part in made.projections] == [24, 7, 69]
    assert all(np.isfinite(part.points).all() for part in made.projections)
    assert tod.values == list(range(24)) and tod.cyclic and dow.names[0] == "Mon"
    assert nodes.values[:3] == [0, 1, 2]
    write_embeddings(tmp_path, made)
    again = read_embeddings(tmp_path)
    assert again.projections[2].values[68] is None and again.projections[0] == tod


@pytest.mark.parametrize("count", [3, 4, 12])
def test_few_nodes(count):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = project_embeddings(make_prompts((count,), temporal=False), np.arange(float(count)), seed=0)
    assert [len(part.points) for part in made.projections] == [count]


def test_what_is_not_there_or_too_little_is_left_out():
    made = project_embeddings(make_prompts((2,)), np.zeros(2), seed=0)
    assert [part.title for part in made.projections] == ["Time of day", "Day of week"]
    made = project_embeddings(make_prompts(spatial=False), np.zeros(69), seed=0)
    assert len(made.projections) == 2


def test_the_same_seed_gives_the_same_points():
    prompts, means = make_prompts(), np.arange(69.0)
    assert project_embeddings(prompts, means, seed=4) == project_embeddings(prompts, means, seed=4)


def test_alike_rows_lie_together():
    """Two groups of nodes whose rows differ stay apart."""
    prompts = make_prompts((40,), temporal=False)
    with torch.no_grad():
        prompts.node_rows[0][:20] += 3
    points = np.array(project_embeddings(prompts, np.zeros(40), seed=0).projections[0].points)
    groups = points[:20], points[20:]
    centres = [group.mean(axis=0) for group in groups]
    spread = max(np.linalg.norm(group - centre, axis=1).max() for group, centre in zip(groups, centres, strict=True))
    assert np.linalg.norm(centres[0] - centres[1]) > 2 * spread


def test_of_a_large_city_nodes_are_drawn_by_the_seed(monkeypatch):
    monkeypatch.setattr(embeddings, "NODES", 20)
    made = project_embeddings(make_prompts(), np.arange(69.0), seed=2)
    values = made.projections[2].values
    assert len(made.projections[2].points) == 20 and len(set(values)) == 20 and values == sorted(values)
    assert project_embeddings(make_prompts(), np.arange(69.0), seed=3).projections[2].values != values
    assert "20 of 69 nodes, drawn at random" in made.caption
