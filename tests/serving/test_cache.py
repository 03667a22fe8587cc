"""One forecast for all requests, of one state of the store, whatever happens to the store meanwhile."""

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import pytest

from stdist.data import Day, open_store
from stdist.data.append import StoreAppender
from stdist.errors import InputError
from stdist.runs import recipes
from stdist.serving import city, forecasts
from stdist.serving.city import CityForecaster

from .serving_world import request_of, silent


def append_day(store: Path) -> str:
    """A day behind the last, and another last value before it; returns the digest."""
    old = open_store(store)
    before, slots = len(old.times) // 24, 24
    with StoreAppender(store, corrections=True) as appender:
        appender.begin(old.axis_days.last_day + 1)
        for index, factor in ((before - 1, 0.5), (before, 3.0)):
            values = factor * old.values("internet", len(old.times) - slots, len(old.times))
            appender.add(Day(index, {"internet": values}))
        appender.finish()
    return open_store(store).digest


def written(folder: Path, out: Path) -> dict[int, list[float]]:
    recipes.forecast(replace(request_of(folder), out=out), silent)
    table = pl.read_parquet(out).sort("cell", "step")
    return {cell: rows["forecast"].to_list() for (cell,), rows in table.group_by("cell", maintain_order=True)}


def values_of(answer: dict) -> dict[int, list[float]]:
    return {place["id"]: np.float32(place["forecast"]).tolist() for place in answer["places"]}


class Slow(CityForecaster):
    """Counts its forecasts, and holds all but the first until ``go`` is set."""

    def __init__(self, folder: Path):
        super().__init__(request_of(folder), silent)
        self.made, self.go = 0, threading.Event()

    def make(self):
        self.made += 1
        assert self.made == 1 or self.go.wait(60)
        return super().make()


@pytest.fixture(autouse=True)
def look_always(monkeypatch):
    monkeypatch.setattr(forecasts, "LOOK_EVERY", 0)


def gather(client, *paths, meanwhile=lambda: None):
    """Requests at the same time, in the event loop of the service."""

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(client.app), base_url="http://test") as session:
            tasks = [asyncio.create_task(session.get(path)) for path in paths]
            await asyncio.sleep(0.2)
            meanwhile()
            return [answer.json() for answer in await asyncio.gather(*tasks)]

    return asyncio.run(ask())


def test_requests_that_arrive_together_share_one_computation(folder, start, tmp_path):
    slow = Slow(folder)
    client = start(slow)
    before = client.get("/forecast").json()
    digest = append_day(folder / "city.zarr")
    answers = gather(client, *["/forecast"] * 20, meanwhile=slow.go.set)
    assert slow.made == 2
    assert {answer["store_digest"] for answer in answers} == {digest} != {before["store_digest"]}
    assert {answer["origin_local"] for answer in answers} == {"2013-11-11T23:00:00"}
    expected = written(folder, tmp_path / "next.parquet")
    assert all(values_of(answer) == expected for answer in answers) and values_of(before) != expected
    assert client.get("/forecast").json() == answers[0] and slow.made == 2


def test_who_will_not_wait_longer_gets_the_forecast_before_which_says_so(folder, start):
    slow = Slow(folder)
    client = start(slow, patience=0.05)
    before = client.get("/forecast").json()
    append_day(folder / "city.zarr")

    async def impatient():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(client.app), base_url="http://test") as session:
            old = (await session.get("/forecast")).json()
            slow.go.set()
            while (new := (await session.get("/forecast")).json())["superseded"]:
                await asyncio.sleep(0.01)
            return old, new

    old, new = asyncio.run(impatient())
    assert old == before | {"superseded": True} and new["origin_local"] == "2013-11-11T23:00:00"


@pytest.mark.parametrize("when", ["sweep_with", "forecast_in_memory", "of_next"])
def test_an_append_while_the_store_is_read_makes_no_mixture(folder, start, tmp_path, monkeypatch, when):
    """Days are appended and a value corrected before the windows are read, before the forecast, and behind it."""
    client = start(folder)
    store, real, digests = folder / "city.zarr", getattr(city, when), []
    append_day(store)  # the forecast that follows is made with the loaded model

    def appended_meanwhile(*arguments):
        if not digests:
            digests.append(append_day(store))
        return real(*arguments)

    monkeypatch.setattr(city, when, appended_meanwhile)
    first = gather(client, "/forecast?history=true")[0]
    (answer,) = gather(client, "/forecast?history=true")
    assert answer["store_digest"] == digests[0] and answer["origin_local"] == "2013-11-12T23:00:00"
    assert values_of(answer) == written(folder, tmp_path / "next.parquet")
    values = open_store(store).values("internet", 12 * 24 - 6, 12 * 24).reshape(6, -1).T
    assert [place["history"][-1] for place in answer["places"]] == pytest.approx(values[:, -1].tolist())
    if first["store_digest"] != digests[0]:  # whole as well, of the store before
        assert first["origin_local"] == "2013-11-11T23:00:00"


def test_a_store_that_cannot_be_forecast_leaves_the_forecast_before(folder, start, monkeypatch):
    client = start(folder)
    before, store = client.get("/forecast").json(), folder / "city.zarr"
    store.rename(folder / "away.zarr")
    gather(client, "/forecast")
    (answer,) = gather(client, "/forecast")
    assert answer == before | {"superseded": True, "problem": answer["problem"]} and "city.zarr" in answer["problem"]
    assert client.get("/health").status_code == 503 and client.get("/health").json()["status"] == "behind"
    (folder / "away.zarr").rename(store)
    gather(client, "/forecast")
    assert client.get("/forecast").json() == before and client.get("/health").status_code == 200


@pytest.mark.parametrize("retry_after", [3600, 0])
def test_a_failure_is_tried_again_after_a_while_or_on_another_state(folder, start, monkeypatch, retry_after):
    slow = Slow(folder)
    client = start(slow)
    slow.go.set()
    append_day(folder / "city.zarr")
    monkeypatch.setattr(forecasts, "RETRY_AFTER", retry_after)
    with monkeypatch.context() as broken:
        broken.setattr(city, "forecast_in_memory", lambda *_: (_ for _ in ()).throw(InputError("no")))
        for _ in range(3):
            assert gather(client, "/forecast")[0]["problem"] == "no"
    assert slow.made == (2 if retry_after else 4)
    if retry_after:
        append_day(folder / "city.zarr")
    answer = gather(client, "/forecast")[0]
    assert answer["problem"] is None and not answer["superseded"]
    assert slow.made == (3 if retry_after else 5)


def test_an_append_leaves_the_model_loaded_and_a_calibration_loads_it_anew(folder, start, monkeypatch):
    client = start(folder)
    monkeypatch.setattr(city, "recipe_of", None)
    loads = []
    for recipe in {type(recipes.recipe_of(recipes.read_run_config(folder / "runs" / "tiny")))}:
        real = recipe.load
        monkeypatch.setattr(recipe, "load", lambda *a, real=real: loads.append(1) or real(*a))
    append_day(folder / "city.zarr")
    gather(client, "/forecast")
    assert loads == []
    (folder / "runs" / "tiny" / "calibration.json").unlink()
    (answer,) = gather(client, "/forecast")
    assert loads == [1] and answer["levels"] == [] and answer["calibration"] is None
