"""``stdist demo``: the whole pipeline on an embedded synthetic city, or on a store of the user's."""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from data_prep import READERS
from stdist.config.yaml_core import load_yaml
from stdist.errors import InputError
from stdist.runs import recipes
from stdist.runs.recipes import parse_config
from stdist.vision_llm.dataset import open_grid

CITY = {"height": 14, "width": 14, "days": 16, "seed": 7}


def run_demo(out: Path, data: Path | None, log: Callable[[str], None]) -> dict[str, Any]:
    """Trains, forecasts and reports into the run folder ``out``; see :func:`stdist.runs.training.train`.

    Without ``data`` the city is generated beside the run, once. With it, the demo's schedule runs on that store's first
    channel, on at most a 6×6 region in the middle of its grid.
    """
    if out.name in ("", ".."):
        raise InputError(f"--out {str(out)!r} names no folder of its own; give one, as runs/demo")
    tree = load_yaml((files("stdist") / "presets" / "demo.yaml").read_text())
    tree |= {"name": out.name, "output_dir": str(out.parent)}
    if data is None:
        tree["data"]["store"] = str(_generated_city(out.parent / f"{out.name}-city.zarr", log))
    else:
        store = open_grid(data)
        (r0, r1), (c0, c1) = (_middle(size, 6) for size in store.shape)
        tree["data"] |= {"store": str(data), "channel": store.channels[0], "region": f"{r0}:{r1},{c0}:{c1}"}
        tree["frames"]["pixels_per_cell"] = "auto"
    return recipes.train(parse_config(tree, f"--out {out}"), log)


def _generated_city(path: Path, log: Callable[[str], None]) -> Path:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        READERS["synthetic"].prepare([], path, **CITY)
        log(f"generated a city of {CITY['height']}×{CITY['width']} cells and {CITY['days']} days: {path}")
    return path


def _middle(size: int, most: int) -> tuple[int, int]:
    length = min(size, most)
    return (size - length) // 2, (size - length) // 2 + length
