"""Memory and communication against the figures printed in the ZeRO paper, and against a real AdamW."""

import pytest
import torch

from stdist.runs.memory_plan import (
    GPUS_PER_NODE,
    INFINIBAND,
    NVLINK,
    Ranks,
    Weights,
    bandwidth,
    bucket_bytes,
    communication_seconds,
    gathered_bytes,
    state_bytes,
    traffic,
)

PAPER = Weights("all", 7_500_000_000, 2, trainable=True)
HALF, TRAINED = Weights("half", 1000, 2), Weights("trained", 300, 2, trainable=True)


@pytest.mark.parametrize(("stage", "gigabytes"), [(1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_7_5b_model_on_64_gpus(stage, gigabytes):
    """ZeRO, Figure 1: 7.5 B parameters in mixed precision, K = 12."""
    assert round(state_bytes(PAPER, Ranks(64, stage)).device / 1e9, 1) == gigabytes


def test_the_7_5b_model_without_sharding():
    """Figure 1's baseline is every shard on one rank."""
    for stage in (1, 2, 3):
        assert state_bytes(PAPER, Ranks(1, stage)).device == 120e9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_torch_holds_what_its_adamw_holds(dtype):
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((7, 5), (11,))]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [x for entry in optimizer.state.values() for x in entry.values() if x.ndim]
    held = state_bytes(Weights("all", 46, dtype.itemsize, trainable=True), Ranks())
    assert held.optimizer == sum(x.nbytes for x in moments)
    assert held.weights == held.gradients == sum(p.nbytes for p in parameters)


def test_frozen_weights_cost_their_weight_alone():
    assert state_bytes(HALF, Ranks(4, 2)).device == 2000
    assert state_bytes(HALF, Ranks(4, 3)).device == 500


def test_zero_3_leaves_whole_what_is_read_outside_of_its_module():
    whole = Weights("rows", 1000, 2, trainable=True, whole=True)
    held = state_bytes(whole, Ranks(4, 3))
    assert (held.weights, held.gradients, held.optimizer) == (2000, 500, 3000)


@pytest.mark.parametrize(
    ("stage", "gradients", "host"),
    [(1, 600, 300 * 12 / 4), (2, 0, 300 * 14 / 4), (3, 0, 300 * 14 / 4)],
)
def test_an_offloaded_optimizer_lies_in_host_memory(stage, gradients, host):
    held = state_bytes(TRAINED, Ranks(4, stage, offload_optimizer=True))
    assert (held.gradients, held.optimizer, held.host) == (gradients, 0, host)


@pytest.mark.parametrize(("stage", "volumes"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_volumes_of_section_7(stage, volumes):
    """2Ψ, and 3Ψ for ZeRO-3 with one walk forward and one backward; on a ring of N, (N − 1)/N of that."""
    sent = traffic([PAPER], Ranks(64, stage), {"all": 2}, {"all": 1})
    assert sum(sent.values()) == pytest.approx(volumes * 15e9 * 63 / 64)


def test_frozen_weights_travel_under_zero_3_alone():
    weights = [HALF, TRAINED, Weights("rows", 50, 4, trainable=True, whole=True)]
    walks, once = {"half": 10, "trained": 4, "rows": 0}, {"trained": 1, "rows": 1}
    two, three = (traffic(weights, Ranks(2, stage), walks, once) for stage in (2, 3))
    assert list(two.values()) == [400, 400, 0]
    # Rows stay whole: they are gathered after their update, not at every walk.
    assert list(three.values()) == [400, 100, (10 * 2000 + 4 * 600) / 2]


def test_stages_2_and_3_reduce_in_every_backward_pass():
    sent = [traffic([TRAINED], Ranks(2, stage), {"trained": 2}, {"trained": 5}) for stage in (1, 2, 3)]
    assert [each["reduce-scatter of gradients"] for each in sent] == [300, 1500, 1500]


def test_one_rank_sends_nothing():
    assert sum(traffic([PAPER], Ranks(1, 3), {"all": 9}, {"all": 9}).values()) == 0


def test_float32_weights_have_no_second_copy_in_plain_torch_and_zero_3():
    weights = Weights("all", 10, 4, trainable=True)
    assert [state_bytes(weights, Ranks(1, stage)).optimizer for stage in (0, 1, 2, 3)] == [80, 120, 120, 80]


def test_buffers():
    assert bucket_bytes([HALF, TRAINED], Ranks()) == 0
    assert bucket_bytes([HALF, TRAINED], Ranks(4, 2)) == 1e9
    assert gathered_bytes([HALF, TRAINED], Ranks(4, 2)) == gathered_bytes([HALF, TRAINED], Ranks(1, 3)) == (0, 0)
    assert gathered_bytes([HALF, TRAINED], Ranks(4, 3)) == (2600, 2600)
    assert gathered_bytes([PAPER], Ranks(4, 3)) == (2e9, 15e9)


def test_seconds_are_bytes_over_bandwidth():
    assert bandwidth(GPUS_PER_NODE) == NVLINK == 450e9
    assert bandwidth(GPUS_PER_NODE + 1) == GPUS_PER_NODE * INFINIBAND == 400e9
    assert communication_seconds({"a": 300e9, "b": 150e9}, 8) == 1
    assert communication_seconds({"a": 300e9, "b": 100e9}, 16) == 1
