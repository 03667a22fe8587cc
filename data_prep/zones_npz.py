"""Reader of flows by zone: one npz file with one array (T, N, C) over consecutive frames, no time stamps.

An example is the taxi traffic of 69 zones of Manhattan: ``arr_0`` (17544, 69, 2), hourly, 2019-01-01 to
2020-12-31 local time without change of clocks (731 x 24 frames), trips into and out of a zone as the file's
name says (``inoutflow``), no missing value. Its zones.csv (``zone_id,graph_id,zone_name``) is the table of
nodes, its adjacency.csv has a header of positions and weights 0 and 1. The collapse of traffic in March 2020
is real: a training span before it and a test span after it differ.

What is made of it: zeros are measured, NaN is missing.
"""

from pathlib import Path

from data_prep.node_frames import plan_node_frames
from data_prep.plan import Plan

CHANNELS = {1: ("flow",), 2: ("flow_in", "flow_out")}


def plan(
    sources: list[Path],
    *,
    city: str | None = None,
    channels: str | None = None,
    start: str | None = None,
    cadence: int = 60,
    utc_offset: int | None = None,
    adjacency: Path | None = None,
    node_ids: Path | None = None,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
) -> Plan:
    """Plan of one file; options that are not said here are those of ``pems_npz.plan``.

    channels: names in order, ``flow_in,flow_out`` by default where there are two.
    """
    return plan_node_frames(
        "zones-npz",
        sources,
        key=None,
        known_channels=CHANNELS,
        start_hint="--start 2019-01-01",
        city=city,
        channels=channels,
        start=start,
        cadence=cadence,
        utc_offset=utc_offset,
        units="trips",
        adjacency=adjacency,
        node_ids=node_ids,
        train=train,
        validation=validation,
        test=test,
    )
