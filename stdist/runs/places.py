"""Places of a store by the ids that its data gives them."""

import difflib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from stdist.data import GridStore, NodeRange, Region
from stdist.data.spans import AnyRegion
from stdist.errors import InputError

ALL = "all"


def find_places(store: GridStore, names: str) -> tuple[AnyRegion, Int[np.ndarray, " n"] | None]:
    """The smallest region that holds the places ``names``, ids with commas between them, and their positions in it, row
    by row; all of the store and None for ``ALL``.

    Raises InputError for an id that the store has not, with the nearest ones, and for a cell outside the city.
    """
    if names.strip() == ALL:
        return store.region(), None
    asked = [name.strip() for name in names.split(",") if name.strip()]
    if not asked:
        raise InputError(f"--places {names!r} names no place; write ids as {store.cell_ids.flat[0]}, or {ALL}")
    ids = store.cell_ids.astype(str)
    indices = np.stack([_index_of(name, ids, store) for name in dict.fromkeys(asked)])
    edges = [(int(axis.min()), int(axis.max()) + 1) for axis in indices.T]
    region = (Region if len(edges) == 2 else NodeRange)(*(edge for pair in edges for edge in pair))
    numbers = np.arange(np.prod(region.shape)).reshape(region.shape)
    within = indices - [start for start, _ in edges]
    return region, np.sort(numbers[tuple(within.T)])


def _index_of(name: str, ids: np.ndarray, store: GridStore) -> np.ndarray:
    found = np.argwhere(ids == name)
    if not len(found):
        near = nearest_names(name, ids.ravel().tolist())
        raise InputError(f"{store.path} has no place {name!r}; the nearest names are {', '.join(near)}")
    if not store.inside[tuple(found[0])]:
        raise InputError(f"place {name} of {store.path} lies outside the city, where nothing is forecast")
    return found[0]


def nearest_names(name: str, names: Sequence[str]) -> list[str]:
    """The three of ``names`` that look most like ``name``, fewer where there are fewer."""
    return difflib.get_close_matches(name, names, n=3, cutoff=0)
