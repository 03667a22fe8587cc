"""What each route answers, held against ``stdist forecast --next``."""

import base64
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from prometheus_client.parser import text_string_to_metric_families

from stdist.data import open_store
from stdist.evaluation.levels import LEVELS
from stdist.runs import recipes
from stdist.serving import answers
from stdist.serving.limits import MOST_CLIENTS, Rate

from .serving_world import request_of, silent

TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def client(calibrated_once, start):
    return start(calibrated_once)


def test_csv_is_the_file_that_forecast_next_writes(client, calibrated_once, tmp_path):
    out = tmp_path / "next.csv"
    recipes.forecast(replace(request_of(calibrated_once), out=out), silent)
    for answer in (
        client.get("/forecast", params={"format": "csv"}),
        client.get("/forecast", headers={"accept": "text/csv"}),
    ):
        assert answer.content == out.read_bytes()
        assert answer.headers["x-stdist-origin"] == "2013-11-10T22:00:00Z"
    some = client.get("/forecast?places=18,3&format=csv&quantiles=false").text.splitlines()
    assert some[0] == "origin,target,target_local,cell,step,forecast"
    rows = [line.split(",") for line in out.read_text().splitlines()[1:]]
    assert some[1:] == [",".join(row[:6]) for row in rows if row[3] in ("3", "18")]


def test_json_holds_the_same_numbers_to_the_last_digit(client, calibrated_once, tmp_path):
    out = tmp_path / "next.parquet"
    recipes.forecast(replace(request_of(calibrated_once), out=out), silent)
    written = pl.read_parquet(out)
    answer = client.get("/forecast?places=all&history=true").json()
    assert answer["levels"] == list(LEVELS) and not answer["superseded"] and answer["problem"] is None
    assert answer["target_local"] == [f"2013-11-11T0{hour}:00:00" for hour in range(4)]
    assert answer["target"][0] == "2013-11-10T23:00:00Z" and answer["origin_local"] == "2013-11-10T23:00:00"
    for place in answer["places"]:
        rows = written.filter(pl.col("cell") == place["id"]).sort("step")
        for name, values in {"forecast": place["forecast"], **place["quantiles"]}.items():
            assert np.float32(values).tolist() == rows[name].to_list()
    store = open_store(calibrated_once / "city.zarr")
    frames = len(store.times) - 6, len(store.times)
    history, seen = store.values("internet", *frames), store.observed("internet", *frames)
    for place, past, there in zip(answer["places"], history.reshape(6, -1).T, seen.reshape(6, -1).T, strict=True):
        assert [None if value is None else np.float32(value) for value in place["history"]] == [
            value if known else None for value, known in zip(past, there, strict=True)
        ]
    assert answer["store_digest"] == store.digest
    assert [place["id"] for place in client.get("/forecast?places=18, 3,18").json()["places"]] == [3, 18]


def test_a_run_without_calibration_has_no_quantiles(trained_once, start):
    answer = start(trained_once).get("/forecast?places=1").json()
    assert answer["levels"] == [] and list(answer["places"][0]) == ["id", "forecast"]


def test_places_tell_ids_and_where_they_lie(client, make_city, make_config, tmp_path, start):
    answer = client.get("/places").json()
    assert answer["kind"] == "grid" and answer["id"] == list(range(1, 21))
    assert answer["row"] == [row for row in range(4) for _ in range(5)] and answer["col"] == list(range(5)) * 4
    nodes = make_city(tmp_path / "city.zarr", nodes=3)
    recipes.train(make_config(nodes, tmp_path / "runs"), silent)
    client = start(tmp_path)
    assert client.get("/places").json() == {"kind": "nodes", "places": 3, "id": ["s0", "s1", "s2"]}
    assert [place["id"] for place in client.get("/forecast?places=s2").json()["places"]] == ["s2"]


def test_what_is_not_there_is_refused_in_one_line(client, monkeypatch):
    answer = client.get("/forecast?places=3,77")
    assert answer.status_code == 404
    assert answer.json()["error"].startswith("place '77' is not served; the nearest names are 7, ")
    for places in ("", ",".join(map(str, range(1001)))):
        assert client.get("/forecast", params={"places": places}).status_code == 400
    assert client.get("/forecast?format=xml").json()["error"].startswith("format: ")
    assert client.get("/nothing").status_code == 404 and client.post("/forecast").status_code == 405
    monkeypatch.setattr(answers, "MOST_NUMBERS", 2 * (4 * 10 + 6))
    assert client.get("/forecast?places=1,2&history=true").status_code == 200
    for path in ("/forecast?places=1,2,3&history=true", "/forecast?format=csv", "/forecast"):
        assert "ask for fewer places" in client.get(path).json()["error"]
    assert client.get("/places").status_code == 200


def test_metrics_count_requests_forecasts_and_the_age_of_the_data(calibrated_once, start):
    client = start(calibrated_once)
    for path in ("/forecast?places=1", "/forecast?places=1", "/forecast?places=x", "/what", "/ever"):
        client.get(path)
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }
    assert found["stdist_requests_total", "/forecast", "200"] == 2
    assert found["stdist_requests_total", "/forecast", "404"] == 1
    assert found["stdist_requests_total", "404", "other"] == 2
    assert found["stdist_request_seconds_bucket", "+Inf", "/forecast"] == 3
    assert found["stdist_forecasts_total",] == 1 and found["stdist_cache_hits_total",] == 3
    health = client.get("/health").json()
    assert health["status"] == "ok" and health["last_frame"] == "2013-11-10T22:00:00Z"
    assert found["stdist_data_age_seconds",] == pytest.approx(health["age_seconds"], abs=60)


def test_every_route_but_health_asks_for_the_token(calibrated_once, start):
    client = start(calibrated_once, token=TOKEN)
    basic = base64.b64encode(f"anyone:{TOKEN}".encode()).decode()
    wrong = (None, "Bearer", f"Bearer {TOKEN}0", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN, "Basic !", "Bearer é")
    for path in ("/", "/forecast", "/places", "/metrics", "/openapi.json", "/nothing", "/health/"):
        for header in wrong:
            answer = client.get(path, headers={} if header is None else {"authorization": header.encode()})
            assert answer.status_code == 401 and "internet" not in answer.text, (path, header)
        for header in (f"Bearer {TOKEN}", f"bearer {TOKEN}", f"Basic {basic}"):
            assert client.get(path, headers={"authorization": header}, follow_redirects=False).status_code != 401
    assert client.get("/health").status_code == 200


def test_bodies_are_refused(client):
    assert client.request("GET", "/health", content=b"x" * 4096).status_code == 200
    assert client.request("GET", "/health", content=b"x" * 4097).status_code == 413
    assert client.request("POST", "/forecast", content=iter([b"x"])).status_code == 413


def test_a_client_that_asks_too_often_waits(calibrated_once, start):
    client = start(calibrated_once, rate=0.5)
    assert client.get("/health").status_code == 200
    refused = client.get("/health")
    assert refused.status_code == 429 and refused.headers["retry-after"] == "2"


def test_rates_are_counted_by_client():
    now = 0.0
    rate = Rate(2, clock=lambda: now)
    assert [rate.wait("a") for _ in range(5)] == [0, 0, 0, 0, 0.5] and rate.wait("b") == 0
    now = 0.5
    assert [rate.wait("a"), rate.wait("a")] == [0, 0.5]
    now = 100.0
    assert [rate.wait("a") for _ in range(5)] == [0, 0, 0, 0, 0.5]  # a rest gives no more than that
    for number in range(MOST_CLIENTS + 10):
        rate.wait(str(number))
    assert len(rate._buckets) == MOST_CLIENTS
