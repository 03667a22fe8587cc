"""The order of work on a GPU (benchmarks/gpu.py) with toy items: slices that go on, failures that are kept."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stdist.errors import InputError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SETTING = {"device": "toy", "base": "tiny", "cap_gib": 1}
# Runs a slice of one item, whose process writes its number and sleeps.
DRIVER = """
import signal, sys
from pathlib import Path
import gpu

folder = Path(sys.argv[1])
code = f"import os, time; open({str(folder / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
results = gpu.Results(folder / "results.json", {"device": "toy", "base": "tiny", "cap_gib": 1})
items = [gpu.Item("sleeps", (sys.executable, "-c", code), 60)]
gpu.Slice(items, results, 60, lambda item: gpu.run_process(item, folder / "log")).go()
"""


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield import_module("gpu")


@pytest.fixture
def work(gpu: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """One slice over ``items`` in real processes, on the results of the slices before it."""

    def go(*items: Any) -> Any:
        part = gpu.Slice(items, results(gpu, tmp_path), 60, lambda item: gpu.run_process(item, tmp_path / item.name))
        part.go()
        return part

    return go


def results(gpu: ModuleType, folder: Path) -> Any:
    return gpu.Results(folder / "results.json", SETTING)


def read(folder: Path) -> dict[str, Any]:
    tree = json.loads((folder / "results.json").read_text())
    assert tree["setting"] == SETTING
    return tree["items"]


def says(gpu: ModuleType, name: str, code: str, limit: int = 30, **options: Any) -> Any:
    return gpu.Item(name, (sys.executable, "-c", code), limit, **options)


def test_a_result_is_kept_and_a_finished_item_not_run_again(gpu, work, tmp_path):
    count = f"open({str(tmp_path / 'runs')!r}, 'a').write('x'); print('some words'); print('{{\"value\": 3}}')"
    for _ in range(2):
        assert work(says(gpu, "counts", count)).left() == []
        record = read(tmp_path)["counts"]
        assert (record["status"], record["attempts"], record["result"]) == ("done", 1, {"value": 3})
        assert {"seconds", "began", "commit"} <= record.keys()
    assert (tmp_path / "runs").read_text() == "x"
    results(gpu, tmp_path).forget("counts")
    work(says(gpu, "counts", count))
    assert (tmp_path / "runs").read_text() == "xx"


@pytest.mark.parametrize(
    ("code", "ended", "last"),
    [
        ("print(1); raise SystemExit('error: no memory')", ["with exit code 1"] * 2, "error: no memory"),
        ("import os; os.abort()", ["by signal 6"] * 2, None),
        ("print('no result')", ["with exit code 0"] * 2, "no result"),
        ("print('{\"value\": NaN}')", ["with exit code 0"] * 2, '{"value": NaN}'),
        (
            "import time; print('on my way', flush=True); time.sleep(60)",
            [f"killed at its limit of {s} s" for s in (1, 2)],
            "on my way",
        ),
    ],
)
def test_a_failure_is_kept_hides_nothing_and_is_tried_once_more_later(gpu, work, tmp_path, code, ended, last):
    bad, good = says(gpu, "bad", code, limit=1 if "sleep" in code else 30), says(gpu, "good", "print('{}')")
    for attempt, left in ((1, ["bad"]), (2, []), (3, [])):
        assert [item.name for item in work(bad, good).left()] == left
        record = read(tmp_path)["bad"]
        assert (record["status"], record["attempts"], record["ended"]) == (
            "failed",
            min(attempt, 2),
            ended[attempt > 1],
        )
        assert (record["last_lines"][-1] if last else record["last_lines"][:0] or None) == last
        assert read(tmp_path)["good"]["status"] == "done"


def test_what_failed_comes_behind_what_was_never_tried(gpu, tmp_path):
    """It gets twice the time, if a slice has that."""
    order: list[tuple[str, float]] = []
    outcome = {"first": "failed", "second": "done"}

    def run(item: Any) -> dict[str, Any]:
        order.append((item.name, item.limit))
        return {"status": outcome[item.name], "seconds": 0, "ended": "", "last_lines": []}

    first, second, third = (gpu.Item(name, (), limit) for name, limit in (("first", 10), ("second", 10), ("third", 40)))
    outcome["third"] = "failed"
    gpu.Slice([first, third], results(gpu, tmp_path), 60, run).go()
    outcome |= {"first": "done", "third": "done"}
    part = gpu.Slice([first, second, third], results(gpu, tmp_path), 60, run, lambda: 0)
    part.go()
    assert order == [("first", 10), ("third", 40), ("second", 10), ("first", 20), ("third", 60)] and part.left() == []


def test_an_item_that_does_not_fit_waits_for_a_fresh_slice(gpu, tmp_path):
    now, order = [0.0], []
    takes = {"short": 90, "long": 250, "last": 10}

    def run(item: Any) -> dict[str, Any]:
        order.append(item.name)
        now[0] += takes[item.name]
        return {"status": "done", "seconds": takes[item.name], "result": {}}

    items = [gpu.Item("short", (), 100), gpu.Item("long", (), 300), gpu.Item("last", (), 110)]
    for expected, left in ((["short", "last"], ["long"]), (["short", "last", "long"], [])):
        part = gpu.Slice(items, results(gpu, tmp_path), 200, run, lambda: now[0])
        part.go()
        assert order == expected and [item.name for item in part.left()] == left


def test_what_others_read_is_made_first_made_again_where_it_is_gone_and_only_for_them(gpu, work, tmp_path):
    made = tmp_path / "made"
    make = says(gpu, "make", f"open({str(made)!r}, 'w'); print('{{}}')", makes=made)
    use = says(gpu, "use", f"open({str(made)!r}); print('{{}}')", needs=("make",))
    broken = says(gpu, "make", "raise SystemExit(1)", makes=made)
    assert [item.name for item in work(broken, use).left()] == ["make", "use"] and "use" not in read(tmp_path)
    work(make, use)
    assert {name: record["status"] for name, record in read(tmp_path).items()} == {"make": "done", "use": "done"}
    made.unlink()
    assert work(make, use).left() == [] and not made.exists()
    results(gpu, tmp_path).forget("use")
    assert work(make, use).left() == [] and made.exists()


@pytest.mark.parametrize(("sent", "attempts"), [(signal.SIGKILL, 1), (signal.SIGTERM, 0)])
def test_a_slice_that_is_killed_takes_its_item_along_and_the_next_one_goes_on(gpu, work, tmp_path, sent, attempts):
    """Killed outright, it may have been the item's doing, which counts as a failure."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", DRIVER, tmp_path], env=environment, stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    assert read(tmp_path)["sleeps"]["status"] == "running"
    process.send_signal(sent)
    process.wait(20)
    wait_for(lambda: not is_alive(int((tmp_path / "pid").read_text())))
    item = says(gpu, "sleeps", "print('{}')")
    assert results(gpu, tmp_path).attempts(item) == attempts
    work(item)
    assert read(tmp_path)["sleeps"]["status"] == "done"


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether it runs: one that nobody has waited for is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_of_another_machine_are_not_mixed_in(gpu, work, tmp_path, refused):
    work(says(gpu, "good", "print('{}')"))
    other = SETTING | {"device": "other"}
    refused(lambda: gpu.Results(tmp_path / "results.json", other), "results.json", "'toy'", "'other'", "--results")
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(InputError, match=r"results\.json is damaged"):
        results(gpu, tmp_path)


def test_without_a_cuda_device_it_is_one_line_and_2(gpu, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--results", str(tmp_path / "results.json")])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: no CUDA device: torch ") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_every_item_is_there_and_fits_a_slice_of_ten_minutes(gpu):
    items = gpu.all_items("cuda", "7b", 32, Path("work"))
    names = [item.name for item in items]
    assert names[0] == "machine" and {"stage: grpo", "rollouts", "sweep"} <= set(names)
    assert len(set(names)) == len(names)
    assert "tests: tests/vision_llm/test_recorded_on_gpu.py" in names and "tests: tests/test_gpu_plan.py" not in names
    for item in items:
        assert Path(item.command[1]).is_file() and item.limit < 600 and set(item.needs) <= set(names)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA GeForce RTX 5090", 209.5e12),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("Tesla T4", None),
    ],
)
def test_a_cards_peak_is_found_by_the_name_it_gives_itself(gpu, name, peak):
    assert import_module("_gpu_measure").peak_flops(name) == peak
