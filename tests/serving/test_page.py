"""The page in a real browser: a click on the map shows a place's last frames, forecast and intervals."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn

from stdist.runs import recipes
from stdist.serving.city import CityForecast, CityForecaster

from .serving_world import request_of, silent

PATIENCE = 120
"""Seconds a browser may take on a crowded machine."""
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1200,900"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install 'stdist[dev]'")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver; apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in (*OPTIONS.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def served() -> Iterator[Callable[[Any], str]]:
    """Serves an app on a port of its own; returns its address."""
    ends = []

    def serve(app: Any) -> str:
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        until(lambda: server.started)
        ends.append((server, thread))
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"

    yield serve
    for server, thread in ends:
        server.should_exit = True
        thread.join(PATIENCE)


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, "the page did not get there"
        time.sleep(0.05)
    return value


def text(browser: Any, name: str) -> str:
    return browser.find_element("id", name).text


def click(browser: Any, x: float, y: float) -> None:
    """At shares of the map's width and height."""
    from selenium.webdriver import ActionChains

    canvas = browser.find_element("id", "map")
    size = canvas.size
    right, down = int((x - 0.5) * size["width"]), int((y - 0.5) * size["height"])
    ActionChains(browser).move_to_element_with_offset(canvas, right, down).click().perform()


def figure(value: float) -> str:
    return str(round(value)) if abs(value) >= 1000 else f"{float(f'{value:.4g}'):g}"


def test_a_click_on_a_cell_shows_its_curve(browser, served, start, calibrated_once):
    client = start(calibrated_once)
    browser.get(served(client.app))
    until(lambda: "20 places" in text(browser, "said"))
    assert "behind 2013-11-10 23:00 local time (2013-11-10 22:00 UTC)" in text(browser, "said")
    # Row 0 lies in the south: the second row from above is row 2, and its fourth cell has the id 2 * 5 + 4.
    click(browser, 3.5 / 5, 1.5 / 4)
    until(lambda: text(browser, "name") == "Place 14")
    (place,) = client.get("/forecast?places=14&history=true").json()["places"]
    head, *rows = (row.text for row in browser.find_elements("css selector", "#table tr"))
    assert head == "local time forecast 80 % 95 %"
    of = place["quantiles"]

    def between(low: str, high: str, step: int) -> str:
        return f"{figure(of[low][step])} – {figure(of[high][step])}"

    assert rows == [
        f"2013-11-11 0{step}:00 {figure(place['forecast'][step])} "
        f"{between('q10', 'q90', step)} {between('q2.5', 'q97.5', step)}"
        for step in range(4)
    ]
    points = {
        shape.get_attribute("class"): [tuple(map(float, point.split(","))) for point in drawn.split(" ")]
        for shape in browser.find_elements("css selector", "#curve polyline, #curve polygon")
        if (drawn := shape.get_attribute("points"))
    }
    assert {name: len(drawn) for name, drawn in points.items()} == {"past": 6, "next": 5, "narrow": 8, "wide": 8}
    # The scale of the axis, from two values of the curve, gives every other one.
    values = [place["history"][-1], *place["forecast"]]
    heights = [y for _, y in points["next"]]
    low, high = values.index(min(values)), values.index(max(values))
    scale = (heights[high] - heights[low]) / (values[high] - values[low])
    bands = [*of["q97.5"], *reversed(of["q2.5"])]
    for (_, y), value in [*zip(points["next"], values, strict=True), *zip(points["wide"], bands, strict=True)]:
        assert y == pytest.approx(heights[low] + scale * (value - values[low]), abs=0.3)
    problems = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not problems


def test_nodes_without_coordinates_are_a_list(browser, served, start, make_city, make_config, tmp_path):
    store = make_city(tmp_path / "city.zarr", nodes=3)
    recipes.train(make_config(store, tmp_path / "runs"), silent)
    browser.get(served(start(tmp_path).app))
    entry = until(lambda: browser.find_elements("css selector", "#list option"))[1]
    assert entry.text.startswith("s1: ")
    entry.click()
    until(lambda: text(browser, "name") == "Place s1")
    assert "the run is not calibrated" in text(browser, "legend")
    assert [row.text.count(" ") for row in browser.find_elements("css selector", "#table tr")[1:]] == [2] * 4


class Located(CityForecaster):
    """Three sensors: s0 in the south-west, s1 in the north-west, s2 in the north-east."""

    def make(self) -> CityForecast:
        where = {"latitude": np.array([45.0, 45.1, 45.1]), "longitude": np.array([9.0, 9.0, 9.2])}
        return replace(super().make(), location=where)


def test_nodes_with_coordinates_lie_on_a_map_north_above(browser, served, start, make_city, make_config, tmp_path):
    store = make_city(tmp_path / "city.zarr", nodes=3)
    recipes.train(make_config(store, tmp_path / "runs"), silent)
    browser.get(served(start(Located(request_of(tmp_path), silent)).app))
    until(lambda: "3 places" in text(browser, "said"))
    for name, x, y in (("s0", 0.02, 0.97), ("s1", 0.02, 0.03), ("s2", 0.98, 0.03)):
        click(browser, x, y)
        until(lambda name=name: text(browser, "name") == f"Place {name}")


def test_the_page_loads_nothing_from_elsewhere():
    page = (Path(__file__).parents[2] / "stdist" / "serving" / "page.html").read_text()
    page = page.replace("http://www.w3.org/2000/svg", "")  # a name
    assert "http:" not in page and "https:" not in page and "//cdn" not in page and " src=" not in page
