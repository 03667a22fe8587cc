"""``stdist serve`` as a process: what it answers, how it ends, and what it refuses."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from .conftest import MAIN, PATIENCE, Command, files_below, line_of

pytest.importorskip("fastapi", reason="FastAPI is not installed: pip install 'stdist[serve]'")
httpx = pytest.importorskip("httpx", reason="httpx is not installed: pip install 'stdist[dev]'")
Start = Callable[..., tuple[Command, str]]
HANGING_SECOND = """
import time
from pathlib import Path
from stdist.serving import city

forecast, computing = city.forecast_in_memory, Path("computing")
first = iter([True])

def forecast_first_only(*arguments):
    if next(first, False):
        return forecast(*arguments)
    computing.touch()
    while True:
        time.sleep(1)

city.forecast_in_memory = forecast_first_only
from stdist.cli import main
main()
"""


@pytest.fixture
def serving() -> Iterator[Start]:
    """``stdist serve … --port 0`` in a process of its own, which answers when this returns, and its address."""
    started = []

    def start(folder: Path, *arguments: object, program: str = MAIN) -> tuple[Command, str]:
        process = Command(folder, "serve", *map(str, arguments), "--port", "0", "--json", program=program)
        started.append(process)
        deadline = time.monotonic() + PATIENCE
        while not (said := process.said()).endswith("\n"):
            assert process.returncode is None, process.communicate()
            assert time.monotonic() < deadline, "it does not answer in time"
            time.sleep(0.02)
        return process, json.loads(said)["url"]

    yield start
    for process in started:
        if process.returncode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate(PATIENCE)


def test_it_answers_what_forecast_next_writes(serving, stdist, finished_run, city, tmp_path):
    """Of a vision-LLM, all cells of the city."""
    out = tmp_path / "next.csv"
    assert stdist("forecast", finished_run.run_dir, city, "--next", "--places", "all", "--out", out).code == 0
    process, url = serving(tmp_path, finished_run.run_dir, city, "--places", "all")
    answer = httpx.get(f"{url}/forecast?format=csv")
    assert answer.content == out.read_bytes() and len(out.read_text().splitlines()) == 1 + 9 * 2
    os.kill(process.pid, signal.SIGTERM)
    out_text, err = process.communicate(PATIENCE)
    assert process.returncode == 0 and "Traceback" not in err and len(out_text.splitlines()) == 1


def test_ctrl_c_ends_it_as_every_command(serving, world):
    process, _ = serving(world, "runs/n", "z.zarr")
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(PATIENCE)
    assert process.returncode == 130 and err.endswith("interrupted: no longer served\n") and "Traceback" not in err


def test_killed_under_requests_it_leaves_no_file_and_serves_again(serving, world):
    before = files_below(world)
    process, url = serving(world, "runs/n", "z.zarr", "--rate", "0")
    expected = httpx.get(f"{url}/forecast").json()
    stop, answers = threading.Event(), []

    def ask() -> None:
        with httpx.Client() as client:
            while not stop.is_set():
                try:
                    answers.append(client.get(f"{url}/forecast").json())
                except httpx.TransportError:
                    return

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(answers) < 20:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    process.communicate(PATIENCE)
    assert files_below(world) == before and all(answer == expected for answer in answers)
    _, again = serving(world, "runs/n", "z.zarr")
    assert httpx.get(f"{again}/forecast").json() == expected


def test_killed_while_it_computes_it_answers_what_is_forecast_of_the_store_as_it_is(serving, stdist, world):
    """Days are appended before the computation that is killed and while it lasts."""

    def append(day: str) -> None:
        np.savez("day.npz", arr_0=np.random.default_rng(2).uniform(1, 40, (24, 4, 1)))
        assert stdist("append", "z.zarr", "day.npz", "--start", f"{day}T00:00").code == 0

    def ask() -> None:
        with suppress(httpx.TransportError):
            while True:
                httpx.get(f"{url}/forecast", timeout=PATIENCE)

    process, url = serving(world, "runs/n", "z.zarr", program=HANGING_SECOND)
    append("2019-01-29")
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    while not Path("computing").exists():
        assert time.monotonic() < deadline, "the appended day is not looked at in time"
        time.sleep(0.01)
    append("2019-01-30")
    before = files_below(world)
    os.kill(process.pid, signal.SIGKILL)
    for thread in threads:
        thread.join(PATIENCE)
    process.communicate(PATIENCE)
    assert files_below(world) == before
    _, again = serving(world, "runs/n", "z.zarr")
    assert stdist("forecast", "runs/n", "z.zarr", "--next", "--out", "next.csv").code == 0
    assert httpx.get(f"{again}/forecast?format=csv").content == Path("next.csv").read_bytes()
    assert httpx.get(f"{again}/forecast").json()["origin_local"] == "2019-01-30T23:00:00"


def test_another_machine_needs_the_token(serving, world, monkeypatch):
    (world / "token").write_text("sixteen-letters-\n")
    _, url = serving(world, "runs/n", "z.zarr", "--host", "0.0.0.0", "--token-file", "token")
    assert httpx.get(f"{url}/forecast").status_code == 401
    assert httpx.get(f"{url}/forecast", headers={"authorization": "Bearer sixteen-letters-"}).status_code == 200


@pytest.mark.parametrize(
    "token, options, said",
    [
        (None, ["--host", "0.0.0.0"], "--host 0.0.0.0 is reached from other machines: give --token-file FILE or set"),
        (None, ["--host", "::"], "is reached from other machines"),
        (None, ["--host", "no such host"], "--host no such host: "),
        ("fifteen-letters", [], "STDIST_SERVE_TOKEN: a token is 16 or more letters"),
        ("sixteen letters and a space", [], "STDIST_SERVE_TOKEN: a token is 16 or more letters"),
        ("", ["--host", "0.0.0.0"], "STDIST_SERVE_TOKEN: a token is 16 or more letters"),
        (None, ["--rate", "nan"], "--rate is nan; give requests a second"),
        (None, ["--rate", "-1"], "--rate is -1"),
        (None, ["--token-file", "absent"], "absent: does not exist"),
        (None, ["--places", "2,99"], "z.zarr has no place '99'; the nearest names are "),
    ],
)
def test_what_is_wrong_is_said_in_one_line(stdist, world, monkeypatch, token, options, said):
    if token is not None:
        monkeypatch.setenv("STDIST_SERVE_TOKEN", token)
    before = files_below(world)
    assert said in line_of(stdist("serve", "runs/n", "z.zarr", "--port", "0", *options), 2)
    assert files_below(world) == before


def test_an_unfinished_run_and_no_store_are_refused(stdist, world):
    assert "does not exist" in line_of(stdist("serve", "runs/n", "y.zarr", "--port", "0"), 2)
    (world / "runs" / "n" / "checkpoints" / "train" / "finished.json").unlink()
    assert "has not finished its stage train" in line_of(stdist("serve", "runs/n", "z.zarr", "--port", "0"), 2)
    assert "is no run folder" in line_of(stdist("serve", "z.zarr", "z.zarr", "--port", "0"), 2)


def test_a_port_in_use_is_the_machines_fault(stdist, world):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = line_of(stdist("serve", "runs/n", "z.zarr", "--port", port), 5)
    assert line.startswith(f"port {port} of 127.0.0.1 cannot be had") and "another --port" in line
