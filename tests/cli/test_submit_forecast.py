"""A forecast submitted as a job is the forecast that the same options ask for at once."""

import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest

from .conftest import line_of

pytest.importorskip("ray", reason="Ray is not installed: pip install 'stdist[cluster]'")

ADDRESS = ("--address", "http://127.0.0.1:9")


@pytest.fixture
def asked(stdist, world, monkeypatch):
    """The request and the workers that a command line ends in; nothing is forecast."""
    from stdist.orchestration.policy_workers import sweep
    from stdist.runs import recipes

    def request_of(*arguments):
        requests = []
        with monkeypatch.context() as patch:
            patch.setattr(recipes, "forecast", lambda request, _: requests.append((request, None, None)) or {})
            patch.setattr(sweep, "sweep", lambda *given: requests.append(given[:-1]) or {})
            assert stdist(*arguments).code == 0
        return requests[0]

    return request_of


@pytest.fixture
def entrypoint(stdist, world, monkeypatch):
    """The command of the job that a command line submits."""
    from stdist.orchestration import jobs

    def command_of(*arguments):
        sent = []
        client = SimpleNamespace(submit_job=lambda **job: sent.append(job["entrypoint"]) or "job")
        with monkeypatch.context() as patch:
            patch.setattr(jobs, "_connect", lambda address: client)
            result = stdist("submit", *arguments, *ADDRESS, "--detach")
            assert (result.code, result.out) == (0, "job\n"), result
        return shlex.split(sent[0])

    return command_of


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--region", "0:2", "--split", "validation", "--no-quantiles"],
        ["--split", "2019-01-20:2019-01-21", "--horizon", "1", "--quantiles", "--cost-ratio", "0.1"],
        ["--next", "--places", "all"],
        ["--channel", "calls"],
        ["--origin", "2019-01-20 05:00", "--places", "it's, 4", "--horizon", "2", "--cost-ratio", "3"],
    ],
)
def test_the_job_gets_the_request_that_the_command_gets(asked, entrypoint, world, options):
    program, *job = entrypoint("runs/n", "--forecast", "z.zarr", "--out", "f.csv", "--workers", "3", *options)
    assert program == "stdist"
    at_once, _, _ = asked("forecast", "runs/n", "z.zarr", "--out", "f.csv", *options)
    paths = {name: world / getattr(at_once, name) for name in ("run_dir", "store", "out")}
    assert asked(*job) == (replace(at_once, **paths), 3, "auto")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--region", "0:2", "--places", "1"], "--region and --places both say which places"),
        (["--next", "--split", "test"], "--split names past windows"),
        (["--origin", "2019-01-20", "--split", "test"], "--split names past windows"),
    ],
)
def test_both_commands_refuse_the_same(stdist, world, options, said):
    lines = [
        line_of(stdist(*command, "--out", "f.csv", *options), 2)
        for command in (["forecast", "runs/n", "z.zarr"], ["submit", "runs/n", "--forecast", "z.zarr", *ADDRESS])
    ]
    assert lines[0] == lines[1] and said in lines[0]


@pytest.mark.parametrize("option", [["--no-quantiles"], ["--next"], ["--split", "test"], ["--workers", "2"]])
def test_a_training_has_nothing_to_forecast(stdist, world, option):
    assert "name a store by --forecast" in line_of(stdist("submit", "c.yaml", *ADDRESS, *option), 2)
