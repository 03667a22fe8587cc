"""Forecasts written chunk by chunk are those written at once, however often their writer was killed."""

import errno
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from stdist import locks
from stdist.data import Region
from stdist.errors import InputError
from stdist.evaluation import Chunk, ChunkGrid, ForecastHeader, ForecastWriter, forecast_writer

from .conftest import make_forecasts, read_forecasts, write_forecasts

REGION = Region(0, 3, 1, 3)
CELLS = np.array([0, 2, 3, 4, 5])  # cell 1 of the region lies outside the city
WORK = {"decoding": "sample", "seed": 3}


@pytest.fixture(params=[False, True], ids=["one candidate", "quantiles"])
def forecasts(request, store):
    """93 windows, 4 steps, 3 x 2 cells."""
    return make_forecasts(store.windows("test", 6, 4, channel="flow", region=REGION), quantiles=request.param)


@pytest.fixture
def open_writer(forecasts, tmp_path):
    """Writers of 4 x 3 chunks to ``made.zarr``; ``said`` collects their lines."""
    said = []

    def make(path=tmp_path / "made.zarr", header: ForecastHeader = forecasts.header, grid=(93, 5, 25, 2), work=WORK):
        return ForecastWriter(path, header, CELLS, ChunkGrid(*grid), work, said.append)

    make.said = said
    return make


def fill(writer, forecasts, count=None):
    """Writes the next ``count`` chunks, by default all that are left."""
    n, k, _, _ = forecasts.values.shape
    flat = forecasts.quantities.reshape(-1, n, k, 6)[..., CELLS]
    for chunk in writer.remaining[:count]:
        writer.write(chunk, flat[:, chunk.windows, :, chunk.cells], {"seen": 2})


def bytes_of(path):
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def test_a_grid_cuts_windows_then_cells():
    grid = ChunkGrid(windows=3, cells=5, windows_per_chunk=2, cells_per_chunk=3)
    first, second = slice(0, 2), slice(2, 3)
    assert grid.chunks() == [
        Chunk(first, slice(0, 3)),
        Chunk(first, slice(3, 5)),
        Chunk(second, slice(0, 3)),
        Chunk(second, slice(3, 5)),
    ]
    assert [chunk.size for chunk in grid.chunks()] == [6, 4, 3, 2] and grid.size == 15


@pytest.mark.parametrize("suffix", [".zarr", ".parquet"])
def test_chunks_make_the_same_bytes_as_forecasts_written_at_once(open_writer, forecasts, suffix, tmp_path):
    path, folder = tmp_path / f"made{suffix}", tmp_path / f"made{suffix}.partial"
    with open_writer(path) as writer:
        assert len(writer.remaining) == 4 * 3
        fill(writer, forecasts)
        assert not path.exists() and folder.is_dir()
        assert writer.finish() == path
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and open_writer.said == []
    assert bytes_of(path) == bytes_of(write_forecasts(forecasts, tmp_path / "at once" / path.name))


def test_a_writer_goes_on_where_another_was_left(open_writer, forecasts, tmp_path):
    """Twice; the chunk after the last whole one is half written, as a kill leaves it where writes are not atomic."""
    for count, left in ((5, 12), (3, 7)):
        with open_writer() as writer:
            assert len(writer.remaining) == left
            fill(writer, forecasts, count)
        row, column = divmod(12 - left + count, 3)
        torn = writer.partial / "pieces.zarr" / "c" / "0" / str(row) / "0" / str(column)
        torn.parent.mkdir(parents=True, exist_ok=True)
        torn.write_bytes(b"torn")
    with open_writer() as writer:
        assert len(writer.remaining) == 4
        fill(writer, forecasts)
        writer.finish()
    assert writer.counts == {"seen": 24}, "counts stay with the chunks"
    holds = f"{tmp_path / 'made.zarr.partial'} holds"
    assert open_writer.said == [f"{holds} {n} chunks of 12, going on from there" for n in (5, 8)]
    assert bytes_of(writer.path) == bytes_of(write_forecasts(forecasts, tmp_path / "at once" / "made.zarr"))


def test_killed_while_the_final_file_is_made(open_writer, forecasts, tmp_path, monkeypatch):
    """All chunks are there, nothing is forecast again, and the older file of the name stays until the end."""
    older = replace(forecasts, values=forecasts.values + 1)
    path = write_forecasts(older, tmp_path / "made.zarr")
    before = bytes_of(path)

    def killed(header, read, path):
        path.mkdir()
        (path / "zarr.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), open_writer() as writer:
        patch.setitem(forecast_writer.WRITERS, ".zarr", killed)
        fill(writer, forecasts)
        writer.finish()
    assert bytes_of(path) == before
    with open_writer() as writer:
        assert writer.remaining == []
        writer.finish()
    assert bytes_of(path) == bytes_of(write_forecasts(forecasts, tmp_path / "at once" / "made.zarr"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["at once", "made.zarr"]


def test_killed_while_the_chunks_are_removed(open_writer, forecasts, monkeypatch):
    """The final file is there; what is left of the chunks is never taken for whole ones."""

    def killed(folder):
        shutil.rmtree(folder / "pieces.zarr" / "c" / "0" / "0")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), open_writer() as writer:
        patch.setattr(forecast_writer, "shutil", SimpleNamespace(rmtree=killed))
        fill(writer, forecasts)
        writer.finish()
    np.testing.assert_array_equal(read_forecasts(writer.path).values, forecasts.values)
    with open_writer() as writer:
        assert len(writer.remaining) == 12
        fill(writer, forecasts)
        writer.finish()
    np.testing.assert_array_equal(read_forecasts(writer.path).values, forecasts.values)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("run", "run"),
        ("checkpoint", "checkpoint"),
        ("store_digest", "store_digest"),
        ("split", "split"),
        ("work", "seed"),
        ("grid", "pieces"),
    ],
)
def test_chunks_of_other_work_are_discarded_with_a_line(open_writer, forecasts, tmp_path, change, named):
    with open_writer() as writer:
        fill(writer, replace(forecasts, values=forecasts.values + 1), 5)
    header, metadata = forecasts.header, forecasts.metadata
    if change in ("run", "checkpoint"):
        header = replace(header, metadata=metadata.model_copy(update={change: "other"}))
    elif change in ("store_digest", "split"):
        contract = metadata.contract.model_copy(update={change: "other"})
        header = replace(header, metadata=metadata.model_copy(update={"contract": contract}))
    work = WORK | {"seed": 4} if change == "work" else WORK
    grid = (93, 5, 31, 2) if change == "grid" else (93, 5, 25, 2)
    with open_writer(header=header, work=work, grid=grid) as writer:
        assert open_writer.said == [
            f"{tmp_path / 'made.zarr.partial'} holds 5 chunks made with another {named}; they are discarded"
        ]
        assert writer.remaining == ChunkGrid(*grid).chunks() and not writer.counts
        fill(writer, forecasts)
        writer.finish()
    same = replace(forecasts, metadata=header.metadata)
    assert bytes_of(writer.path) == bytes_of(write_forecasts(same, tmp_path / "at once" / "made.zarr"))


def test_nothing_is_said_of_a_writer_that_wrote_no_chunk(open_writer):
    open_writer().__exit__(None, None, None)
    with open_writer(work={"seed": 9}) as writer:
        assert len(writer.remaining) == 12
    assert open_writer.said == []


def test_two_writers_of_one_name_are_refused(open_writer, forecasts):
    with open_writer() as writer:
        fill(writer, forecasts, 1)
        with pytest.raises(InputError, match=rf"made\.zarr is being written by process {os.getpid()} on"):
            open_writer(work={"seed": 9})
        fill(writer, forecasts)
        writer.finish()


def test_a_file_system_without_locks_serves(open_writer, forecasts, monkeypatch):
    def unsupported(*_arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with open_writer() as writer:
        fill(writer, forecasts)
        assert writer.finish().is_dir()


def test_chunks_come_in_their_order_and_all_of_them(open_writer, forecasts):
    with open_writer() as writer:
        with pytest.raises(AssertionError, match="not the next"):
            writer.write(writer.remaining[1], np.zeros(()))
        with pytest.raises(AssertionError, match="12 chunks are missing"):
            writer.finish()


def test_another_suffix_is_refused_before_anything_is_written(open_writer, tmp_path):
    with pytest.raises(InputError, match=r"\.zarr, \.parquet or \.csv, not '\.txt'"):
        open_writer(tmp_path / "made.txt")
    assert list(tmp_path.iterdir()) == []


def test_a_region_outside_the_city_is_empty(forecasts, tmp_path):
    grid = ChunkGrid(windows=93, cells=0, windows_per_chunk=25, cells_per_chunk=1)
    path = tmp_path / "made.zarr"
    with ForecastWriter(path, forecasts.header, np.zeros(0, int), grid, WORK, print) as writer:
        assert writer.remaining == []
        writer.finish()
    assert np.isnan(read_forecasts(path).values).all()
