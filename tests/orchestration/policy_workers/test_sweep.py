"""``stdist forecast --workers``: the file is the one that a single process writes, byte for byte, whoever dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from threading import Thread

import psutil
import pytest

from stdist.errors import InputError, ResourceError
from stdist.files import read_sealed
from stdist.orchestration.policy_workers import sweep as sweep_module
from stdist.orchestration.policy_workers.pool import wait_for_answers
from stdist.orchestration.policy_workers.sweep import sweep
from stdist.runs import recipes
from stdist.runs.forecast_request import ForecastRequest
from stdist.runs.workers import WorkKey
from stdist.vision_llm.rollout import forecaster

pytest.importorskip("ray", reason="Ray is not installed: pip install 'stdist[cluster]'")


@pytest.fixture(scope="module")
def trained(runs, alone: Callable[..., None]) -> Path:
    alone("swept", "stages=[sft]", "sft.max_steps=2", "sft.save_steps=2", "sft.eval_steps=2")
    return runs / "swept"


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def request_of(trained: Path, city: Path, out: Path) -> ForecastRequest:
    return ForecastRequest(trained, city, "0:3,0:3", "test", out)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many units of few cells."""
    monkeypatch.setattr(forecaster, "PIECE_SIZE", 32)
    monkeypatch.setattr(sweep_module, "CHUNKS_PER_UNIT", 2)


def workers(doing: str = "") -> list[int]:
    """Processes of workers; those at work are called by what they do, ``start`` or ``run``."""
    processes = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"]]
    return [p.pid for p in processes if p.info["cmdline"][0].startswith(f"ray::WorkerActor{doing}")]


def test_workers_write_the_file_of_one_process_whoever_dies(
    local_ray: None, trained: Path, city: Path, tmp_path: Path, small_units: None
) -> None:
    one, two = (request_of(trained, city, tmp_path / name) for name in ("one.zarr", "two.zarr"))
    recipes.forecast(one, lambda line: None)
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            if pieces(two.out) >= 2 and (at_work := workers(".run")):
                os.kill(at_work[0], signal.SIGKILL)
                killed.append(at_work[0])
            time.sleep(0.005)

    saboteur = Thread(target=kill_one, daemon=True)
    saboteur.start()
    said: list[str] = []
    result = sweep(two, 2, None, said.append)
    saboteur.join()
    assert killed and any(f"(pid {killed[0]})" in line for line in said), said
    assert result["windows"] > 0 and contents(one.out) == contents(two.out)
    assert not two.out.with_name("two.zarr.partial").exists()


def pieces(out: Path) -> int:
    """Chunks that a sweep has kept."""
    try:
        return read_sealed(out.with_name(out.name + ".partial") / "progress.json")["whole"]
    except FileNotFoundError:
        return 0


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_with_other_workers(
    local_ray: None, trained: Path, city: Path, tmp_path: Path
) -> None:
    import ray

    one, two = (request_of(trained, city, tmp_path / name) for name in ("one.parquet", "two.parquet"))
    recipes.forecast(one, lambda line: None)
    arguments = ["forecast", str(trained), str(city), "--region", "0:3,0:3", "--out", str(two.out)]
    small = "from stdist.vision_llm.rollout import forecaster\nforecaster.PIECE_SIZE = 32"
    program = f"from stdist.cli import main\n{small}\nmain()"
    driver = subprocess.Popen(
        [sys.executable, "-c", program, *arguments, "--ray", ray.get_runtime_context().gcs_address],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    deadline = time.monotonic() + 200
    while pieces(two.out) < 2:
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.005)
    driver.kill()
    driver.wait()
    said: list[str] = []
    sweep(two, 1, None, said.append)
    assert one.out.read_bytes() == two.out.read_bytes()


def test_ray_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, where it is not installed."""
    for name in [name for name in sys.modules if name.startswith("stdist.orchestration")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"Ray is not installed; pip install 'stdist\[cluster\]'"):
        import_module("stdist.orchestration.policy_workers.sweep")


def test_waiting_ends_where_nothing_moves_and_begins_anew_where_something_does() -> None:
    """Of a sweep as of a training; what was waited for and the workers are named."""
    key, waiting = WorkKey(0, 32, (7,)), iter([5, 5, 4, 4, 4, 4, 4])
    asked: list[int] = []

    def status() -> dict[str, object]:
        workers = {"worker-1": "starting"}
        return {"waiting": next(waiting), "lost_leases": {}, "states": {}, "bytes_sent": 0, "workers": workers}

    with pytest.raises(ResourceError, match=r"nothing has moved for 15 s while step 0, window 32, .*worker-1 starting"):
        wait_for_answers(lambda: asked.append(1), status, key, timeout=15)
    assert len(asked) == 6, "twice before something moved, once as it did, three times behind it"


@pytest.mark.parametrize(
    ("workers", "address", "reason"),
    [
        (0, None, "--workers is 0; give at least 1"),
        (-2, None, "--workers is -2"),
        (3, None, "--workers 3 need a CPU each and the cluster has 2"),
    ],
)
def test_workers_that_cannot_be_are_refused_before_anything_is_written(
    local_ray: None, trained: Path, city: Path, tmp_path: Path, workers: int, address: str | None, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        sweep(request_of(trained, city, tmp_path / "x.zarr"), workers, address, lambda line: None)
    assert list(tmp_path.iterdir()) == []
