"""A forecast replaces forecasts of its own origin and contract. Whatever else has the name, or the name that work in
progress needs, stays as it is, to the byte."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from stdist.errors import DamageError, InputError
from stdist.evaluation import ChunkGrid, ForecastWriter

from .conftest import make_forecasts, read_forecasts, write_forecasts


@pytest.fixture(scope="module")
def forecasts(store):
    return make_forecasts(store.windows("test", 6, 4, channel="flow"))


def content(folder):
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(folder, forecasts, path, line):
    before = content(folder)
    with pytest.raises(InputError, match=line):
        write_forecasts(forecasts, path)
    assert content(folder) == before


@pytest.mark.parametrize("suffix", [".zarr", ".parquet"])
@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "link", "dangling link", "store"])
def test_what_is_no_forecast_stays(forecasts, store, tmp_path, suffix, kind):
    path = tmp_path / f"mine{suffix}"
    if kind == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("years of work")
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("years of work")
    elif kind == "store":
        shutil.copytree(store.path, path)
    else:
        target = tmp_path / "elsewhere"
        path.symlink_to(target)
        if kind == "link":
            write_forecasts(forecasts, tmp_path / f"made{suffix}").rename(target)
    line = "is a symbolic link" if "link" in kind else "holds no forecasts written by stdist"
    refused(tmp_path, forecasts, path, rf"mine{suffix} {line}; it stays as it is")


@pytest.mark.parametrize("suffix", [".zarr", ".parquet"])
@pytest.mark.parametrize("other", ["run", "checkpoint", "channel", "region"])
def test_forecasts_of_other_work_stay(forecasts, tmp_path, suffix, other):
    metadata = forecasts.metadata
    if other in ("run", "checkpoint"):
        changed = metadata.model_copy(update={other: "other"})
    else:
        value = "other" if other == "channel" else (1, 5, 0, 3)
        changed = metadata.model_copy(update={"contract": metadata.contract.model_copy(update={other: value})})
    path = write_forecasts(replace(forecasts, metadata=changed), tmp_path / f"made{suffix}")
    refused(tmp_path, forecasts, path, rf"made{suffix} holds forecasts of another {other}; it stays")


def test_a_file_beside_the_arrays_of_older_forecasts_stays(forecasts, tmp_path):
    path = write_forecasts(forecasts, tmp_path / "made.zarr")
    (path / "notes.txt").write_text("what I learnt")
    refused(tmp_path, forecasts, path, r"made\.zarr holds no forecasts")


@pytest.mark.parametrize("suffix", [".zarr", ".parquet"])
def test_older_forecasts_of_the_same_work_are_replaced(forecasts, tmp_path, suffix):
    path = write_forecasts(replace(forecasts, values=forecasts.values + 1), tmp_path / f"made{suffix}")
    write_forecasts(forecasts, path)
    np.testing.assert_array_equal(read_forecasts(path).values, forecasts.values)


@pytest.mark.parametrize("kind", ["folder", "file", "link", "preparation"])
def test_the_name_of_work_in_progress_is_somebody_elses(forecasts, tmp_path, kind):
    partial = tmp_path / "made.zarr.partial"
    if kind == "file":
        partial.write_text("mine")
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        partial.symlink_to(tmp_path / "elsewhere")
    else:
        name = "preparation" if kind == "preparation" else "mine"
        (partial / name).mkdir(parents=True)
        (partial / name / "identity.json").write_text("{}")
    refused(tmp_path, forecasts, tmp_path / "made.zarr", r"made\.zarr\.partial (is no folder|holds other files)")


def test_something_that_takes_the_name_meanwhile_stays(forecasts, tmp_path):
    path, cells = tmp_path / "made.zarr", forecasts.values[0, 0].size
    grid = ChunkGrid(len(forecasts.values), cells, len(forecasts.values), cells)
    flat = forecasts.quantities.reshape(1, *forecasts.values.shape[:2], cells)
    with ForecastWriter(path, forecasts.header, np.arange(cells), grid, {}, print) as writer:
        writer.write(writer.remaining[0], flat)
        path.mkdir()
        (path / "mine").write_text("mine")
        with pytest.raises(InputError, match=r"made\.zarr holds no forecasts"):
            writer.finish()
    assert (path / "mine").read_text() == "mine"


def test_a_damaged_piece_is_never_made_a_forecast(forecasts, tmp_path):
    """Neither by the writer that wrote it, nor by the one that goes on from there."""
    path, cells = tmp_path / "made.zarr", forecasts.values[0, 0].size
    grid = ChunkGrid(len(forecasts.values), cells, 20, cells)
    flat, said = forecasts.quantities.reshape(1, *forecasts.values.shape[:2], cells), []

    def writer():
        return ForecastWriter(path, forecasts.header, np.arange(cells), grid, {}, said.append)

    with writer() as first:
        for chunk in first.remaining:
            first.write(chunk, flat[:, chunk.windows])
        piece = first.partial / "pieces.zarr/c/0/1/0/0"
        damaged = bytearray(piece.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        piece.write_bytes(damaged)
        with pytest.raises(DamageError, match=r"a chunk of windows .* is not as it was written"):
            first.finish()
    with writer() as second:
        assert len(second.remaining) == len(grid.chunks()) and "number 1 is damaged; they are discarded" in said[-1]
        for chunk in second.remaining:
            second.write(chunk, flat[:, chunk.windows])
    piece.unlink()
    with writer() as third:
        assert len(third.remaining) == len(grid.chunks()) and "number 1 is damaged; they are discarded" in said[-1]
    (tmp_path / "made.zarr.partial" / "progress.json").write_text('{"whole": 3}')
    with writer() as fourth:
        assert len(fourth.remaining) == len(grid.chunks()) and "progress.json is not as it was written" in said[-1]
    assert not path.exists()
