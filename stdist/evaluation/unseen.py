"""Cells and nodes that a forecaster knows nothing of: never observed in training, or never at all."""

from dataclasses import dataclass

import numpy as np

from stdist.data import DaySpan, Windows
from stdist.evaluation.forecast_header import tiles

FRAMES_IN_MEMORY = 2**24
"""Observed or not (frame, cell) of a tile; one cell may have more."""
NAMED = 5


@dataclass(frozen=True)
class Unseen:
    """Ids, as text, of cells or nodes: ``scored`` though never observed in training, or ``never`` observed at all."""

    what: str
    scored: list[str]
    never: list[str]

    def notes(self) -> list[str]:
        """Lines for people."""
        lines = [
            (self.scored, "scored but never observed in training, where fitted baselines are persistence"),
            (self.never, "never observed at all, and so not scored"),
        ]
        return [
            f"{len(ids)} {self.what}{'s' if len(ids) > 1 else ''} {what}: {_named(ids)}" for ids, what in lines if ids
        ]


def unseen(windows: Windows, train: DaySpan) -> Unseen:
    """Reads what was observed of the region of ``windows``, a tile at a time."""
    store, frames = windows.store, len(windows.store.present)
    targets = np.zeros(frames, bool)
    for step in range(1, windows.K + 1):
        targets[windows.origins + step] = True
    scored, never = [], []
    for tile in tiles(windows.region, FRAMES_IN_MEMORY // frames):
        observed = store.observed(windows.channel, 0, frames, tile).reshape(frames, -1)
        ids, inside = store.cell_ids[tile.slices].ravel(), store.inside[tile.slices].ravel()
        trained = observed[slice(*store.step_range(train))].any(axis=0)
        scored += ids[inside & observed[targets].any(axis=0) & ~trained].tolist()
        never += ids[inside & ~observed.any(axis=0)].tolist()
    what = "node" if store.dims == ("node",) else "cell"
    return Unseen(what, [str(i) for i in scored], [str(i) for i in never])


def _named(ids: list[str]) -> str:
    return ", ".join(ids[:NAMED]) + (f" and {len(ids) - NAMED} more" if len(ids) > NAMED else "")
