"""Opens a grid store: a Zarr v3 group that plain ``xarray.open_zarr`` opens too."""

from pathlib import Path

import numpy as np

from stdist.data.integrity import ROOT_METADATA, combined_digest, damage, require_all_files
from stdist.data.metadata import read_attributes
from stdist.data.schema import train_mean_name
from stdist.data.spans import AnyRegion, DaySpan, all_cells
from stdist.data.statistics import Statistics, fit_statistics
from stdist.data.stored_arrays import StoredArrays
from stdist.data.windows import Windows
from stdist.errors import DamageError


def open_store(path: str | Path) -> "GridStore":
    """Opens a grid store.

    Reads metadata and file sizes only. Raises InputError with one line where the path is no grid store, and
    DamageError naming a file that is missing or cut short, or attributes that are not as they were written.
    """
    root = Path(path)
    while True:
        attributes = read_attributes(root)
        if combined_digest(attributes["files"], attributes) != attributes["digest"]:
            raise damage(root, f"{ROOT_METADATA} is not as it was written")
        try:
            require_all_files(root, attributes["files"])
        except DamageError:
            if read_attributes(root)["digest"] != attributes["digest"]:
                continue  # days were appended just then
            raise
        return GridStore(root, attributes)


class GridStore(StoredArrays):
    """A city's traffic, on a grid or at nodes: its metadata, its arrays, and the windows and statistics of its spans.
    Made by ``open_store``."""

    def statistics(self, channel: str, span: DaySpan, region: AnyRegion | None = None) -> Statistics:
        """Statistics fitted on the observed values of exactly ``span`` and ``region``, all of the store by default;
        the stored ones where they are of these. Raises InputError where there is no observed value.
        """
        stored = self.attributes["train_statistics"].get(self.require_channel(channel))
        if stored and DaySpan.parse(stored["span"]) == span and self.region(region) == all_cells(self.shape):
            scalars = {name: stored[name] for name in ("mean", "std", "maximum", "count")}
            cell_mean = np.asarray(self._arrays[train_mean_name(channel)][:])
            return Statistics(**scalars, cell_mean=cell_mean, span=span)
        return fit_statistics(self, channel, span, self.region(region))

    def windows(
        self,
        span: DaySpan | str,
        S: int,
        K: int,
        *,
        channel: str,
        region: AnyRegion | None = None,
        history_region: AnyRegion | None = None,
        history_inside: bool | None = None,
        name: str = "span",
    ) -> Windows:
        """Windows of a span of local days, or of the default split's ``train``, ``validation`` or ``test``.

        history_inside: whether the history must lie inside the span too; by default it must, except for
        ``"validation"`` and ``"test"`` (docs/decisions.md, 12). region: cells of the targets, the whole grid
        by default. history_region: cells of the history, the whole grid by default. name: what the contract
        calls a span of days. Raises InputError where no window fits.
        """
        if isinstance(span, str):
            name, days, reaches_back = span, self.default_split.named(span), span in ("validation", "test")
        else:
            days, reaches_back = span, False
        return Windows(
            self,
            self.require_channel(channel),
            days,
            name,
            S,
            K,
            self.region(region),
            not reaches_back if history_inside is None else history_inside,
            self.region(history_region),
        )
