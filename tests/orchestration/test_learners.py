"""Learners as a Ray Train group on a cluster of this machine: whatever is killed, the run ends as if nothing were."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'stdist[cluster]'")
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'stdist[cluster]'")

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
PATIENCE = 500
"""Seconds something may take on a crowded machine."""
TOKEN = secrets.token_hex(16)
ZERO2 = ["learners.engine=deepspeed", "learners.num_workers=2", "learners.zero_stage=2"]
PROGRAM = """
import sys
from stdist.cli import main
from stdist.orchestration import learners

here, folder, file_size = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))

def learn(tree):
    import resource, sys
    from pathlib import Path
    from stdist.orchestration.learners import _learn

    sys.path.insert(0, here)
    import traps
    traps.install(Path(folder))
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    return _learn(tree)

learners._learn = learn
main()
"""
"""``stdist``, whose learners know traps, and where a size is given cannot write larger files, as on a full disk."""


@contextmanager
def raylet(*options: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A node; everything it started ends with it."""
    process = subprocess.Popen(
        [
            *[str(BIN / "ray"), "start", "--block", "--disable-usage-stats", "--object-store-memory=100000000"],
            *["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0", *options],
        ],
        env=environment(),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def environment(**changes: str) -> dict[str, str]:
    """Without settings of Ray's other than these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return (
        kept
        | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        | changes
    )


def wait_for(condition: Callable[[], object], otherwise: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a head with room for two learners."""
    folder = tempfile.mkdtemp(prefix="ray-")  # pytest's are too long for Unix sockets
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        port, client = one.getsockname()[1], other.getsockname()[1]
    head = ["--head", f"--port={port}", f"--temp-dir={folder}", "--num-cpus=2", "--include-dashboard=false"]
    with raylet(*head, f"--ray-client-server-port={client}") as process:
        wait_for(lambda: process.poll() is not None or listens(port), lambda: "no head")
        assert process.poll() is None
        yield f"127.0.0.1:{port}"
    shutil.rmtree(folder, ignore_errors=True)


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


class Driver:
    """``stdist train`` of one run on the cluster. ``trap``: see traps.py."""

    def __init__(self, runs, cluster: str, folder: Path, name: str, *overrides: str, trap: str = "", file_size=0):
        self.folder, self.trapped = folder, folder / "trapped"
        self.trapped.unlink(missing_ok=True)
        if trap:
            (folder / "trap").write_text(trap)
        self.process = subprocess.Popen(
            [
                *[sys.executable, "-c", PROGRAM, str(HERE), str(folder), str(file_size)],
                *["train", str(runs.config), "--json", f"name={name}", *overrides],
            ],
            env=environment(RAY_ADDRESS=cluster),
            stdout=subprocess.PIPE,
            stderr=(folder / "stderr.txt").open("w"),
            text=True,
        )

    def pid_in_trap(self) -> int:
        """Of the learner that came there, once it is there."""
        wait_for(lambda: self.trapped.exists() or self.process.poll() is not None, lambda: self.errors)
        assert self.process.poll() is None, self.errors
        return int(self.trapped.read_text())

    def release(self) -> None:
        (self.folder / "trap").unlink()

    @property
    def errors(self) -> str:
        return (self.folder / "stderr.txt").read_text()

    def end(self) -> int:
        self.process.communicate(timeout=PATIENCE)
        return self.process.returncode


@pytest.fixture
def start(runs, cluster, tmp_path) -> Iterator[Callable[..., Driver]]:
    drivers = []

    def begin(*arguments: str, **options: str) -> Driver:
        drivers.append(Driver(runs, cluster, tmp_path, *arguments, **options))
        return drivers[-1]

    yield begin
    for driver in drivers:
        driver.process.kill()
        driver.process.communicate()


@pytest.mark.slow
def test_a_learner_killed_in_mid_step(start, runs, undisturbed):
    driver = start("killed-learner", *ZERO2, trap="step sft 5 1")
    pid = driver.pid_in_trap()
    assert (runs / "killed-learner" / "checkpoints" / "sft" / "latest").read_text() == "step-3"
    os.kill(pid, signal.SIGKILL)
    driver.release()
    assert driver.end() == 0, driver.errors
    runs.require_same("killed-learner", undisturbed)


@pytest.mark.slow
def test_a_learner_killed_with_half_a_checkpoint_written(start, runs, undisturbed):
    driver = start("killed-writer", *ZERO2, trap="checkpoint sft 6 1")
    pid = driver.pid_in_trap()
    os.kill(pid, signal.SIGKILL)
    driver.release()
    assert driver.end() == 0, driver.errors
    runs.require_same("killed-writer", undisturbed)


@pytest.mark.slow
def test_a_killed_driver(start, runs, undisturbed):
    """Its learners end with it; the same command goes on."""
    driver = start("killed-driver", *ZERO2, trap="step sft 5 0")
    learner = driver.pid_in_trap()
    driver.process.kill()
    wait_for(lambda: not Path(f"/proc/{learner}").exists(), lambda: "the learner goes on")
    driver.release()
    again = start("killed-driver", *ZERO2)
    assert again.end() == 0, again.errors
    runs.require_same("killed-driver", undisturbed)


@pytest.mark.slow
def test_ctrl_c(start, runs, undisturbed):
    driver = start("ctrl-c", *ZERO2, trap="step sft 5 1")
    learner = driver.pid_in_trap()
    driver.process.send_signal(signal.SIGINT)
    assert driver.end() == 130, driver.errors
    assert "interrupted: stopped; run the same command to go on from the newest checkpoint" in driver.errors
    assert "Traceback" not in driver.errors
    wait_for(lambda: not Path(f"/proc/{learner}").exists(), lambda: "the learner goes on")
    driver.release()
    again = start("ctrl-c", *ZERO2)
    assert again.end() == 0, again.errors
    runs.require_same("ctrl-c", undisturbed)


@pytest.mark.slow
def test_a_hung_learner(start, runs, undisturbed):
    """It never answers again: the others wait ``learners.timeout`` seconds, then the group starts without it."""
    driver = start("hung", *ZERO2, "learners.timeout=15", trap="step sft 5 1")
    learner = driver.pid_in_trap()
    os.kill(learner, signal.SIGSTOP)
    driver.release()
    assert driver.end() == 0, driver.errors
    assert not Path(f"/proc/{learner}").exists()
    runs.require_same("hung", undisturbed)


@pytest.mark.slow
def test_a_full_disk(start, runs, undisturbed):
    """One line and exit code 5, and no second try; with room the same command finishes."""
    driver = start("full-disk", *ZERO2, file_size=200_000)
    assert driver.end() == 5, driver.errors
    lines = driver.errors.splitlines()
    assert len([line for line in lines if line.startswith("error: ") and "could not be written" in line]) == 1, lines
    assert len([line for line in lines if "training windows" in line]) == 1 and "Traceback" not in driver.errors
    assert sorted(path.name for path in (runs / "full-disk" / "checkpoints" / "alignment").iterdir()) == []
    again = start("full-disk", *ZERO2)
    assert again.end() == 0, again.errors
    runs.require_same("full-disk", undisturbed)


@pytest.mark.slow
def test_a_lost_node(start, runs, cluster, undisturbed):
    """A learner on each of two nodes; the head has room for both."""
    with raylet(f"--address={cluster}", "--num-cpus=1") as node:
        wait_for(lambda: children(node.pid, "raylet"), lambda: "no second node")
        driver = start("lost-node", *ZERO2, "learners.placement_strategy=SPREAD", trap="step sft 5 0")
        driver.pid_in_trap()
        for process in [*children(node.pid, "raylet"), node.pid]:
            os.kill(process, signal.SIGKILL)
        driver.release()
        assert driver.end() == 0, driver.errors
    assert "lost learner" in driver.errors
    runs.require_same("lost-node", undisturbed)


def children(parent: int, name: str) -> list[int]:
    """Processes called ``name`` that ``parent`` started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = stat.read_text().split(" (", 1)
        except OSError:
            continue
        called, fields = rest.rsplit(") ", 1)
        if called == name and int(fields.split()[1]) == parent:
            found.append(int(pid))
    return found
