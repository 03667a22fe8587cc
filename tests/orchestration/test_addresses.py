"""A cluster that is not there, or that wants something else, is one line and not Ray's two minutes of trying."""

import os
import subprocess
import sys

import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'stdist[cluster]'")

from ray.exceptions import AuthenticationError  # noqa: E402

from stdist.errors import InputError, ResourceError  # noqa: E402
from stdist.orchestration.preparation import ray_executor  # noqa: E402


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:1", "nothing answers at 127.0.0.1:1 (Connection refused); check host and port"),
        ("ray://127.0.0.1:1", "nothing answers at ray://127.0.0.1:1 (Connection refused)"),
        ("nowhere", "nowhere is no address of a Ray cluster; write HOST:6379, ray://HOST:10001, auto or local"),
        ("host:port", "host:port is no address of a Ray cluster"),
    ],
)
def test_a_wrong_address_is_one_line_at_once(address, expected):
    """Ray itself tries for two minutes and then ends the process."""
    with pytest.raises(InputError) as refused, ray_executor(address):
        pass
    assert expected in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            ConnectionError("Could not find any running Ray instance. Please"),
            "Could not find any running Ray instance;",
        ),
        (
            RuntimeError("Version mismatch: The cluster\nwas started with Ray: 2.59"),
            "The cluster was started with Ray: 2.59;",
        ),
        (AuthenticationError("No token was found. Ensure that"), "No token was found; see that one runs there"),
        (
            SystemExit(15),
            "at auto: SystemExit; see that one runs there (`ray status`), with this version of Ray, and that",
        ),
    ],
)
def test_what_ray_says_becomes_one_line(monkeypatch, error, expected):
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(InputError) as refused, ray_executor("auto"):
        pass
    assert expected in str(refused.value) and "\n" not in str(refused.value)


OWN_CLUSTER = """
import os, stat, psutil, ray
from pathlib import Path
from stdist.orchestration.cluster import connected
with connected(None, log_to_driver=False):
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    sockets = [socket for process in processes for socket in process.net_connections("inet")]
    listening = {socket.laddr.ip.removeprefix("::ffff:") for socket in sockets if socket.status == "LISTEN"}
    token = Path.home() / ".ray" / "auth_token"
    seven = ray.get(ray.remote(lambda: 7).remote())
    print(sorted(listening), oct(stat.S_IMODE(token.stat().st_mode)), seven, len(processes) > 3)
"""


@pytest.mark.parametrize("token", [None, "made before"])
def test_a_cluster_of_ones_own_is_ones_own(tmp_path, token):
    """It listens to this machine alone, and nobody else reads its token."""
    (tmp_path / ".ray").mkdir()
    if token:
        (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    program = [sys.executable, "-c", OWN_CLUSTER]
    ended = subprocess.run(program, env=kept | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=300)
    assert ended.stdout == "['127.0.0.1'] 0o600 7 True\n", ended.stdout + ended.stderr


def test_a_cluster_of_ones_own_that_does_not_come_up(monkeypatch):
    """Ray waits for its own processes, and then raises an exception of no kind."""

    def time_out(*_: object, **__: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because\nsome of the raylet")

    monkeypatch.setattr(ray, "init", time_out)
    with pytest.raises(ResourceError) as refused, ray_executor("local"):
        pass
    assert str(refused.value).startswith(
        "Ray did not start on this machine: The current node timed out during startup;"
    )
    assert "\n" not in str(refused.value)
