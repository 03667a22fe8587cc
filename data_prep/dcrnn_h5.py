"""Reader of the DCRNN data sets: METR-LA and PEMS-BAY, road speeds as data frames that pandas wrote to HDF5.

The data's facts (Li et al., 2018; speeds in mile/h, 5 minutes, one column a sensor):

| file | frame | T x N | days | missing |
|---|---|---|---|---|
| metr-la.h5 | ``df``, text ids | 34,272 x 207 | 119 from 2012-03-01 | zeros, 8.11 % |
| pems-bay.h5 | ``speed``, whole number ids | 52,116 x 325 | 181 from 2017-01-01 | 12 stamps absent; zeros, 0.003 % |

A detector that sees nothing reports 0: zeros are missing, as in the authors' masked scores. Stamps are the clock's
local time in California; the twelve that PEMS-BAY lacks are an hour, the one that the clock skips in March.

What is made of it: 0 and NaN are missing. Absences of up to an hour are restored as time steps whose
values are all missing, so that PEMS-BAY is one segment of 52,128 steps; longer ones are gaps. The store has
one UTC offset, that of the winter (−8 h): its local times are the file's own stamps, its UTC stamps are one
hour late in summer. The graph comes from the roads' distances or a matrix (``graphs.read_graph``).
"""

from functools import partial
from pathlib import Path

import numpy as np

from data_prep.common import PACIFIC, PACIFIC_CLOCK, only_source
from data_prep.graphs import SensorFiles
from data_prep.pandas_h5 import PandasFrame, open_frame
from data_prep.preparation import Plan
from data_prep.reader import reader
from data_prep.steps import cadence_of, part_of, plan_of, slices_of_days, steps_of
from stdist.data.schema import fill_short_absences

RESTORED_MINUTES = 60


@reader("dcrnn-h5")
def plan(
    sources: list[Path],
    *,
    city: str | None = None,
    channel: str = "speed",
    utc_offset: int = PACIFIC,
    files: SensorFiles,
) -> Plan:
    """Plan of one file, one part a local day; reads its index and labels only.

    city: name of the file by default. channel: what the values are. utc_offset: minutes the city is ahead of UTC
    in winter. adjacency: the roads' distances, ``distances_la_2012.csv``, or a matrix of weights.
    meta: the sensors' places, ``graph_sensor_locations.csv``.
    Raises InputError where the file is no whole data frame, its stamps are repeated or irregular, or a graph or
    places do not fit its sensors.
    """
    path = only_source(sources, "dcrnn-h5")
    frame = open_frame(path)
    stamps = frame.stamps()
    cadence = cadence_of(path, stamps)
    nodes = files.nodes(frame.ids)
    spec = nodes.spec(city or path.stem.lower(), [channel], stamps, cadence, utc_offset, "mile/h")
    recipe = {
        "reader": "dcrnn-h5",
        "frame": frame.group,
        "zeros": "missing",
        "restored_minutes": RESTORED_MINUTES,
        "clock": PACIFIC_CLOCK,
        **nodes.notes,
    }
    rows = steps_of(path, spec, stamps)
    present = np.zeros(spec.steps, bool)
    present[rows] = True
    all_steps = np.flatnonzero(fill_short_absences(present, RESTORED_MINUTES // cadence))
    parts = []
    for first, last in slices_of_days(all_steps // spec.slots_per_day):
        steps = all_steps[first:last]
        start, stop = np.searchsorted(rows, (steps[0], steps[-1] + 1)).tolist()
        in_file = np.isin(steps, rows[start:stop])
        parts.append(part_of(spec, steps, partial(_load, frame, channel, start, stop, in_file), path))
    return plan_of(spec, recipe, [path, *nodes.files], parts)


def _load(frame: PandasFrame, channel: str, start: int, stop: int, in_file: np.ndarray) -> dict[str, np.ndarray]:
    """Rows [start, stop) as the steps ``in_file``, bool [n]; the others are restored ones."""
    values = np.full((len(in_file), len(frame.ids)), np.nan)
    values[in_file] = frame.values(start, stop)
    values[values == 0] = np.nan
    return {channel: values}
