"""Public data in the shapes that people have it in, read back to the last bit; skipped where the data is absent."""

import gzip

import numpy as np
import polars as pl
import pytest

from data_prep import READERS
from data_prep.arrays import load_array


@pytest.fixture
def metr(real_data) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Ids, stamps and speeds [2016, 207] of the public week of METR-LA."""
    path = real_data / "metr_la_week" / "los_speed.csv"
    with path.open() as file:
        ids = file.readline().strip().split(",")
    stamps = np.datetime64("2012-03-01T00:00") + np.arange(2016) * np.timedelta64(5, "m")
    return ids, stamps, np.loadtxt(path, delimiter=",", skiprows=1)


@pytest.fixture
def zones(real_data) -> np.ndarray:
    """Flows [17544, 69, 2] of New York's zones."""
    (path,) = (real_data / "nyc_zones").glob("*.npz")
    return load_array(path, "arr_0")


def _frame(ids: list[str], stamps: np.ndarray, speeds: np.ndarray) -> pl.DataFrame:
    columns = dict(zip(ids, speeds.T, strict=True))
    return pl.DataFrame({"timestamp": pl.Series(stamps.astype("datetime64[ms]"))} | columns)


@pytest.mark.parametrize("shape", ["wide", "epoch", "semicolons", "long", "turned", "parquet", "long parquet", "days"])
def test_the_week_of_metr_in_every_shape(metr, read_plan, tmp_path, shape):
    ids, stamps, speeds = metr
    frame, path = _frame(ids, stamps, speeds), tmp_path / "metr.csv.gz"
    long = frame.unpivot(index="timestamp", variable_name="sensor_id", value_name="speed")
    options, files = {"city": "metr-la", "channel": "speed"}, [path]
    if shape == "wide":
        text = frame.write_csv()
    elif shape == "epoch":
        text = frame.with_columns(pl.col("timestamp").dt.epoch("s")).write_csv(line_terminator="\r\n")
    elif shape == "semicolons":
        text = frame.write_csv(separator=";", decimal_comma=True, datetime_format="%d.%m.%Y %H:%M")
    elif shape == "long":
        text = long.sample(fraction=1, shuffle=True, seed=0).write_csv()
    elif shape == "turned":
        names = [str(stamp).replace("T", " ") for stamp in stamps]
        turned = pl.DataFrame({"id": ids} | dict(zip(names, speeds, strict=True)))
        text = turned.write_csv()
    elif shape in ("parquet", "long parquet"):
        files, text = [tmp_path / "metr.parquet"], ""
        (frame if shape == "parquet" else long).write_parquet(files[0], row_group_size=5000)
    else:
        files, text = [], ""
        for day in (3, 1, 0, 6, 5, 4, 2):
            files.append(tmp_path / f"{'gfedcba'[day]}.csv")
            frame[288 * day : 288 * (day + 1)].write_csv(files[-1])
    path.write_bytes(gzip.compress(text.encode(), 1))
    plan = READERS["table"].plan(files, **options)
    values, present = read_plan(plan)
    order = [plan.spec.node_ids.tolist().index(int(name)) for name in ids]
    np.testing.assert_array_equal(values[:, order], speeds.astype(np.float32))
    assert present.all() and plan.spec.channels == ("speed",) and plan.spec.cadence_minutes == 5


@pytest.mark.parametrize("shape", ["long", "a file a zone", "an array"])
def test_the_zones_of_new_york_in_every_shape(zones, read_plan, tmp_path, shape):
    steps = 24 * 61
    flows, stamps = zones[:steps], np.datetime64("2019-01-01T00:00") + np.arange(steps) * np.timedelta64(1, "h")
    when = pl.Series("pickup_hour", np.repeat(stamps, 69).astype("datetime64[ms]"))
    table = pl.DataFrame(
        [
            when,
            pl.Series("zone_id", np.tile(np.arange(69), steps)),
            *(pl.Series(n, flows[..., i].ravel()) for i, n in enumerate(("flow_in", "flow_out"))),
        ]
    )
    options, files = {"city": "nyc", "units": "trips"}, [tmp_path / "trips.csv"]
    if shape == "long":
        table.write_csv(files[0], datetime_format="%m/%d/%Y %I:%M:%S %p")
    elif shape == "an array":
        files = [tmp_path / "nyc.npz"]
        np.savez(files[0], flows=flows, adjacency=np.eye(69))
        options |= {"array": "flows", "channel": "flow_in,flow_out", "start": "2019-01-01", "cadence": 60}
    else:
        files = []
        for (zone,), part in table.partition_by("zone_id", as_dict=True).items():
            files.append(tmp_path / f"{zone}.tsv")
            part.drop("zone_id").write_csv(files[-1], separator="\t", datetime_format="%Y-%m-%dT%H:%M:%S%.3f")
        options |= {"values": "flow_in,flow_out"}
    plan = READERS["table"].plan(files, **options)
    for number, channel in enumerate(("flow_in", "flow_out")):
        np.testing.assert_array_equal(read_plan(plan, channel)[0], flows[..., number].astype(np.float32))
    assert plan.spec.node_ids.tolist() == list(range(69)) and plan.spec.units == "trips"
