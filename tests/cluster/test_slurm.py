"""The Slurm script with a stand-in for Slurm: one node, a real Ray cluster, a real training."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("ray", reason="Ray is not installed: pip install 'stdist[cluster]'")

SCRIPT = Path(__file__).resolve().parents[2] / "cluster" / "slurm.sh"
BIN = Path(sys.executable).parent
PATIENCE = 300
"""Seconds the job may take on a crowded machine."""
CONFIG = {
    "name": "tiny",
    "stages": ["sft"],
    "data": {"store": "city.zarr", "history": 3, "horizon": 2, "region": "0:2,0:2"},
    "numerals": {"mantissa_digits": 2},
    "policy": {"base": "tiny"},
    "sft": {
        **{"trainable": "full", "max_steps": 100000, "windows_per_step": 1, "cells_per_window": 2, "eval_windows": 1},
        **{"logging_steps": 1, "save_steps": 100000, "eval_steps": 100000, "warmup_steps": 1},
    },
}
# srun runs the command behind its options; `ray start` gets a store that this machine has room for.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
case "$1 $2" in "ray start") set -- "$@" --object-store-memory=100000000 --min-worker-port=0 --max-worker-port=0 ;; esac
exec "$@"
"""


@pytest.fixture
def job(tmp_path) -> "subprocess.Popen[str]":
    """``sbatch cluster/slurm.sh tiny.yaml`` on one node of its own, in a process group of its own."""
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho localhost\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | {"PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    size = ["--height", "3", "--width", "3", "--days", "8", "--cadence", "60"]
    subprocess.run(
        ["stdist", "prepare", "synthetic", "--out", "city.zarr", *size],
        **{"cwd": tmp_path, "env": environment, "check": True, "capture_output": True},
    )
    slurm = {"JOB_ID": str(os.getpid()), "JOB_NODELIST": "n", "JOB_NUM_NODES": "1", "CPUS_PER_TASK": "2"}
    process = subprocess.Popen(
        ["bash", str(SCRIPT), "tiny.yaml"],
        **{"cwd": tmp_path, "env": environment | {f"SLURM_{name}": value for name, value in slurm.items()}},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)
        shutil.rmtree(f"/tmp/ray-{os.getpid()}", ignore_errors=True)


def test_a_job_near_its_end_saves_its_step_and_leaves_no_cluster_behind(job, tmp_path):
    """Slurm's signal reaches the script alone, as --signal=B: says."""
    log = tmp_path / "runs" / "tiny" / "log.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline, "no step in time"
        time.sleep(0.1)
    job.send_signal(signal.SIGINT)
    output, _ = job.communicate(timeout=PATIENCE)  # every process that holds the pipe has ended
    assert job.returncode == 130, output
    step = json.loads(log.read_text().splitlines()[-1])["step"]
    assert f"interrupted: sft: stopped at step {step} and saved" in output
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / "sft" / "latest").read_text() == f"step-{step}"


def test_a_job_without_a_configuration_says_how_to_submit_it():
    result = subprocess.run(["bash", SCRIPT], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr == "usage: sbatch cluster/slurm.sh CONFIG [key=value ...]\n"
