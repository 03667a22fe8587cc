"""Plans of one array (T, N, C) of consecutive frames over nodes, which the npz readers of sensors and zones share."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.arrays import ArrayFile, array_file, parse_channels
from data_prep.common import city_of, only_source, with_spans
from data_prep.frames import frames_of, part_of, plan_of, stamps_from
from data_prep.graphs import counted_nodes
from data_prep.plan import Plan


def node_reader(
    reader: str,
    key: str | None,
    known_channels: Mapping[int, Sequence[str]],
    *,
    minutes: int,
    units: str,
    example: str,
) -> Callable[..., Plan]:
    """The ``plan`` of a reader. key: its array, the only one where None. minutes: its usual cadence. known_channels:
    names by their number. example: of a start."""

    @with_spans
    def plan(
        sources: list[Path],
        *,
        city: str | None = None,
        channels: str | None = None,
        start: str | None = None,
        cadence: int = minutes,
        utc_offset: int | None = None,
        adjacency: Path | None = None,
        node_ids: Path | None = None,
    ) -> Plan:
        """Plan of one file.

        channels: names in order, ``a,b``; the usual ones of their number by default. start: local ISO time of the
        first frame, required. adjacency: square table of weights, or CSV of edges from,to,distance
        (``graphs.read_graph``). node_ids: ids one a line, or CSV with a column of ids and perhaps places
        (``graphs.read_nodes``); numbered from 0 by default. Raises InputError where a file or an option does not fit.
        """
        path = only_source(sources, reader)
        array = array_file(path, key, "T, N, C")
        names = parse_channels(channels, array.shape[2], known_channels, str(path))
        stamps = stamps_from(path, start, array.shape[0], cadence, example)
        nodes = counted_nodes(array.shape[1], adjacency, node_ids)
        spec = nodes.spec(city or city_of(path), names, stamps, cadence, utc_offset, units)
        part = part_of(spec, frames_of(path, spec, stamps), partial(_load, array, names), path)
        recipe = {"reader": reader, "start": str(stamps[0]), **nodes.notes}
        return plan_of(spec, recipe, [path, *nodes.files], [part])

    return plan


def _load(array: ArrayFile, names: Sequence[str]) -> dict[str, np.ndarray]:
    frames = array.load()
    return {name: frames[:, :, index] for index, name in enumerate(names)}
