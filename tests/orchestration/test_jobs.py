"""``stdist submit`` on a real Ray cluster of this machine: dashboard, job server and a token, as Ray starts them."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray", reason="Ray is not installed: pip install 'stdist[cluster]'")

from stdist.errors import InputError
from stdist.orchestration import jobs

PATIENCE = 300
"""Seconds something may take on a crowded machine."""
TOKEN = secrets.token_hex(16)
BIN = Path(sys.executable).parent
CLOSED = "http://127.0.0.1:1"
"""Nobody listens here: what is refused with another line was refused before the cluster was asked."""
# Two steps of the recipe that starts quickest: a job is a command, and knows no recipe.
CONFIG: dict[str, Any] = {
    "recipe": "urbanpg-train",
    "name": "tiny",
    "data": {"store": "city.zarr", "history": 3, "horizon": 2, "region": "0:2,0:2"},
    "model": {"d": 4},
    "training": {"max_epochs": 1, "train_batch_size": 50, "logging_steps": 1, "warmup_steps": 1},
}


def environment(**changes: str) -> dict[str, str]:
    """Without settings of Ray's other than these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | changes


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path_factory) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of the dashboard of a head of its own; everything it started ends with it."""
    folder = tempfile.mkdtemp(prefix="ray-")  # pytest's are too long for Unix sockets
    dashboard, client = free_ports(2)
    head = subprocess.Popen(
        [
            *[str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", f"--temp-dir={folder}"],
            *["--num-cpus=2", "--object-store-memory=100000000", "--include-dashboard=true", "--port=0"],
            *[f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"],
            *["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"],
        ],
        env=environment(RAY_AUTH_TOKEN=TOKEN),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(lambda: head.poll() is not None or answers(address), "no dashboard")
        assert head.poll() is None, head.stdout.read()
        yield address
    finally:
        head.terminate()  # it ends its processes, and they their jobs
        try:
            head.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.communicate()
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports


def answers(address: str) -> bool:
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {TOKEN}"})
    try:
        return urllib.request.urlopen(request, timeout=10).status == 200
    except OSError:
        return False


def wait_for(condition: Callable[[], object], otherwise: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A working directory: tiny.yaml, its store, and a run of long ago that is too large for any upload."""
    folder = tmp_path_factory.mktemp("project")
    size = ["--height", "3", "--width", "3", "--days", "8", "--cadence", "60", "--seed", "1"]
    subprocess.run(
        [str(BIN / "stdist"), "prepare", "synthetic", "--out", "city.zarr", *size],
        **{"cwd": folder, "env": environment(), "check": True, "capture_output": True},
    )
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    large_file(folder / "runs" / "old" / "weights")
    return folder


def large_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(101 * 2**20)


def command(folder: Path, *arguments: str, **settings: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        arguments,
        **{"cwd": folder, "env": environment(RAY_AUTH_TOKEN=TOKEN, **settings), "text": True},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def submit(folder: Path, *arguments: str, **settings: str) -> "subprocess.Popen[str]":
    return command(folder, str(BIN / "stdist"), "submit", *arguments, **settings)


def finished(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def require_artefacts(run: Path) -> None:
    assert json.loads((run / "report" / "metrics.json").read_text())
    assert (run / "report" / "index.html").is_file()
    stage = run / "checkpoints" / "train"
    assert (stage / "finished.json").is_file() and (stage / "latest").read_text().strip() == "step-2"
    assert [line["step"] for line in log(run) if "loss" in line] == [1, 2]


def log(run: Path) -> list[dict[str, Any]]:
    path = run / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_training_as_a_job_leaves_its_run_where_it_was_submitted(cluster, project):
    """Ray's own variables would send it elsewhere; they do not count beside --address."""
    code, out, err = finished(submit(project, "tiny.yaml", "--address", cluster, "--json", RAY_ADDRESS=CLOSED))
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["status"] == "SUCCEEDED" and Path(result["run"]) == project / "runs" / "tiny"
    assert "test MAE" in err  # the job's log
    require_artefacts(project / "runs" / "tiny")


def test_a_forecast_as_a_job_is_the_file_of_one_process(cluster, project):
    """By workers of the cluster, with the run of the test above, relative paths and all."""
    options = ["--region", "0:2,0:2", "--origin", "2013-11-08T05:00", "--horizon", "1", "--no-quantiles"]
    request = ["runs/tiny", "--forecast", "city.zarr", "--out", "swept.zarr", "--workers", "1", *options]
    code, out, err = finished(submit(project, *request, "--address", cluster, "--json"))
    assert code == 0, err
    assert Path(json.loads(out.splitlines()[-1])["out"]) == project / "swept.zarr"
    alone = [str(BIN / "stdist"), "forecast", "runs/tiny", "city.zarr", "--out", "alone.zarr", *options]
    code, _, err = finished(command(project, *alone))
    assert code == 0, err
    ours, theirs = (
        {str(p.relative_to(project / name)): p.read_bytes() for p in (project / name).rglob("*") if p.is_file()}
        for name in ("swept.zarr", "alone.zarr")
    )
    assert ours and ours == theirs


def test_plain_ray_job_submit_runs_the_same_program(cluster, project):
    places = [f"data.store={project / 'city.zarr'}", f"output_dir={project / 'runs'}"]
    ray = [str(BIN / "ray"), "job", "submit", "--address", cluster, "--working-dir", "."]
    (project / ".rayignore").write_text("*.zarr\nruns\n")
    code, out, err = finished(
        command(project, *ray, "--", "stdist", "train", "tiny.yaml", "name=plain", *places, RAY_AUTH_MODE="token")
    )
    assert code == 0, out + err
    require_artefacts(project / "runs" / "plain")


def test_a_failed_job_gives_its_line_and_its_exit_code(cluster, project):
    code, out, err = finished(submit(project, "tiny.yaml", "data.store=nowhere.zarr", "--address", cluster))
    assert code == 2 and out == ""
    line = err.splitlines()[-1]
    assert line.startswith("error: job raysubmit_") and f"failed: {project / 'nowhere.zarr'}" in line


def test_ctrl_c_detaches_and_stop_saves_the_step(cluster, project):
    run, there = project / "runs" / "long", ["--submission-id", "long", "--address", cluster]
    arguments = ["tiny.yaml", "name=long", "training.max_epochs=100000", "training.patience=100000", *there]
    process = submit(project, *arguments)
    wait_for(lambda: process.poll() is not None or len(log(run)) > 2, "no step in time")
    process.send_signal(signal.SIGINT)
    code, _, err = finished(process)
    assert code == 130, err
    assert f"interrupted: job long goes on; follow it with `ray job logs --follow long --address {cluster}`" in err
    steps = len(log(run))
    wait_for(lambda: len(log(run)) > steps + 2, "the job does not go on")

    code, _, err = finished(submit(project, *arguments))
    assert code == 2 and f"error: there is a job long at {cluster}; choose another --submission-id" in err

    code, out, err = finished(submit(project, "--stop", "long", "--address", cluster))
    assert (code, out) == (0, "long: STOPPED\n"), err
    assert (run / "checkpoints" / "train" / "latest").read_text().strip() == f"step-{log(run)[-1]['step']}"
    assert jobs.find(cluster, "long").stop().status == "STOPPED"  # again


def test_a_detached_job_is_named_at_once(cluster, project):
    arguments = ["tiny.yaml", "data.store=nowhere.zarr", "--detach", "--submission-id", "quick", "--json"]
    code, out, err = finished(submit(project, *arguments, "--address", cluster))
    assert code == 0, err
    assert json.loads(out) == {"submission_id": "quick", "run": str(project / "runs" / "tiny")}


def test_tokens_and_ids_a_cluster_does_not_know(cluster, project, monkeypatch):
    with pytest.raises(InputError, match=f"no job nobody at {cluster}; `ray job list --address {cluster}` names them"):
        jobs.find(cluster, "nobody").stop()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "guess")
    with pytest.raises(InputError, match=f"^{cluster} refuses the token of RAY_AUTH_TOKEN; take the head's"):
        jobs.submit(Path("tiny.yaml"), [], cluster, project)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    with pytest.raises(InputError, match=f"^{cluster} asks for a token and there is none; put the head's"):
        jobs.submit(Path("tiny.yaml"), [], cluster, project)


def test_the_token_is_found_in_the_files_ray_reads(cluster, monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    default = Path.home() / ".ray" / "auth_token"
    default.parent.mkdir()
    default.write_text(TOKEN + "\n")
    assert jobs.find(cluster, "any").submission_id == "any"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"RAY_AUTH_TOKEN_PATH: .*none cannot be read"):
        jobs.find(cluster, "any")
