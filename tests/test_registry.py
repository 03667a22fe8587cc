"""The registry of recipes, readers and backbones: names, and packages from outside that add to them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import READERS
from stdist import cli
from stdist.data import open_store
from stdist.errors import InputError
from stdist.registry import Registry

TOY_READER = '''
"""Toy: hours counted up, two nodes."""
import numpy as np
from data_prep import Day, Part, Plan, reader
from stdist.data import NodeSpec

@reader("toy")
def plan(sources: list, *, city: str = "toyville", step: int = 1) -> Plan:
    """Plan of one day. step: from hour to hour."""
    day = np.datetime64("2020-01-01")
    spec = NodeSpec(city, ("flow",), day, day, np.arange(2), 60)
    return Plan(spec, {"reader": "toy", "step": step}, [], None, [Part("all", (0,), step)], read)

def read(part):
    yield Day(0, {"flow": np.repeat(part.payload * np.arange(24, dtype=np.float32)[:, None], 2, axis=1)})
'''


@pytest.fixture
def install(tmp_path, monkeypatch) -> Callable[..., None]:
    """``install("toy", "stdist.readers", "toy = toy_reader:plan", toy_reader=SOURCE)``: a package from outside."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(package: str, group: str, point: str, **modules: str) -> None:
        folder = tmp_path / f"{package}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[{group}]\n{point}\n")
        for name, source in modules.items():
            (tmp_path / f"{name}.py").write_text(source)
            monkeypatch.delitem(sys.modules, name, raising=False)

    return write


def test_a_name_belongs_to_one_thing():
    things: Registry[object] = Registry("thing", "stdist.no_such_group")
    one = things.register("one")(object())
    assert things["one"] is one and things.register("one")(one) is one
    with pytest.raises(ValueError, match="two things are called 'one'"):
        things.register("one")(object())
    assert list(things) == ["one"] and len(things) == 1 and "two" not in things


def test_an_unknown_name_is_answered_with_the_nearest():
    things: Registry[int] = Registry("thing", "stdist.no_such_group")
    for number, name in enumerate(("hexagon", "circle")):
        things.register(name)(number)
    with pytest.raises(InputError, match=r"^no thing 'circel'; did you mean 'circle'\?$"):
        things["circel"]
    with pytest.raises(InputError, match=r"^no thing 'xyz'; choose one of circle, hexagon$"):
        things["xyz"]


def test_an_outside_package_adds_things_and_is_imported_when_asked(install):
    install("toy", "stdist.toys", "bear = toy_things:BEAR", toy_things="BEAR = ['teddy']")
    toys: Registry[list[str]] = Registry("toy", "stdist.toys")
    assert list(toys) == ["bear"] and "bear" in toys and "toy_things" not in sys.modules
    assert toys["bear"] == ["teddy"] and toys["bear"] is toys["bear"]


def test_two_packages_with_one_name_are_refused(install):
    for package in ("first", "second"):
        install(package, "stdist.toys", f"bear = {package}:BEAR")
    with pytest.raises(InputError, match=r"toy 'bear' is (first|second):BEAR and (first|second):BEAR; uninstall one"):
        list(Registry("toy", "stdist.toys"))


def test_a_readers_module_registers_what_it_defines():
    assert {"telecom-italia", "table", "pems-npz", "yearly-npz", "xarray"} <= set(READERS)


def test_an_outside_reader_is_a_command(install, tmp_path, monkeypatch, capsys):
    """One file and one entry point: its page, its options, and the store it prepares."""
    install("toy", "stdist.readers", "toy = toy_reader:plan", toy_reader=TOY_READER)
    monkeypatch.setattr(READERS, "_things", dict(READERS._things))
    assert "toy" in READERS
    out = tmp_path / "toy.zarr"
    line = _run(monkeypatch, capsys, "prepare", "toy", "--step", "3", "--out", out, "--train", "2020-01-01:2020-01-01")
    assert json.loads(line)["city"] == "toyville" and json.loads(line)["frames"] == 24
    assert open_store(out).values("flow", 5, 6).tolist() == [[15, 15]]
    assert str(open_store(out).default_split.train) == "2020-01-01:2020-01-01"


def _run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    monkeypatch.setattr(sys, "argv", ["stdist", *map(str, arguments), "--json"])
    cli.main()  # leaves by SystemExit where it fails
    return capsys.readouterr().out.splitlines()[-1]
