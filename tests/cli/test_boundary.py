"""What the system refuses, and what this program itself cannot use, is one line with the right code, and true."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors import SafetensorError

from stdist.boundary import LONGEST
from stdist.errors import DamageError, ResourceError, is_damage, of_the_system
from stdist.files import own_file, require_writable, write_atomically
from stdist.memory import available, require_room

from .conftest import line_of, prepare_zones

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

    monkeypatch.setattr(recipes, "train", lambda *_, **__: (_ for _ in ()).throw(error))
    assert words in line_of(stdist("train", "c.yaml"), code)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("mae"), ImportError("no module")])
def test_bugs_are_not_the_systems(error):
    assert of_the_system(error) is None


def test_a_line_is_one_line_of_what_can_be_printed(stdist, world, monkeypatch):
    from stdist.errors import InputError
    from stdist.runs import recipes

    text = "first\nsecond \x1b[31m" + "x" * 5000 + " the end"
    monkeypatch.setattr(recipes, "train", lambda *_, **__: (_ for _ in ()).throw(InputError(text)))
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
        (["prepare", "synthetic", "--seed", "-1", "--out", "x.zarr"], "--seed -1 is negative"),
        (["prepare", "synthetic", "--channel", "", "--out", "x.zarr"], "channel '' is no name of an array"),
        (["prepare", "synthetic", "--channel", "/dev/null", "--out", "x.zarr"], "channel '/dev/null' is no name"),
        (["prepare", "synthetic", "--channel", "c" * 101, "--out", "x.zarr"], "100 characters at most"),
        (["prepare", "synthetic", "--ray", "[1, 2]", "--out", "x.zarr"], "is no address of a Ray cluster"),
        (["prepare", "wide-csv", ".", "--out", "x.zarr"], "give the tables themselves"),
        (["check", "n" * 300], "the name is too long"),
        (["check", "c.yaml"], "c.yaml is not a grid store"),
        (["prepare", "synthetic", "--out", "c.yaml/z.zarr"], "a part of the path is a file"),
        (["plan", "c.yaml", "--device-flops", "nan"], "--device-flops"),
        (["plan", "."], "config . cannot be read"),
        (["train", "c.yaml", "data.history=" + "[" * 3000], "is not a YAML value"),
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
