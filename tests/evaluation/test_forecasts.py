"""Forecast files hold what was written, open with plain tools, and are never half there."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import xarray as xr
import zarr

from stdist.data import Region
from stdist.errors import DamageError, InputError
from stdist.evaluation import forecast_header, open_forecasts
from stdist.evaluation.forecast_writer import WRITERS

from .conftest import make_forecasts, read_forecasts, write_forecasts

REGION = Region(0, 3, 1, 3)


@pytest.fixture(params=[False, True], ids=["one candidate", "quantiles"])
def forecasts(request, store):
    windows = store.windows("test", 6, 4, channel="flow", region=REGION)
    return make_forecasts(windows, quantiles=request.param)


@pytest.mark.parametrize("suffix", [".zarr", ".parquet"])
def test_round_trip(forecasts, suffix, tmp_path):
    path = write_forecasts(forecasts, tmp_path / f"made{suffix}")
    again = read_forecasts(path)
    np.testing.assert_array_equal(again.values, forecasts.values)
    np.testing.assert_array_equal(again.origins, forecasts.origins)
    np.testing.assert_array_equal(again.cell_ids, forecasts.cell_ids)
    assert again.metadata == forecasts.metadata
    assert (again.quantiles is None) == (forecasts.quantiles is None)
    if forecasts.quantiles is not None:
        np.testing.assert_array_equal(again.quantiles, forecasts.quantiles)
    assert np.isnan(again.values[:, :, 0, 1]).all(), "the cell outside the city stays empty"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_zarr_opens_with_xarray(forecasts, tmp_path):
    path = write_forecasts(forecasts, tmp_path / "made.zarr")
    names = zarr.open_group(path, mode="r")["forecast"].attrs["coordinates"].split()
    assert names == sorted(names) and "target" in names, "in one order in every process: a digest is made of it"
    dataset = xr.open_zarr(path, chunks=None)
    dims = ("origin", "step", "row", "col")
    if forecasts.quantiles is None:
        assert dataset.forecast.dims == dims
        picture = dataset.forecast
    else:
        assert dataset.forecast.dims == ("quantile", *dims)
        assert dataset["quantile"].values.tolist() == [0.1, 0.5, 0.9]
        picture = dataset.forecast.sel(quantile=0.9)
        np.testing.assert_array_equal(dataset.point, forecasts.values)
    expected = forecasts.values if forecasts.quantiles is None else forecasts.quantiles[2]
    one = picture.sel(origin=forecasts.origins[5], step=3, row=2, col=1)
    assert float(one) == expected[5, 2, 2, 0]
    assert dataset.forecast.dtype == np.float32
    assert dataset.forecast.attrs["units"] == "vehicles"


def test_parquet_rows_by_hand(forecasts, tmp_path):
    table = pl.read_parquet(write_forecasts(forecasts, tmp_path / "made.parquet"))
    columns = ["origin", "target", "cell", "step", "forecast"]
    assert table.columns == columns + (["q10", "q50", "q90"] if forecasts.quantiles is not None else [])
    n, k, h, w = forecasts.values.shape
    assert len(table) == n * k * (h * w - 1), "one cell lies outside the city"
    row = table.filter((pl.col("cell") == 1007) & (pl.col("step") == 3)).sort("origin")[5]
    assert row["forecast"].item() == forecasts.values[5, 2, 2, 0]
    assert row["origin"].dtype == pl.Datetime("ns", "UTC")
    assert (row["target"] - row["origin"]).item().total_seconds() == 3 * 3600
    assert row["origin"].dt.replace_time_zone(None).to_numpy()[0] == forecasts.origins[5]


def test_a_parquet_table_holds_the_digest_of_itself(forecasts, tmp_path):
    """Of the file with 64 zeros in its place; another program's table that still says so is not stdist's."""
    path = write_forecasts(forecasts, tmp_path / "made.parquet")
    metadata, content = pl.read_parquet_metadata(path), path.read_bytes()
    digest = metadata["stdist_sha256"].encode()
    assert content.count(digest) == 1
    assert hashlib.sha256(content.replace(digest, b"0" * 64)).hexdigest().encode() == digest
    keep = {key: metadata[key] for key in ("stdist", "stdist_cell_ids", "stdist_sha256")}
    pl.read_parquet(path).reverse().write_parquet(path, metadata=keep)
    with pytest.raises(DamageError, match=r"made\.parquet is not as stdist wrote it: damaged, or written again by"):
        open_forecasts(path)


def test_parquet_rows_in_any_order(forecasts, tmp_path):
    path = write_forecasts(forecasts, tmp_path / "made.parquet")
    metadata = pl.read_parquet_metadata(path)
    keep = {key: metadata[key] for key in ("stdist", "stdist_cell_ids")}
    pl.read_parquet(path).sample(fraction=1, shuffle=True, seed=1).write_parquet(path, metadata=keep)
    np.testing.assert_array_equal(read_forecasts(path).values, forecasts.values)


@pytest.mark.parametrize(
    ("column", "value", "line"),
    [("cell", 4711, "1 cells outside the contract's region, first 4711"), ("step", 5, "steps 1 to 5, .* says 1 to 4")],
)
def test_parquet_with_rows_that_were_not_promised_is_refused(forecasts, column, value, line, tmp_path):
    path = write_forecasts(forecasts, tmp_path / "made.parquet")
    metadata, table = pl.read_parquet_metadata(path), pl.read_parquet(path)
    other = table[:1].with_columns(pl.lit(value, table.schema[column]).alias(column))
    keep = {key: metadata[key] for key in ("stdist", "stdist_cell_ids")}
    pl.concat([table, other]).write_parquet(path, metadata=keep)
    with pytest.raises(InputError, match=line):
        open_forecasts(path)


def test_parquet_with_a_repeated_row_is_refused(forecasts, tmp_path):
    path = write_forecasts(forecasts, tmp_path / "made.parquet")
    metadata = pl.read_parquet_metadata(path)
    table = pl.read_parquet(path)
    keep = {key: metadata[key] for key in ("stdist", "stdist_cell_ids")}
    pl.concat([table, table[:1]]).write_parquet(path, metadata=keep)
    with pytest.raises(InputError, match="more than once"):
        read_forecasts(path)


@pytest.mark.parametrize(("points", "expected"), [(10 * 4 * 6 + 1, [10] * 9 + [3]), (3 * 6, [1] * 93)])
@pytest.mark.parametrize("suffix", [".zarr", ".parquet"])
def test_written_a_few_windows_at_a_time(forecasts, suffix, points, expected, tmp_path, monkeypatch):
    """93 windows of 4 steps and 6 cells, ten of them in memory, or less than one: the same values in the same order."""
    monkeypatch.setattr(forecast_header, "POINTS_IN_MEMORY", points)
    lengths, path = [], tmp_path / f"made{suffix}"

    def read(windows):
        lengths.append(windows.stop - windows.start)
        return forecasts.quantities[:, windows]

    WRITERS[suffix](forecasts.header, read, path)
    assert lengths == expected
    if suffix == ".parquet":
        table = pl.read_parquet(path)
        assert table.equals(table.sort("origin", "step", "cell"))
    again = read_forecasts(path)
    np.testing.assert_array_equal(again.values, forecasts.values)
    if forecasts.quantiles is not None:
        np.testing.assert_array_equal(again.quantiles, forecasts.quantiles)


@pytest.mark.parametrize("suffix", [".zarr", ".parquet"])
def test_a_failed_write_leaves_the_old_file(forecasts, suffix, tmp_path, monkeypatch):
    path = write_forecasts(forecasts, tmp_path / f"made{suffix}")

    def broken(*_args, **_kwargs):
        raise OSError("disk full")

    newer = replace(forecasts, values=forecasts.values + 1)
    with monkeypatch.context() as patch:
        patch.setattr(zarr.Array, "__setitem__", broken)
        patch.setattr(pl.LazyFrame, "sink_parquet", broken)
        with pytest.raises(OSError, match="disk full"):
            write_forecasts(newer, path)
    np.testing.assert_array_equal(read_forecasts(path).values, forecasts.values)
    write_forecasts(newer, path)
    np.testing.assert_array_equal(read_forecasts(path).values, newer.values)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_other_suffixes_and_absent_files_are_refused(forecasts, tmp_path):
    with pytest.raises(InputError, match=r"\.zarr, \.parquet or \.csv, not '\.txt'"):
        write_forecasts(forecasts, tmp_path / "made.txt")
    with pytest.raises(InputError, match="no such forecasts"):
        read_forecasts(tmp_path / "nothing.zarr")


def test_foreign_and_damaged_files_are_refused(tmp_path):
    pl.DataFrame({"cell": [1]}).write_parquet(tmp_path / "other.parquet")
    with pytest.raises(InputError, match="carries no contract"):
        read_forecasts(tmp_path / "other.parquet")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(InputError, match="damaged"):
        read_forecasts(tmp_path / "cut.parquet")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(InputError, match="damaged"):
        read_forecasts(tmp_path / "empty.zarr")


def test_arrays_that_contradict_their_contract_are_refused(forecasts, tmp_path):
    path = write_forecasts(forecasts, tmp_path / "made.zarr")
    described = path / "zarr.json"
    group = json.loads(described.read_text().replace(r"\"K\":4", r"\"K\":5"))
    del group["attributes"]["files"], group["attributes"]["digest"]  # as forecasts were before they had these
    described.write_text(json.dumps(group))
    with pytest.raises(InputError, match=r"shape \(93, 4, 3, 2\), their origins and contract say \(93, 5, 3, 2\)"):
        open_forecasts(path)
