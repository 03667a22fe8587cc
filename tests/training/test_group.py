"""Shares of learners: equal, disjoint and all there is."""

import pytest

from stdist.errors import InputError
from stdist.training.process_group import ProcessGroup


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_equal_parts_are_the_whole(size):
    things = list(range(6))
    parts = [things[ProcessGroup(rank, size).local_slice(6, "sft.windows_per_step")] for rank in range(size)]
    assert [thing for part in parts for thing in part] == things and {len(part) for part in parts} == {6 // size}


def test_what_cannot_be_shared_evenly_is_refused_by_its_key():
    with pytest.raises(
        InputError, match=r"^sft\.windows_per_step is 7, which 2 learners cannot share evenly; make it a"
    ):
        ProcessGroup(1, 2).local_slice(7, "sft.windows_per_step")


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_each_thing_is_dealt_to_one_learner(size):
    hands = [ProcessGroup(rank, size).local_items(range(7)) for rank in range(size)]
    assert sorted(thing for hand in hands for thing in hand) == list(range(7))
    assert max(map(len, hands)) - min(map(len, hands)) <= 1


def test_one_learner_alone_agrees_with_itself():
    alone = ProcessGroup.current()
    assert alone == ProcessGroup(0, 1) and alone.is_main
    assert alone.all_gather_object("x") == ["x"] and alone.broadcast_object("x") == "x"
