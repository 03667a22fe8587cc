"""Devices by name: figures of data sheets, and what of them a user may replace."""

import pytest

from stdist.errors import InputError
from stdist.runs.devices import DEVICES, Device, device


@pytest.mark.parametrize(
    ("name", "gigabytes", "teraflops"),
    [("5090", 32, 209.5), ("4090", 24, 165.2), ("a100-40", 40, 312), ("h200", 141, 989), ("l40s", 48, 362)],
)
def test_figures_of_the_data_sheets_are_dense(name, gigabytes, teraflops):
    """None is the number with sparsity, twice as large, that a sheet prints first."""
    assert device(name) == Device(gigabytes * 10**9, teraflops * 1e12, mfu=0.22)


def test_what_is_given_wins_over_the_name():
    assert device("H100", memory=7, mfu=0.5) == Device(7, 989e12, 0.5)
    assert device("4090", flops=1e12) == Device(24 * 10**9, 1e12, 0.22)
    assert device() == Device(None, 989e12, 0.22)
    assert device(flops=100e12, mfu=0.25).sustained == 25e12


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(InputError, match=r"--device 'a100' is not known; nearest: a100-40, a100-80; "):
        device("a100")
    with pytest.raises(InputError, match="--device-memory and --device-flops"):
        device("zx81")


@pytest.mark.parametrize("figures", [{"flops": float("nan")}, {"flops": -1.0}, {"mfu": 22.0}, {"mfu": 0.0}])
def test_figures_that_cannot_be(figures):
    with pytest.raises(InputError, match=r"--device-flops is|--mfu is"):
        device(**figures)
    assert all(0 < each.mfu <= 1 for each in DEVICES.values())
