"""Reader of the DCRNN data sets: METR-LA and PEMS-BAY, road speeds as data frames that pandas wrote to HDF5.

The data's facts (Li et al., 2018; speeds in mile/h, 5 minutes, one column a sensor):

| file | frame | T x N | days | missing |
|---|---|---|---|---|
| metr-la.h5 | ``df``, text ids | 34,272 x 207 | 119 from 2012-03-01 | zeros, 8.11 % |
| pems-bay.h5 | ``speed``, whole number ids | 52,116 x 325 | 181 from 2017-01-01 | 12 stamps absent; zeros, 0.003 % |

A detector that sees nothing reports 0: zeros are missing, as in the authors' masked scores. Stamps are the clock's
local time in California; the twelve that PEMS-BAY lacks are an hour, the one that the clock skips in March.

What is made of it: 0 and NaN are missing. Absences of up to an hour between frames are restored as frames
whose values are all missing, so that PEMS-BAY is one run of 52,128 frames; longer ones are gaps. The store has
one UTC offset, that of the winter (−8 h): its local times are the file's own stamps, its UTC stamps are one
hour late in summer. The graph comes from the roads' distances or a matrix (``sensors.read_graph``).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.arrays import require_traffic
from data_prep.common import only_source, parse_split
from data_prep.pandas_h5 import PandasFrame, open_frame
from data_prep.plan import Day, Part, Plan
from data_prep.sensors import read_graph, read_locations
from data_prep.stamps import cadence_of, rows_of_days, slots_of
from stdist.data import NodeSpec
from stdist.data.schema import fill_short_absences

PACIFIC = -480
"""Pacific standard time, minutes."""
RESTORED_MINUTES = 60


def plan(
    sources: list[Path],
    *,
    city: str | None = None,
    channel: str = "speed",
    utc_offset: int = PACIFIC,
    adjacency: Path | None = None,
    meta: Path | None = None,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
) -> Plan:
    """Plan of one file, one part a local day; reads its index and labels only.

    city: name of the file by default. channel: what the values are. utc_offset: minutes the city is ahead of UTC
    in winter. adjacency: the roads' distances, ``distances_la_2012.csv``, or a matrix of weights.
    meta: the sensors' places, ``graph_sensor_locations.csv``. train, validation, test: local days ``A:B``.
    Raises InputError where the file is no whole data frame, its stamps are repeated or irregular, or a graph or
    places do not fit its sensors.
    """
    path = only_source(sources, "dcrnn-h5")
    frame = open_frame(path)
    stamps = frame.stamps()
    cadence = cadence_of(path, stamps)
    latitude, longitude = read_locations(meta, frame.ids) if meta else (None, None)
    weights, notes = read_graph(adjacency, frame.ids) if adjacency else (None, {})
    spec = NodeSpec(
        city=city or path.stem.lower(),
        channels=(channel,),
        first_day=stamps[0].astype("datetime64[D]"),
        last_day=stamps[-1].astype("datetime64[D]"),
        node_ids=frame.ids,
        cadence_minutes=cadence,
        utc_offset_minutes=utc_offset,
        units="mile/h",
        latitude=latitude,
        longitude=longitude,
        adjacency=weights,
    )
    recipe = {
        "reader": "dcrnn-h5",
        "frame": frame.group,
        "zeros": "missing",
        "restored_minutes": RESTORED_MINUTES,
        "clock": "local times are the source's, with daylight saving; UTC stamps are one hour late in summer",
        **notes,
    }
    split = parse_split(train, validation, test, spec)
    files = [path, *(Path(file) for file in (adjacency, meta) if file)]
    return Plan(spec, recipe, files, split, _parts(spec, stamps), DayReader(frame, channel, cadence).read)


def _parts(spec: NodeSpec, stamps: np.ndarray) -> list[Part]:
    """One part a day that has frames, those restored included: its rows, and which slots are present."""
    present = np.zeros(spec.frames, bool)
    present[(stamps - spec.first_day.astype("datetime64[m]")).astype(np.int64) // spec.cadence_minutes] = True
    present = fill_short_absences(present, RESTORED_MINUTES // spec.cadence_minutes)
    rows = {day: (start, stop) for day, start, stop in rows_of_days(stamps)}
    parts = []
    for index, day in enumerate(spec.days):
        here = present[index * spec.slots_per_day : (index + 1) * spec.slots_per_day]
        if here.any():
            parts.append(Part(str(day), (index,), (*rows.get(day, (0, 0)), tuple(here.tolist()))))
    return parts


@dataclass(frozen=True, eq=False)
class DayReader:
    """Reads one local day of a frame; a part's payload is its rows [start, stop) and which slots are present.

    It holds no ``NodeSpec``, whose graph would travel with every part.
    """

    frame: PandasFrame
    channel: str
    cadence: int

    def read(self, part: Part) -> Iterator[Day]:
        start, stop, present = part.payload
        stamps = self.frame.stamps(start, stop)
        read = self.frame.values(start, stop)
        require_traffic(read, f"{self.frame.path}: {self.channel}", stamps)
        values = np.full((len(present), len(self.frame.ids)), np.nan, np.float32)
        values[slots_of(stamps, self.cadence)] = np.where(read == 0, np.nan, read)
        yield Day(part.days[0], {self.channel: values}, np.array(present))
