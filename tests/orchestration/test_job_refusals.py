"""What ``stdist submit`` refuses before a cluster is asked, and what it makes of a job's log and end."""

import http.server
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'stdist[cluster]'")

from ray.job_submission import JobDetails, JobStatus

from stdist.config import LearnersConfig
from stdist.errors import InputError, ResourceError
from stdist.orchestration import jobs

CLOSED = "http://127.0.0.1:1"
"""Nobody listens here: what is refused with another line was refused before."""


@pytest.fixture(autouse=True)
def _no_token(monkeypatch, tmp_path_factory) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_RUNTIME_ENV_IGNORE_GITIGNORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


# --- a log and its end, as a client gives them -----------------------------------------------------------------------


class Client:
    """Of a job whose log is read in ``attempts``; an attempt ends with an error or with its last piece."""

    def __init__(self, attempts: list[list[str | Exception]], *ends: JobDetails | Exception) -> None:
        self.attempts, self.ends = iter(attempts), iter(ends)

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        for piece in next(self.attempts):
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def get_job_info(self, _: str) -> JobDetails:
        end = next(self.ends)
        if isinstance(end, Exception):
            raise end
        return end


def details(status: JobStatus, **more: Any) -> JobDetails:
    return JobDetails(type="SUBMISSION", status=status, entrypoint="stdist train", **more)


def follow(client: Client) -> tuple[jobs.JobEnd, str]:
    shown: list[str] = []
    return jobs.Job(client, CLOSED, "one").follow(shown.append), "".join(shown)


def test_a_broken_connection_shows_nothing_twice():
    attempts = [["step 1\n", "ste", RuntimeError("closed")], ["step 1\nst", "ep 2\n"]]
    end, shown = follow(Client(attempts, details(JobStatus.RUNNING), details(JobStatus.SUCCEEDED)))
    assert shown == "step 1\nstep 2\n" and end == jobs.JobEnd("one", "SUCCEEDED", 0)


def test_a_lost_cluster_is_one_line():
    with pytest.raises(ResourceError, match=f"{CLOSED} answers no more; as long as the cluster lives job one goes on"):
        follow(Client([[OSError()]], ConnectionError()))


@pytest.mark.parametrize(
    ("code", "message", "exit_code", "error"),
    [
        (3, "last logs:\nerror: sft: loss is nan\nsee the log\n", 3, "sft: loss is nan"),
        (1, "Traceback:\n  File\nKeyError: 'x'\n", 1, "KeyError: 'x'"),
        (-9, "No logs available.", 137, "No logs available."),
        (None, None, 1, "no message"),
    ],
)
def test_how_a_job_failed(code, message, exit_code, error):
    end, _ = follow(Client([[]], details(JobStatus.FAILED, driver_exit_code=code, message=message)))
    assert end == jobs.JobEnd("one", "FAILED", exit_code, error)


# --- refused on this machine, without a cluster ----------------------------------------------------------------------


def test_a_command_with_neither_a_configuration_nor_a_job_to_stop(tmp_path):
    command = [sys.executable, "-c", "from stdist.cli import main; main()", "submit", "--address", CLOSED]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: submit takes the CONFIG of a job to run, or --stop ID of one to end\n"


def refusal(*arguments: Any) -> str:
    with pytest.raises(InputError) as refused:
        jobs.submit(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def large_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(101 * 2**20)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "tiny.yaml").write_text("name: tiny\ndata: {store: city.zarr}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("config", "overrides", "expected"),
    [
        ("none.yaml", [], "none.yaml does not exist"),
        ("tiny.yaml", ["sft.max_step=3"], "unknown key 'sft.max_step'; did you mean 'max_steps'?"),
        ("tiny.yaml", ["sft.max_steps=no"], "sft.max_steps"),
        ("../tiny.yaml", [], "lies outside the working directory"),
    ],
)
def test_a_configuration_the_job_could_not_run(folder, config, overrides, expected):
    assert expected in refusal(Path(config), overrides, CLOSED, folder)


def test_a_working_directory_without_what_the_job_needs(folder):
    assert "does not exist; correct --working-dir" in refusal(Path("tiny.yaml"), [], CLOSED, folder / "none")
    (folder / ".gitignore").write_text("*.yaml\n")
    assert "tiny.yaml is kept from the job by .gitignore" in refusal(Path("tiny.yaml"), [], CLOSED, folder)


def test_a_working_directory_too_large_for_ray_is_named_with_its_largest_parts(folder):
    for kept in ("runs", "city.zarr", "other.zarr", ".git", "ignored"):
        large_file(folder / kept / "file")
    (folder / ".gitignore").write_text("ignored/\n")
    assert "nothing answers" in refusal(Path("tiny.yaml"), [], CLOSED, folder)
    large_file(folder / "models" / "deep" / "weights")
    line = refusal(Path("tiny.yaml"), [], CLOSED, folder)
    assert "has 101 MiB to upload and Ray takes 100 MiB; largest: models 101 MiB, " in line and ".rayignore" in line


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:8265", "127.0.0.1:8265 is no address of a Ray dashboard; write http://HOST:8265"),
        ("http://host:port", "http://host:port is no Ray dashboard"),
        (CLOSED, f"nothing answers at {CLOSED} (Connection refused)"),
        ("http://no.such.host.invalid:8265", "nothing answers at http://no.such.host.invalid:8265 ("),
    ],
)
def test_a_wrong_address(folder, address, expected):
    assert expected in refusal(Path("tiny.yaml"), [], address, folder)


@pytest.mark.parametrize(("status", "body"), [(200, b"<html>hello"), (404, b""), (200, b"")])
def test_an_address_of_something_else(folder, status, body):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        line = refusal(Path("tiny.yaml"), [], address, folder)
        server.shutdown()
        thread.join()
    assert line.startswith(f"what answers at {address} is no Ray dashboard")


def test_an_address_that_stays_silent(folder, monkeypatch):
    monkeypatch.setattr(jobs, "ANSWER_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert f"nothing answers at {address} (timed out)" in refusal(Path("tiny.yaml"), [], address, folder)


def test_ray_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.job_submission", None)
    monkeypatch.delitem(sys.modules, "stdist.orchestration.jobs")
    with pytest.raises(InputError, match=r"Ray is not installed; pip install 'stdist\[cluster\]'"):
        from stdist.orchestration.jobs import submit  # noqa: F401


def test_a_single_learner_claims_its_resources_and_several_claim_their_own():
    one = LearnersConfig(resources_per_worker={"GPU": 1, "CPU": 4, "accelerator_type:A100": 0.01})
    assert jobs._claims(one) == {
        **{"entrypoint_num_gpus": 1, "entrypoint_num_cpus": 4},
        "entrypoint_resources": {"accelerator_type:A100": 0.01},
    }
    several = LearnersConfig(num_workers=2, engine="deepspeed", resources_per_worker={"GPU": 1})
    assert jobs._claims(several) == {}


def test_a_forecast_needs_a_run_and_a_file_to_write(tmp_path):
    """Refused on this machine, before anybody is asked."""
    main = [sys.executable, "-c", "from stdist.cli import main; main()", "submit", "runs/x", "--address", CLOSED]
    for arguments, expected in (
        (["--forecast", "city.zarr"], "--forecast needs --out NAME.zarr, .parquet or .csv"),
        (["--forecast", "city.zarr", "--out", "x.xlsx"], "x.xlsx: forecasts are files of .zarr, .parquet or .csv, not"),
        (["--forecast", "city.zarr", "--out", "x.zarr"], "runs/x is no run folder"),
        (["--forecast", "city.zarr", "--out", "x.zarr", "--workers", "0"], "--workers is 0; give at least 1"),
    ):
        end = subprocess.run([*main, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert end.returncode == 2 and expected in end.stderr and "Traceback" not in end.stderr


# --- the token -------------------------------------------------------------------------------------------------------


def _serve(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> http.server.HTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_the_token_goes_nowhere_else(monkeypatch, code):
    """urllib would send it along to any host."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    reached: list[str | None] = []

    def elsewhere(request: http.server.BaseHTTPRequestHandler) -> None:
        reached.append(request.headers.get("Authorization"))
        request.send_response(200)
        request.end_headers()
        request.wfile.write(b'{"ray_version": "2.60.0"}')

    other = _serve(elsewhere)
    target = f"http://localhost:{other.server_port}/api/version"

    def redirect(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        request.send_header("Location", target)
        request.end_headers()

    first = _serve(redirect)
    try:
        address = f"http://127.0.0.1:{first.server_port}"
        with pytest.raises(InputError, match=f"^{address} sends on to {target}, and the token goes nowhere else"):
            jobs.find(address, "one")
        assert reached == []
    finally:
        for server in (first, other):
            server.shutdown()
            server.server_close()
