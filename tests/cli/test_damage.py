"""Damaged files of runs and stores, and days without a value: one line each that names them and what to do."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep import READERS
from stdist.data.integrity import combined_digest, record_of
from stdist.files import to_json

from .conftest import line_of, prepare_zones

# --- damaged files of a run ----------------------------------------------------------------------------------------

CUT = {"empty": "", "cut": '{"a": ', "null": "null", "a list": "[1]", "an object": "{}"}
STAGE = "runs/n/checkpoints/train"
DAMAGED = {
    "runs/n/config.yaml": ["forecast", "runs/n", "z.zarr", "--out", "f.zarr"],
    "runs/n/store_digest": ["train", "c.yaml"],
    "runs/n/forecasts/written.json": ["train", "c.yaml"],
    "runs/n/report/metrics.json": ["report", "runs/n"],
    "runs/n/report/embeddings.json": ["report", "runs/n"],
    f"{STAGE}/finished.json": ["train", "c.yaml"],
    f"{STAGE}/efficiency.json": ["train", "c.yaml"],
    "z.zarr/zarr.json": ["check", "z.zarr"],
}


@pytest.mark.parametrize("path", DAMAGED)
@pytest.mark.parametrize("content", CUT)
def test_a_damaged_file_is_named_with_what_to_do(stdist, world, path, content):
    assert Path(path).exists()
    Path(path).write_text(CUT[content])
    result = stdist(*DAMAGED[path])
    if result.code == 2:  # a whole YAML that is another configuration's
        assert path.endswith("config.yaml") and content in ("cut", "an object"), result
        return
    line = line_of(result, 4)
    assert path in line and ("; " in line or line.endswith("again"))


def test_a_log_with_a_broken_line(stdist, world):
    log = Path("runs/n/log.jsonl")
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:1], "{", *lines[1:]]) + "\n")
    assert f"{log}, line 2" in line_of(stdist("report", "runs/n"), 4)
    shutil.rmtree(STAGE)
    assert f"{log} is damaged in line 2; remove that line" in line_of(stdist("train", "c.yaml"), 4)
    log.write_text("\n".join([*lines, '{"stage']))  # the half line of a killed process
    assert stdist("report", "runs/n").code == 0


def change_root(change) -> None:
    path = Path("z.zarr/zarr.json")
    tree = json.loads(path.read_text())
    change(tree["attributes"])
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.update(channels="flow"), "channels: Input should be a valid tuple"),
        (lambda a: a.update(cadence_minutes=7), "cannot be"),
        (lambda a: a.update(cadence_minutes=0), "cadence_minutes: Input should be greater than or equal to 1"),
        (lambda a: a.update(last_day="2018-01-01"), "cannot be"),
        (lambda a: a["split"].update(test=["2019-01-01", "2019-01-02"]), "share days"),
        (lambda a: a.update(files=[]), "files: Input should be a valid dictionary"),
        (lambda a: a["coverage"].clear(), "coverage or statistics are of other channels"),
        (lambda a: a.pop("units"), "units: Field required"),
    ],
)
def test_attributes_that_cannot_be(stdist, world, change, words):
    change_root(change)
    for command in (["check", "z.zarr"], ["train", "c.yaml"]):
        line = line_of(stdist(*command), 4)
        assert (
            line.startswith("z.zarr/zarr.json is damaged: " if command[0] == "check" else str(world)) and words in line
        )


@pytest.mark.parametrize("name", ["inside", "flow", "present"])
def test_declared_shapes_are_held_against_the_days_before_anything_is_made(stdist, world, name):
    path = Path(f"z.zarr/{name}/zarr.json")
    tree = json.loads(path.read_text())
    tree["shape"] = [10**15] * len(tree["shape"])
    path.write_text(json.dumps(tree))

    def declare(attributes: dict) -> None:
        """With digests that fit: whoever wrote the shape wrote them too."""
        attributes["files"][f"{name}/zarr.json"] = record_of(path)
        attributes["digest"] = combined_digest(attributes["files"], attributes)

    change_root(declare)
    line = line_of(stdist("train", "c.yaml"), 4)
    assert f"array {'inside' if name == 'inside' else name} has shape" in line
    assert stdist("check", "z.zarr").code == 4


# --- spans with nothing observed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("day", [24, 27], ids=["validation", "test"])
def test_days_without_an_observed_value_are_refused_before_training(stdist, world, monkeypatch, day):
    prepare_zones(world / "dark.zarr", lost=slice(24 * (day - 1), 24 * day))
    split = "{train: [2019-01-01, 2019-01-20], validation: [2019-01-24, 2019-01-24], test: [2019-01-27, 2019-01-27]}"
    for command in ("train", "plan"):
        line = line_of(stdist(command, "c.yaml", "name=dark", "data.store=dark.zarr", f"data.split={split}"), 2)
        name = "validation" if day == 24 else "test"
        assert f"{name} windows, 2019-01-{day}:2019-01-{day}, was observed in channel flow" in line
    assert not Path("runs/dark").exists()


def test_figures_that_are_not_defined_are_null_and_said(stdist, world):
    """A test day of measured zeros has no NRMSE and no MAPE."""
    values = np.random.default_rng(1).uniform(1, 40, (24 * 28, 4, 1))
    values[24 * 26 : 24 * 27] = 0
    np.savez("zero.npz", arr_0=values)
    READERS["zones-npz"].prepare(
        [Path("zero.npz")], Path("zero.zarr"), city="demo", start="2019-01-01T00:00", channels="flow"
    )
    split = "{train: [2019-01-01, 2019-01-20], validation: [2019-01-24, 2019-01-24], test: [2019-01-27, 2019-01-27]}"
    result = stdist("train", "c.yaml", "name=zero", "data.store=zero.zarr", f"data.split={split}", "--json")
    assert result.code == 0 and "nan" not in (result.out + result.err).lower()
    assert result.json["test"]["nrmse"] is None and result.json["test"]["mae"] > 0
    for path in Path("runs/zero").rglob("*.json*"):
        if path.is_file() and "zarr" not in str(path):
            assert "NaN" not in path.read_text() and "Infinity" not in path.read_text(), path
    result = stdist("evaluate", "runs/zero/forecasts/test.zarr", "zero.zarr")
    assert "MAPE undefined, NRMSE undefined" in result.out
    assert "no observed point with traffic" in Path("runs/zero/report/index.html").read_text()


def test_json_has_no_number_that_is_none():
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"mae": float("nan")})
