"""Tables in files, and what the reader of tables makes of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep import READERS, Plan


@dataclass(frozen=True)
class Read:
    """stamps: local, of the time steps that exist, as text; ids; values: per channel a list a step, None = missing."""

    plan: Plan
    stamps: list[str]
    ids: list[int | str]
    values: dict[str, list[list[float | None]]]


def read_table(folder: Path, files: dict[str, str | bytes], reader: str = "table", **options: object) -> Read:
    paths = []
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        paths.append(path)
    return read_plan(READERS[reader].plan(paths, **options))


def read_plan(plan: Plan) -> Read:
    spec = plan.spec
    days = [day for part in plan.parts for day in plan.read(part)]
    days.sort(key=lambda day: day.index)
    present = np.concatenate([day.present for day in days])
    steps = np.concatenate([day.index * spec.slots_per_day + np.arange(spec.slots_per_day) for day in days])[present]
    first = spec.first_day.astype("datetime64[m]")
    stamps = first + steps * np.timedelta64(spec.cadence_minutes, "m")
    values = {}
    for channel in spec.channels:
        rows = np.concatenate([day.values[channel].reshape(spec.slots_per_day, -1) for day in days])[present]
        values[channel] = [[None if np.isnan(v) else float(v) for v in row] for row in rows]
    ids = spec.node_ids.tolist() if len(spec.shape) == 1 else spec.cell_ids.reshape(-1).tolist()
    return Read(plan, [str(stamp).replace("T", " ") for stamp in stamps], ids, values)
