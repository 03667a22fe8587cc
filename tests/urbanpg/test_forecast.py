"""A run forecasts its own nodes, wherever a store has them, and no others."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray

from stdist.data import GridStore
from stdist.errors import InputError
from stdist.runs import recipes
from stdist.runs.forecast_request import NEXT, ForecastRequest
from stdist.runs.recipes import train
from stdist.urbanpg.config import UrbanConfig


@pytest.fixture(scope="module", params=["urbanpg", "stid", "graph_wavenet"])
def config(request, city, make_config, tmp_path_factory) -> UrbanConfig:
    """Of a finished run on the sensors s3 to s7."""
    changes = {"data": {"region": "3:8"}, "model": {"kind": request.param}, "training": {"max_epochs": 1}}
    config = make_config(city, tmp_path_factory.mktemp("runs"), **changes)
    train(config, lambda line: None)
    return config


def forecast_to(run: Path, store: GridStore | Path, out: Path, region: str | None = None) -> tuple[xarray.Dataset, str]:
    """Forecasts of the test days, and what was said."""
    said: list[str] = []
    path = store if isinstance(store, Path) else store.path
    recipes.forecast(ForecastRequest(run, path, region, "test", out), said.append)
    with xarray.open_zarr(out) as made:
        return made.load(), "\n".join(said)


def test_a_copy_of_the_store_has_the_nodes_where_the_store_has_them(config, city, tmp_path):
    copy = Path(shutil.copytree(city.path, tmp_path / "copy.zarr"))
    with xarray.open_zarr(config.run_dir / "forecasts" / "test.zarr") as own:
        for region, nodes in ((None, slice(0, 5)), ("5:7", slice(2, 4))):
            made, said = forecast_to(config.run_dir, copy, tmp_path / f"{region}.zarr", region)
            assert made["cell"].values.tolist() == own["cell"].values[nodes].tolist()
            np.testing.assert_allclose(made["forecast"], own["forecast"][:, :, nodes], rtol=1e-6)
            assert "note:" not in said
    with pytest.raises(InputError, match=r"region 2:5 is not within the nodes 3:8 of .*copy\.zarr"):
        forecast_to(config.run_dir, copy, tmp_path / "x.zarr", "2:5")


def test_what_comes_next_is_the_splits_forecast_of_that_origin_and_needs_no_truth(config, city, tmp_path):
    """The last test window, asked for by its own last frame; and the last frame of all, behind which is nothing."""

    def of(split: str, origin: str | None, name: str) -> xarray.Dataset:
        request = ForecastRequest(config.run_dir, city.path, "4:7", split, tmp_path / name, origin)
        recipes.forecast(request, lambda line: None)
        with xarray.open_zarr(tmp_path / name) as made:
            return made.load()

    past = of("test", None, "test.zarr")
    last = past["origin"].values[-1] + np.timedelta64(city.attributes["utc_offset_minutes"], "m")
    again = of(NEXT, str(last.astype("datetime64[m]")), "again.zarr")
    assert again["origin"].values.tolist() == past["origin"].values[-1:].tolist()
    np.testing.assert_allclose(again["forecast"], past["forecast"][-1:], rtol=1e-5)
    ahead = of(NEXT, None, "ahead.zarr")
    assert ahead["origin"].values.tolist() == city.times[-1:].tolist() and np.isfinite(ahead["forecast"]).all()
    assert ahead["forecast"].shape == again["forecast"].shape


def test_later_days_may_have_the_nodes_elsewhere(config, make_city, tmp_path):
    later = make_city(tmp_path / "later.zarr", nodes=7, days=16, first=2)
    made, _ = forecast_to(config.run_dir, later, tmp_path / "all.zarr")
    assert made["cell"].values.tolist() == ["s3", "s4", "s5", "s6", "s7"]
    made, _ = forecast_to(config.run_dir, later, tmp_path / "two.zarr", "1:3")
    assert made["cell"].values.tolist() == ["s3", "s4"]


@pytest.mark.parametrize(("first", "nodes"), [(0, 5), (3, 4), (4, 5), (9, 9)])
def test_other_nodes_are_refused_however_many_they_are(config, make_city, tmp_path, first, nodes):
    store = make_city(tmp_path / "elsewhere.zarr", nodes=nodes, name="elsewhere", first=first)
    with pytest.raises(InputError) as error:
        forecast_to(config.run_dir, store, tmp_path / "x.zarr")
    remedy = "fit prompts to it with recipe few-shot" if config.model.kind == "urbanpg" else "train others on it"
    for part in (f"elsewhere.zarr has {nodes} nodes, ids s{first} to s{first + nodes - 1}", "ids s3 to s7", remedy):
        assert part in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "x.zarr").exists()


def test_a_city_of_another_name_with_the_same_ids_is_forecast_with_a_word(config, make_city, tmp_path):
    store = make_city(tmp_path / "elsewhere.zarr", name="elsewhere")
    _, said = forecast_to(config.run_dir, store, tmp_path / "x.zarr")
    assert "is of 'elsewhere', the run of 'toy town'; nodes of one id are taken to be the same" in said


def test_a_run_that_does_not_say_which_nodes_it_knows_forecasts_with_a_word(config, city, small_city, tmp_path):
    run = Path(shutil.copytree(config.run_dir, tmp_path / "run"))
    shutil.rmtree(run / "forecasts")
    for store, cells in ((city, city.cell_ids[3:8]), (small_city, small_city.cell_ids)):
        made, said = forecast_to(run, store, tmp_path / f"{store.path.name}")
        assert made["cell"].values.tolist() == cells.tolist()
        assert "test.zarr is not there to say which nodes the run knows" in said
