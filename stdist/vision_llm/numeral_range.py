"""A search for values that no numeral can write, before anything is trained or forecast (docs/decisions.md, 1)."""

from collections.abc import Iterable

import numpy as np

from stdist.data import Windows
from stdist.errors import InputError
from stdist.numerals import Vocabulary


def find_unwritable(parts: Iterable[Windows], vocabulary: Vocabulary, clamp: bool) -> str | None:
    """Reads every value of the windows' region, once each; a sentence about those at or above the numerals' limit,
    None where there are none. Raises InputError naming the first of them unless ``clamp``.
    """
    count, first, read = 0, "", 0
    for windows in sorted(parts, key=lambda windows: int(windows.origins[0])):
        store, channel = windows.store, windows.channel
        # The history of validation and test windows reaches back into frames that were counted.
        begin = max(read, int(windows.origins[0]) - windows.S + 1)
        end = read = max(begin, int(windows.origins[-1]) + windows.K + 1)
        values = store.values(channel, begin, min(end, len(store.times)), windows.region)
        outside = np.argwhere(np.abs(values) >= vocabulary.limit)  # NaN, where a frame is not present, is not
        count += len(outside)
        if len(outside) and not first:
            frame, row, col = outside[0]
            cell = store.cell_ids[windows.region.slices][row, col]
            stamp = store.local_times[begin + frame].astype("datetime64[m]")
            first = f"{store.path}: {channel} is {values[frame, row, col]:g} at {stamp} local time, cell {cell}"
    if not count:
        return None
    sentence = f"{first} ({count} such value{'s' if count > 1 else ''}); numerals end below {vocabulary.limit:.10g}"
    if not clamp:
        raise InputError(f"{sentence}: rescale the data, or set numerals.out_of_range=clamp")
    return f"{sentence}, larger values are clamped"
