"""What the system refuses, and what this program itself cannot use, is one line with the right code, and true."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors import SafetensorError

from data_prep import READERS
from stdist.boundary import LONGEST
from stdist.errors import DamageError, ResourceError, is_damage, of_the_system
from stdist.files import own_file, require_writable, to_json, write_atomically
from stdist.memory import available, require_room

URBAN = {
    "recipe": "urbanpg-train",
    "name": "n",
    "data": {"store": "z.zarr", "channel": "flow", "history": 3, "horizon": 2},
    "model": {"d": 4},
    "training": {"max_epochs": 1, "patience": 1, "train_batch_size": 16},
}


def prepare_zones(store: Path, days: int = 28, lost: slice | None = None) -> None:
    values = np.random.default_rng(1).uniform(1, 40, (24 * days, 4, 1))
    if lost:
        values[lost] = np.nan
    np.savez(store.with_suffix(".npz"), arr_0=values)
    READERS["zones-npz"].prepare(
        [store.with_suffix(".npz")], store, city="demo", start="2019-01-01T00:00", channels="flow"
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with z.zarr, c.yaml and the finished run runs/n. Tests copy it."""
    folder = tmp_path_factory.mktemp("boundary")
    prepare_zones(folder / "z.zarr")
    (folder / "c.yaml").write_text(yaml.safe_dump(URBAN))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        from stdist.runs import recipes

        recipes.train(recipes.load_config(Path("c.yaml")), lambda line: None)
    return folder


@pytest.fixture
def world(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line_of(result, code):
    assert result.code == code, result
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and result.err.rstrip().endswith(errors[0]) and "Traceback" not in result.err, result
    return errors[0].removeprefix("error: ")


# --- what the system says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, "a/b: permission denied; change its"),
        (OSError(errno.EROFS, "Read-only file system", "a"), 2, "a: the file system is read-only; give a path"),
        (FileNotFoundError(errno.ENOENT, "No such file", b"a"), 2, "a: does not exist; correct the path"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), 2, "a: a folder where a file is needed"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), 2, "a/b: a part of the path is a file"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "aaa"), 2, "aaa: the name is too long for the file"),
        (OSError(errno.ENOSPC, "No space left on device"), 5, "no space is left; free some"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a"), 5, "a: the disk quota is used up"),
        (OSError(errno.EFBIG, "File too large"), 5, "the file would be larger than is allowed here; see `ulimit -f`"),
        (OSError(errno.EMFILE, "Too many open files", "a"), 5, "a: too many files are open in this process"),
        (OSError(errno.EIO, "Input/output error", "a"), 5, "a: Input/output error; see that the disk"),
        (OSError("neither number nor name"), 5, "neither number nor name"),
        (MemoryError("Unable to allocate 5 TiB"), 5, "out of memory; see `ulimit -v`"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), 5, "(DefaultCPUAllocator"),
        (RuntimeError("can't start new thread"), 5, "no thread or process can be started; see `ulimit -u`"),
        (ImportError("x.so: failed to map segment from shared object"), 5, "out of memory; see `ulimit -v`"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 5, "no space is left"),
    ],
    ids=str,
)
def test_what_the_system_refuses_is_a_line_with_its_code(stdist, world, monkeypatch, error, code, words):
    from stdist.runs import recipes

    monkeypatch.setattr(recipes, "train", lambda *_: (_ for _ in ()).throw(error))
    assert words in line_of(stdist("train", "c.yaml"), code)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("mae"), ImportError("no module")])
def test_bugs_are_not_the_systems(error):
    assert of_the_system(error) is None


def test_a_line_is_one_line_of_what_can_be_printed(stdist, world, monkeypatch):
    from stdist.errors import InputError
    from stdist.runs import recipes

    text = "first\nsecond \x1b[31m" + "x" * 5000 + " the end"
    monkeypatch.setattr(recipes, "train", lambda *_: (_ for _ in ()).throw(InputError(text)))
    line = line_of(stdist("train", "c.yaml"), 2)
    assert line.startswith("first second \\x1b[31mxx") and line.endswith("xx the end") and " … " in line
    assert len(line) == LONGEST + len(" … ")


@pytest.mark.parametrize(
    ("error", "damage"),
    [
        (FileNotFoundError(errno.ENOENT, ""), True),
        (ValueError(), True),
        (OSError("file signature not found"), True),
        (PermissionError(errno.EACCES, ""), False),
        (OSError(errno.EMFILE, ""), False),
        (TimeoutError("timed out"), False),
    ],
    ids=str,
)
def test_what_cannot_be_opened_is_not_called_damaged(tmp_path, error, damage):
    assert is_damage(error) is damage
    with pytest.raises(DamageError if damage else type(error)), own_file(tmp_path / "a.json", "write it again"):
        raise error


# --- commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["train", "c.yaml", "output_dir=c.yaml/runs"],
        ["forecast", "runs/n", "z.zarr", "--out", "c.yaml/f.zarr"],
        ["forecast", "runs/n", "z.zarr", "--out", "c.yaml/deep/f.parquet"],
    ],
    ids=["train", "zarr", "parquet"],
)
def test_nothing_is_computed_for_a_place_that_cannot_be_written(stdist, world, monkeypatch, command):
    from stdist.data import store

    monkeypatch.setattr(store, "require_all_files", lambda *_: pytest.fail("the store was opened first"))
    assert "c.yaml is not a folder; nothing can be written below it" in line_of(stdist(*command), 2)


@pytest.mark.parametrize("command", [["train", "c.yaml"], ["report", "runs/n"], ["forecast", "runs/n", "z.zarr"]])
def test_a_folder_that_forbids_writing(stdist, world, monkeypatch, command):
    def refuse(dir: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", f"{dir}/tmpabc")

    monkeypatch.setattr("stdist.files.tempfile.TemporaryFile", refuse)
    out = ["--out", "f.zarr"] if command[0] == "forecast" else []
    before = sorted(world.rglob("*"))
    line = line_of(stdist(*command, *out), 2)
    assert "permission denied; change its permissions" in line and "tmpabc" not in line
    assert sorted(world.rglob("*")) == before


def test_places_to_write_into(tmp_path):
    (tmp_path / "file").touch()
    require_writable(tmp_path / "not" / "yet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    with pytest.raises(OSError, match="too long"):
        require_writable(tmp_path / ("n" * 300) / "deeper")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bogus"], "No such command 'bogus'; see `stdist --help`"),
        (["forcast"], "Did you mean 'forecast'"),
        (["--bogus"], "No such option: --bogus; see `stdist --help`"),
        (["train"], "Missing argument 'config'; see `stdist train --help`"),
        (["prepare", "synthetic", "--days", "9" * 20, "--out", "x.zarr"], "Invalid value for '--days'"),
        (["prepare", "wide-csv", ".", "--out", "x.zarr"], "is not a file"),
        (["check", "n" * 300], "the name is too long"),
        (["check", "c.yaml"], "c.yaml is not a grid store"),
        (["prepare", "synthetic", "--out", "c.yaml/z.zarr"], "a part of the path is a file"),
        (["plan", "c.yaml", "--device-flops", "nan"], "--device-flops"),
        (["plan", "."], "config . cannot be read"),
        (["train", "c.yaml", "data.history=" + "[" * 3000], "nested too deep"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_usage_is_a_line(stdist, world, arguments, words):
    assert words in line_of(stdist(*arguments), 2)


def test_a_version_and_help_without_a_command(stdist):
    assert stdist("--version").out == "stdist 0.1.0\n"
    for command in ([], ["prepare"]):
        result = stdist(*command)
        assert result.code == 0 and "Usage: stdist" in result.out and result.err == ""


# --- one store, other spellings ------------------------------------------------------------------------------------


def test_a_store_by_another_path_is_the_same_store(stdist, world):
    (world / "sub").mkdir()
    (world / "same.zarr").symlink_to("z.zarr")
    for store in ("./z.zarr", "sub/../z.zarr", "same.zarr"):
        assert stdist("train", "c.yaml", f"data.store={store}").code == 0
    shutil.move("z.zarr", "moved.zarr")
    result = stdist("train", "c.yaml", "data.store=moved.zarr")
    assert result.code == 0 and yaml.safe_load(Path("runs/n/config.yaml").read_text())["data"]["store"].endswith(
        "moved.zarr"
    )
    shutil.copytree("runs", "elsewhere")
    assert stdist("train", "c.yaml", "data.store=moved.zarr", "output_dir=elsewhere").code == 0


def test_another_store_at_the_same_path_is_another_store(stdist, world):
    assert stdist("train", "c.yaml").code == 0  # which notes where the copied store lies
    shutil.rmtree("z.zarr")
    prepare_zones(world / "z.zarr", days=30)
    line = line_of(stdist("train", "c.yaml"), 2)
    assert "runs/n was trained on other data, of digest" in line and "delete" not in line
    line = line_of(stdist("train", "c.yaml", "seed=1"), 2)
    assert "(seed is 0 there, 1 here); choose another name=, or set it back" in line


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
    ids=str,
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
    change_root(lambda a: a["files"][f"{name}/zarr.json"].update(bytes=path.stat().st_size))
    consolidated = Path("z.zarr/zarr.json")
    root = json.loads(consolidated.read_text())
    root["consolidated_metadata"]["metadata"][name]["shape"] = tree["shape"]
    consolidated.write_text(json.dumps(root))
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


# --- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "frames.pixels_per_cell=1000000",
        "grpo.num_generations=4000000000",
        "grpo.windows_per_step=4000000000",
        "sft.windows_per_step=4000000000",
        "alignment.train_batch_size=4000000000",
        "forecast.num_generations=4000000000",
        "policy.lora_r=4000000000",
    ],
)
def test_sizes_are_held_against_memory(stdist, config, override):
    key = override.split("=")[0]
    line = line_of(stdist("train", config, override), 2)
    assert key.split(".")[-1] in line and "GiB at the least and this machine has" in line, line


def test_room_is_what_the_machine_has():
    require_room(available(), "all of it", "lower it")
    with pytest.raises(ValueError, match=r"^one more takes .* GiB at the least and this machine has .*; lower it$"):
        require_room(available() + 1, "one more", "lower it")


def test_small_files_are_whole(tmp_path):
    for content in ("text", b"bytes"):
        assert (
            write_atomically(tmp_path / "a" / "b", content).read_bytes() == content.encode()
            if isinstance(content, str)
            else content
        )
    assert os.listdir(tmp_path / "a") == ["b"]
    with pytest.raises(ResourceError):
        raise of_the_system(OSError(errno.ENOSPC, "")) or AssertionError


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.store={nodes}", "holds nodes, the vision-LLM reads grids; choose a store of a grid"),
        ("data.channel=sms_in", "has no channel 'sms_in'"),
        ("data.region=0:9,0:2", "leaves the grid of 3 rows x 3 columns"),
        ("data.history=5000", "no window fits train"),
    ],
)
def test_plan_and_train_refuse_alike(stdist, config, trained, override, words):
    override = override.format(nodes=trained / "z.zarr")
    lines = [line_of(stdist(command, config, override), 2) for command in ("plan", "train")]
    assert lines[0] == lines[1] and words in lines[0]


def test_a_demo_on_nodes(stdist, trained, tmp_path):
    line = line_of(stdist("demo", "--data", trained / "z.zarr", "--out", tmp_path / "demo"), 2)
    assert "holds nodes, the vision-LLM reads grids" in line


def test_a_token_with_a_line_break(stdist, world, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'stdist[cluster]'")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "two\nlines")
    line = line_of(stdist("submit", "c.yaml", "--address", "http://127.0.0.1:9"), 2)
    assert line.startswith("the token of RAY_AUTH_TOKEN has a line break") and "dashboard" not in line
