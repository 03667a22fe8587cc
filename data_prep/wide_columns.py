"""What the columns of a wide table are: the cells of a grid or the nodes of a graph."""

from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common import grid_spec
from data_prep.graphs import ids_of, sensors
from stdist.data.schema import GridSpec, NodeSpec
from stdist.errors import InputError


@dataclass(frozen=True)
class Columns:
    """The options of wide tables that say what a column is; see ``wide_csv.plan``."""

    height: int | None
    width: int | None
    row0: int
    col0: int
    id_width: int | None
    nodes: bool
    adjacency: Path | None
    meta: Path | None = None

    def spec(
        self,
        path: Path,
        names: list[str],
        stamps: np.ndarray,
        city: str,
        channel: str,
        cadence: int,
        utc_offset: int | None,
    ) -> tuple[GridSpec | NodeSpec, dict[str, Any], list[Path]]:
        """The spec, what the recipe says of the space, and the files beside the table that tell it.

        names: of the columns; only their number counts for a grid. Raises InputError where options do not fit.
        """
        if self.nodes:
            nodes = sensors(ids_of(names), self.adjacency, self.meta)
            return nodes.spec(city, [channel], stamps, cadence, utc_offset), nodes.notes, nodes.files
        for option, file in (("--adjacency", self.adjacency), ("--meta", self.meta)):
            if file:
                raise InputError(f"{option} is for nodes; give --nodes too where columns are nodes")
        spec = grid_spec(
            city,
            [channel],
            stamps,
            self._shape(path, len(names)),
            cadence=cadence,
            utc_offset=utc_offset,
            row0=self.row0,
            col0=self.col0,
            id_width=self.id_width,
        )
        return spec, {"row0": self.row0, "col0": self.col0}, []

    def _shape(self, path: Path, columns: int) -> tuple[int, int]:
        """(H, W), a square by default; InputError where the columns do not fit."""
        height, width = self.height, self.width
        if height is None and width is None:
            height = width = isqrt(columns)
            if height * width != columns:
                raise InputError(f"{path} has {columns} columns, which is no square grid; give --height and --width")
        shape = (height or columns // (width or 1), width or columns // (height or 1))
        if shape[0] * shape[1] != columns:
            raise InputError(f"{path} has {columns} columns, not {shape[0]} x {shape[1]}; check --height and --width")
        return shape
