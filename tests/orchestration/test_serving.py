"""``stdist serve --ray``: replicas on a real cluster answer as the service of one process does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

httpx = pytest.importorskip("httpx", reason="httpx is not installed: pip install 'stdist[dev]'")
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'stdist[cluster]'")
pytest.importorskip("grpc_reflection", reason="Ray Serve is not installed: pip install 'stdist[cluster]'")

from fastapi.testclient import TestClient  # noqa: E402
from ray import serve  # noqa: E402

from stdist.data import Day, open_store  # noqa: E402
from stdist.data.append import StoreAppender  # noqa: E402
from stdist.errors import InputError, ResourceError  # noqa: E402
from stdist.orchestration import serving  # noqa: E402
from stdist.orchestration.serving import deployed  # noqa: E402
from stdist.runs import recipes  # noqa: E402
from stdist.serving.service import ServeRequest, begin, bound  # noqa: E402

from .conftest import PATIENCE  # noqa: E402

TOKEN = "sixteen-letters-"
ROUTES = (
    "/forecast",
    "/forecast?places=s1,s3&history=true",
    "/forecast?format=csv",
    "/places",
    "/forecast?places=no",
    "/",
)


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_city, make_config) -> Path:
    """A folder with city.zarr, some sensors, and runs/tiny."""
    folder = tmp_path_factory.mktemp("served")
    recipes.train(make_config(make_city(folder / "city.zarr", nodes=5), folder / "runs"), silent)
    return folder


def request_of(folder: Path, host: str = "127.0.0.1", port: int = 0) -> ServeRequest:
    return ServeRequest(folder / "runs" / "tiny", folder / "city.zarr", "all", host, port, None, rate=0)


@pytest.fixture(scope="module")
def served(local_ray: None, trained: Path, tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """A copy of the folder, and the address at which two replicas answer for it; others may append to the store."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("two") / "served"))
    with deployed(request_of(folder), TOKEN, 2) as said:
        assert said["places"] == 5 and said["replicas"] == 2
        yield folder, said["url"]


@pytest.fixture
def client(served: tuple[Path, str]) -> Iterator[Any]:
    with client_of(served[1]) as opened:
        yield opened


def client_of(url: str) -> Any:
    return httpx.Client(base_url=url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=PATIENCE)


def answers_of(asked: Any) -> dict[str, tuple[int, bytes]]:
    return {route: (answer.status_code, answer.content) for route in ROUTES for answer in [asked.get(route)]}


def replicas() -> list[int]:
    """Process ids of the replicas of this process's cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            found += [process.pid] if " ".join(process.cmdline()).startswith("ray::ServeReplica") else []
    return found


def until(condition: Any) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)
    return value


def alone(folder: Path) -> TestClient:
    """The same service in this process."""
    app, _ = begin(request_of(folder).forecast, 0, TOKEN, silent)
    return TestClient(app, headers={"authorization": f"Bearer {TOKEN}"})


# The first three begin with a cluster on which nothing is served, as it is only before ``served`` is made.
@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_command_ends_as_it_does_alone_and_leaves_nothing_on_the_cluster(local_ray, trained, how, code):
    command = [sys.executable, "-c", "from stdist.cli import main; main()", "serve", "runs/tiny", "city.zarr"]
    options = ["--ray", ray.get_runtime_context().gcs_address, "--port", "0", "--json"]
    with subprocess.Popen([*command, *options], cwd=trained, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        assert httpx.get(f"{url}/forecast", timeout=PATIENCE).status_code == 200
        process.send_signal(how)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (code, b"") and b"Traceback" not in err
    assert err.endswith(b"interrupted: no longer served\n") == (how == signal.SIGINT)
    assert not replicas() and not serve.status().applications
    bound("127.0.0.1", int(url.rpartition(":")[2]), None).close()


def test_a_run_that_the_cluster_does_not_see_is_one_line(local_ray, tmp_path):
    with pytest.raises(InputError) as refused, deployed(request_of(tmp_path), None, 1):
        pass
    assert str(refused.value).startswith(f"{tmp_path}/runs/tiny does not exist on ") and "\n" not in str(refused.value)
    assert not serve.status().applications


def test_a_service_that_another_command_ended_is_the_machines_fault(local_ray, monkeypatch):
    monkeypatch.setattr(serving, "LOOK_EVERY", 0)
    with pytest.raises(ResourceError, match="no longer served: another command ended Ray Serve"):
        serving._watch()


def test_it_answers_with_the_bytes_of_the_service_alone(served, client):
    expected = answers_of(alone(served[0]))
    for _ in range(10):  # of either replica
        assert answers_of(client) == expected
    assert [code for code, _ in expected.values()] == [200, 200, 200, 200, 404, 200]


def test_every_line_of_the_metrics_names_its_replica(client):
    """Else a counter would seem to go back, whenever another replica answers."""
    texts = [client.get("/metrics").text for _ in range(20)]
    lines = [line for text in texts for line in text.splitlines() if not line.startswith("#")]
    names = {line.partition('replica="')[2].partition('"')[0] for line in lines}
    assert len(names) == 2 and "" not in names
    assert any(line.startswith('stdist_requests_total{code="200",replica=') for line in lines)


def test_the_token_and_the_limits_are_those_of_the_service_alone(served):
    url = served[1]
    assert httpx.get(f"{url}/forecast").status_code == 401 and httpx.get(f"{url}/health").status_code == 200
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert httpx.post(f"{url}/forecast", headers=headers, content=b"0" * 5000).status_code == 413


@pytest.mark.parametrize(
    ("host", "same_port", "count", "kind", "expected"),
    [
        ("127.0.0.1", True, 1, ResourceError, "port {port} of 127.0.0.1 cannot be had"),
        ("127.0.0.1", False, 1, ResourceError, "Ray Serve runs on this cluster already and serves stdist; end that"),
        ("0.0.0.0", False, 1, InputError, "--host 0.0.0.0 is reached from other machines: give --token-file FILE or"),
        ("127.0.0.1", False, 3, InputError, "--replicas 3 need a CPU each and the cluster has 2; lower --replicas"),
    ],
)
def test_a_second_service_and_what_is_wrong_are_one_line(served, host, same_port, count, kind, expected):
    folder, url = served
    port = int(url.rpartition(":")[2])
    with pytest.raises(kind) as refused, deployed(request_of(folder, host, port * same_port), None, count):
        pass
    assert str(refused.value).startswith(expected.format(port=port)) and "\n" not in str(refused.value)
    assert httpx.get(f"{url}/health").status_code == 200


def test_the_service_alone_does_not_share_the_port_of_a_cluster(served):
    with pytest.raises(ResourceError, match="cannot be had"):
        bound("127.0.0.1", int(served[1].rpartition(":")[2]), None)


def test_a_killed_replica_is_started_again_and_no_answer_is_wrong(served, client):
    expected, before = client.get("/forecast").content, replicas()
    assert len(before) == 2
    stop, answers = threading.Event(), []

    def ask() -> None:
        with client_of(served[1]) as session:
            while not stop.is_set():
                answer = session.get("/forecast")
                answers.append((answer.status_code, answer.content))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(answers) > 50)
    os.kill(before[0], signal.SIGKILL)
    until(lambda: len(set(replicas()) - set(before)) == 1)
    until(lambda: len({client.get("/metrics").text.partition('replica="')[2][:8] for _ in range(20)}) == 2)
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert {content for code, content in answers if code == 200} == {expected}
    assert {code for code, _ in answers} <= {200, 500, 503}


def test_after_an_append_all_replicas_come_to_the_new_state(served, client):
    folder, _ = served
    before = client.get("/forecast").json()
    digest = append_day(folder / "city.zarr")
    seen = []

    def all_new() -> bool:
        seen.extend(client.get("/forecast").json() for _ in range(10))
        return {answer["store_digest"] for answer in seen[-10:]} == {digest}

    until(all_new)
    expected = alone(folder).get("/forecast").json()
    assert {answer["store_digest"] for answer in seen} <= {before["store_digest"], digest}
    for answer in seen:  # whole, and of the state that it names
        like = expected if answer["store_digest"] == digest else before
        assert answer == like | {"superseded": answer["superseded"]}


def append_day(store: Path) -> str:
    old = open_store(store)
    with StoreAppender(store, corrections=False) as appender:
        appender.begin(old.axis_days.last_day + 1)
        values = 3 * old.values("flow", len(old.times) - 24, len(old.times))
        appender.add(Day(len(old.times) // 24, {"flow": values.astype(np.float32)}))
        appender.finish()
    return open_store(store).digest
