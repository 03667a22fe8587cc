"""UrbanPG with its nodes on 2 and 4 ranks is UrbanPG in one process; ``node_worker.py`` computes every case."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stdist.errors import InputError
from stdist.urban.node_parallel import nodes_of

SCRIPT = Path(__file__).with_name("node_worker.py")
LAYOUTS = [(2, "1x2"), (4, "1x4"), (4, "2x2")]
CASES = ["paper", "sum", "no stca", "no temporal context", "no spatial context", "blocks", "frozen backbone"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    """By number of ranks, what each rank found."""
    folder, found = tmp_path_factory.mktemp("nodes"), {}
    for world in (2, 4):
        logs = [folder / f"{world}-{rank}.log" for rank in range(world)]
        ranks = []
        for rank, log in enumerate(logs):
            command = [sys.executable, str(SCRIPT), str(rank), str(world), str(folder)]
            with log.open("w") as output:
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                ranks.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment))
        try:
            for process, log in zip(ranks, logs, strict=True):
                assert process.wait(timeout=120) == 0, log.read_text()[-3000:]
        finally:
            for process in ranks:
                process.kill()
        found[world] = [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_values_and_gradients_are_those_of_one_process(results, world, layout, case):
    for rank in results[world]:
        differences = rank[f"{layout} {case}"]
        assert len(differences) > 5
        assert {name: value for name, value in differences.items() if not value <= 1e-5} == {}


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_sent_do_not_depend_on_the_number_of_nodes(results, world):
    d, S, K, samples, slots = 16, 6, 4, 4, 24
    backbone = (S + 1) * d + 3 * (d + 1) * d + 2 * (d + 1) * d + (d + 1) * K
    prompts = (slots + 7 + 1) * d
    sums = samples * (d + 1) * d
    expected = 4 * (2 * sums + backbone + prompts) + 8 + 8  # and the number of points and of the draw
    for rank in results[world]:
        assert set(rank["sent"].values()) == {expected}


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_agree_on_the_draws_and_keep_equal_weights(results, world):
    assert all(rank["agree"] for rank in results[world])


def test_every_node_is_some_ranks_and_none_is_two_ranks():
    for nodes, ranks in [(4, 4), (41, 4), (1_000_003, 7)]:
        held = [nodes_of(rank, ranks, nodes) for rank in range(ranks)]
        assert [h.start for h in held] + [nodes] == [0] + [h.stop for h in held]
        assert max(h.stop - h.start for h in held) - min(h.stop - h.start for h in held) <= 1
    with pytest.raises(InputError, match="3 nodes cannot be shared by 4 ranks; use at most 3 along 'nodes'"):
        nodes_of(0, 4, 3)
