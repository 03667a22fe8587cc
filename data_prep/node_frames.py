"""Plans of one array (T, N, C) of consecutive frames over nodes, which the npz readers of sensors and zones share."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.arrays import ArrayFile, array_file, consecutive_days, parse_channels
from data_prep.common import city_of, only_source, parse_split, parse_start, require_on_grid, utc_offset_of
from data_prep.graphs import NodeTable, numbered, read_adjacency, read_node_table
from data_prep.plan import Day, Part, Plan
from stdist.data.schema import NodeSpec
from stdist.errors import InputError


def plan_node_frames(
    reader: str,
    sources: list[Path],
    *,
    key: str | None,
    known_channels: Mapping[int, Sequence[str]],
    start_hint: str,
    city: str | None,
    channels: str | None,
    start: str | None,
    cadence: int,
    utc_offset: int | None,
    units: str,
    adjacency: Path | None,
    node_ids: Path | None,
    train: str | None,
    validation: str | None,
    test: str | None,
) -> Plan:
    """Plan of one file in one part. key: its array, the only one where None. start_hint: what a missing start says.

    The other options are those of ``pems_npz.plan``.
    """
    path = only_source(sources, reader)
    array = array_file(path, key, "T, N, C")
    names = parse_channels(channels, array.shape[2], known_channels, str(path))
    if start is None:
        raise InputError(f"{path} has no time stamps; give the local time of its first frame: {start_hint}")
    stamps = parse_start(start) + np.arange(array.shape[0]) * np.timedelta64(cadence, "m")
    require_on_grid(path, stamps, cadence)
    nodes, weights, files, notes = graph_of(array.shape[1], adjacency, node_ids)
    town = city or city_of(path)
    spec = NodeSpec(
        city=town,
        channels=names,
        first_day=stamps[0].astype("datetime64[D]"),
        last_day=stamps[-1].astype("datetime64[D]"),
        node_ids=nodes.ids,
        cadence_minutes=cadence,
        utc_offset_minutes=utc_offset_of(town, utc_offset),
        units=units,
        latitude=nodes.latitude,
        longitude=nodes.longitude,
        adjacency=weights,
    )
    first = int((stamps[0] - stamps[0].astype("datetime64[D]")).astype(int)) // cadence
    part = Part(path.name, tuple(range(len(spec.days))), first)
    recipe = {"reader": reader, "start": str(stamps[0]), **notes}
    split = parse_split(train, validation, test, spec)
    return Plan(spec, recipe, [path, *files], split, [part], partial(read_node_frames, spec, array))


def graph_of(
    count: int, adjacency: Path | None, node_ids: Path | None
) -> tuple[NodeTable, np.ndarray | None, list[Path], dict[str, Any]]:
    """The ``count`` nodes and their weights from the two files a user may give; those files; recipe notes."""
    nodes = read_node_table(node_ids, count) if node_ids else numbered(count)
    weights, notes = read_adjacency(adjacency, nodes.ids) if adjacency else (None, {})
    return nodes, weights, [Path(file) for file in (node_ids, adjacency) if file], notes


def read_node_frames(spec: NodeSpec, array: ArrayFile, part: Part) -> Iterator[Day]:
    """Days of an array (T, N, C); ``part.payload`` is the index of its first frame."""
    frames = array.load()
    channels = {name: frames[:, :, index] for index, name in enumerate(spec.channels)}
    return consecutive_days(spec, part.payload, channels, str(array.path))
