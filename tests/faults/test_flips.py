"""A bit that flips anywhere, in a store, a checkpoint, a part of a preparation, a forecast or a piece of one, is told
or changes nothing: never does a command end with another result and no word about it."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from data_prep import Day, Part, Plan, prepare
from stdist.data import NodeSpec, open_store
from stdist.errors import InputError, Interrupted
from stdist.evaluation import (
    ChunkGrid,
    ForecastHeader,
    ForecastMetadata,
    ForecastWriter,
    forecast_contract,
    open_forecasts,
)
from stdist.runs import recipes
from stdist.runs.forecasting import finished_stage
from stdist.runs.recipes import parse_config, recipe_of

DAYS, SLOTS, NODES = 18, 24, 6
FIRST = np.datetime64("2024-03-04")


@dataclass(frozen=True)
class Case:
    """Copies of ``folder`` are damaged; ``outcome`` reads what a command reads of one, or finishes what was begun, and
    returns a digest of the result."""

    folder: Path
    outcome: Callable[[Path], str]


def _read(part: Part) -> Iterator[Day]:
    for day in part.days:
        values = np.random.default_rng(day).gamma(2, 30, (SLOTS, NODES)).astype(np.float32)
        values[values < 8] = np.nan
        yield Day(day, {"flow": values})


def _plan() -> Plan:
    ids = np.array([f"s{number}" for number in range(NODES)])
    degrees = np.linspace(45, 46, NODES)
    spec = NodeSpec("toy", ("flow",), FIRST, FIRST + DAYS - 1, ids, 60, 60, latitude=degrees, longitude=degrees)
    return Plan(spec, {"reader": "test"}, [], None, [Part(f"day {day}", (day,)) for day in range(DAYS)], _read)


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str(array.dtype).encode() + array.tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def store_case(tmp_path_factory) -> Case:
    def read(folder: Path) -> str:
        store = open_store(folder)
        batches = [
            store.windows(span, 12, 12, channel="flow").read(np.arange(3)) for span in ("train", "validation", "test")
        ]
        arrays = [array for b in batches for array in (b.history, b.target, b.target_observed, b.origin_index)]
        every = store.values("flow", 0, DAYS * SLOTS), store.observed("flow")
        statistics = store.statistics("flow", store.default_split.named("train"))
        figures = np.array([statistics.mean, statistics.std, statistics.maximum])
        places = [store.dataset[name].values for name in ("latitude", "longitude")]
        axes = store.cell_ids, store.times, store.present
        return _digest(*arrays, *every, figures, statistics.cell_mean, *places, *axes)

    return Case(prepare(_plan(), tmp_path_factory.mktemp("store") / "toy.zarr").path, read)


@pytest.fixture(scope="module")
def checkpoint_case(store_case, tmp_path_factory) -> Case:
    output = tmp_path_factory.mktemp("runs")
    data = {"store": str(store_case.folder), "channel": "flow", "history": 6, "horizon": 3}
    training = {"max_epochs": 1, "patience": 1, "learning_rate": 0.01}
    tree = {"recipe": "urbanpg-train", "name": "toy", "output_dir": str(output), "data": data}
    config = parse_config(tree | {"model": {"d": 4}, "training": training}, "a test")
    recipes.train(config, lambda line: None)

    def load(folder: Path) -> str:
        checkpoint, summary = finished_stage(folder, "train")
        forecaster = recipe_of(config).load(config, checkpoint)
        tensors = forecaster.model.state_dict()
        weights = [tensors[name].numpy() for name in sorted(tensors)]
        return _digest(*weights, np.array([str(summary), str(forecaster.fitted)]))

    shutil.copytree(config.run_dir / "checkpoints", output / "alone" / "checkpoints")
    return Case(output / "alone", load)


@pytest.fixture(scope="module")
def part_case(tmp_path_factory) -> Case:
    out = tmp_path_factory.mktemp("parts") / "toy.zarr"

    def stop(done: int, _total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        prepare(_plan(), out, progress=stop)
    shutil.move(f"{out}.partial", out.parent / "half")

    def finish(folder: Path) -> str:
        partial = folder.with_name("toy.zarr.partial")
        shutil.rmtree(folder.with_name("toy.zarr"), ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        folder.rename(partial)
        return prepare(_plan(), folder.with_name("toy.zarr")).digest

    return Case(out.parent / "half", finish)


@pytest.fixture(scope="module")
def write(store_case) -> Callable[[Path, int | None], None]:
    """Writes forecasts into a file, or only its first pieces."""
    windows = open_store(store_case.folder).windows("test", 6, 3, channel="flow")
    metadata = ForecastMetadata(run="toy", checkpoint="train/step-1", contract=forecast_contract(windows))
    header = ForecastHeader(metadata, windows.origin_times, windows.store.cell_ids)
    grid = ChunkGrid(len(windows), NODES, 20, 4)
    values = np.random.default_rng(0).gamma(2, 30, (1, len(windows), 3, NODES)).astype(np.float32)

    def write(path: Path, until: int | None) -> None:
        with ForecastWriter(path, header, np.arange(NODES), grid, {}, lambda line: None) as writer:
            for chunk in writer.remaining[:until]:
                writer.write(chunk, values[:, chunk.windows, :, chunk.cells])
            if until is None:
                writer.finish()

    return write


def _file_case(write: Callable[[Path, int | None], None], folder: Path, suffix: str) -> Case:
    write(folder / "made" / f"f{suffix}", None)

    def read(folder: Path) -> str:
        forecasts = open_forecasts(folder / f"f{suffix}")
        header = forecasts.header
        blocks = [forecasts.read(block, tile) for block, tile in header.blocks()]
        return _digest(header.origins, header.cell_ids, *blocks, np.array([str(header.metadata)]))

    return Case(folder / "made", read)


@pytest.fixture(scope="module")
def zarr_case(write, tmp_path_factory) -> Case:
    return _file_case(write, tmp_path_factory.mktemp("arrays"), ".zarr")


@pytest.fixture(scope="module")
def parquet_case(write, tmp_path_factory) -> Case:
    return _file_case(write, tmp_path_factory.mktemp("tables"), ".parquet")


@pytest.fixture(scope="module")
def piece_case(write, tmp_path_factory) -> Case:
    begun = tmp_path_factory.mktemp("pieces")
    write(begun / "f.zarr", 4)
    shutil.move(begun / "f.zarr.partial", begun / "half")

    def finish(folder: Path) -> str:
        path = folder.with_name("f.zarr")
        for left in (path, folder.with_name("f.zarr.partial")):
            shutil.rmtree(left, ignore_errors=True)
        folder.rename(folder.with_name("f.zarr.partial"))
        write(path, None)
        return _digest(*(np.frombuffer(file.read_bytes(), "u1") for file in sorted(path.rglob("*")) if file.is_file()))

    return Case(begun / "half", finish)


def flip(folder: Path, rng: np.random.Generator) -> str:
    """Flips one bit of all the bytes below ``folder``; returns its place."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    ends = np.cumsum([path.stat().st_size for path in files])
    # Half of the places are drawn by file: else the largest would have them all.
    byte = int(rng.integers(ends[-1]))
    number = int(rng.integers(len(files))) if rng.random() < 0.5 else int(np.searchsorted(ends, byte, "right"))
    content = bytearray(files[number].read_bytes())
    place, bit = int(rng.integers(len(content))), int(rng.integers(8))
    content[place] ^= 1 << bit
    files[number].write_bytes(content)
    return f"{files[number].relative_to(folder)}, byte {place}, bit {bit}"


def flip_and_see(case: Case, seed: int, count: int, tmp_path: Path) -> None:
    def outcome() -> str:
        shutil.copytree(case.folder, tmp_path / "copy", dirs_exist_ok=True)
        return case.outcome(tmp_path / "copy")

    expected, ends, rng = outcome(), Counter[str](), np.random.default_rng(seed)
    for _ in range(count):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(case.folder, tmp_path / "copy")
        where = flip(tmp_path / "copy", rng)
        try:
            result = case.outcome(tmp_path / "copy")
        except InputError as error:
            assert "\n" not in str(error), f"{where}: {error}"
            ends["noticed"] += 1
            continue
        assert result == expected, f"{where}: another result, and no word about it"
        ends["without effect"] += 1
    print(dict(ends))


KINDS = ["store_case", "checkpoint_case", "part_case", "piece_case", "zarr_case", "parquet_case"]


@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for seed, kind in enumerate(KINDS)])
def test_some_flips(kind, seed, request, tmp_path):
    flip_and_see(request.getfixturevalue(kind), seed, 15, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for seed, kind in enumerate(KINDS, 100)])
def test_fifteen_hundred_flips(kind, seed, request, tmp_path):
    flip_and_see(request.getfixturevalue(kind), seed, 250, tmp_path)
