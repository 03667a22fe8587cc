"""A run that does not fit its GPU is refused before anything is loaded. A device of the plan stands for the GPU."""

import pytest

from stdist.errors import InputError
from stdist.runs import fit, training
from stdist.runs.devices import Device
from stdist.runs.memory_plan import Ranks, Weights
from stdist.runs.plan import RunPlan, StagePlan


def plan(device: Device) -> RunPlan:
    """Two stages that hold 1,000 and 3,000 bytes."""
    stages = [
        StagePlan(name, "all", Ranks(), [Weights("all", 250, 4)], {"training": {"activations": more}}, 0, {}, {})
        for name, more in (("first", 0), ("second", 2000))
    ]
    verdicts = [f"{stage.stage}: {stage.device_bytes:.0f} of {device.memory}" for stage in stages]
    return RunPlan(stages, verdicts if device.memory else [], [])


def test_only_what_cannot_fit_is_refused():
    said: list[str] = []
    fit.require_fit(plan, Device(3000), False, said.append)
    assert len(said) == 1 and said[0].startswith("every stage fits this device on paper (planned in 0 s)")
    with pytest.raises(InputError, match=r"^second: 3000 of 2999; --force trains all the same$"):
        fit.require_fit(plan, Device(2999), False, said.append)


def test_force_goes_on_and_says_so():
    said: list[str] = []
    fit.require_fit(plan, Device(500), True, said.append)
    assert said[0].startswith("first: 1000 of 500; second: 3000 of 500 (") and said[0].endswith("as --force says")


def test_nothing_is_planned_where_no_device_is_known():
    def refuse(device: Device) -> RunPlan:
        raise AssertionError("planned on a CPU")

    fit.require_fit(refuse, None, False, print)
    fit.require_fit(refuse, Device(), False, print)


def test_advice_is_the_plans_for_a_tenth_less_and_never_an_error():
    assert fit.advice(plan, "second") == "second: 3000 of 2700"

    def broken(device: Device) -> RunPlan:
        raise RuntimeError("can't allocate memory")

    assert fit.advice(broken, "second") == ""


def test_a_training_asks_before_it_begins_and_not_where_it_goes_on(monkeypatch, stdist, refused, config):
    monkeypatch.setattr(training, "this_device", lambda: Device(1000))
    line = refused("train", config, "stages=[alignment]")
    assert "alignment: " in line and "does not fit" in line and line.endswith("; --force trains all the same")
    forced = stdist("train", config, "stages=[alignment]", "--force")
    assert forced.code == 0 and "going on, as --force says" in forced.err
    again = stdist("train", config, "stages=[alignment]")
    assert again.code == 0 and "does not fit" not in again.err
