"""Cuts of windows and of regions that bound what is in memory, however many there are."""

from itertools import product
from math import isqrt
from typing import TypeVar

from stdist.data.spans import AnyRegion

RegionKind = TypeVar("RegionKind", bound=AnyRegion)


def cut(length: int, size: int) -> list[slice]:
    """Consecutive stretches of ``size``; the last one may be shorter."""
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def tile_shape(shape: tuple[int, ...], cells: int) -> tuple[int, ...]:
    """Sides of a tile of at most ``cells`` cells (at least one): of a grid about a square, all about alike."""
    if len(shape) == 1:
        return (_even(shape[0], cells),)
    height, width = shape
    rows = _even(height, max(isqrt(cells), cells // width))
    return rows, _even(width, cells // rows)


def tiles(region: RegionKind, cells: int) -> list[RegionKind]:
    """``region`` in tiles of at most ``cells`` cells, row by row."""
    sides = [
        [(axis.start + side_cut.start, axis.start + side_cut.stop) for side_cut in cut(axis.stop - axis.start, side)]
        for axis, side in zip(region.slices, tile_shape(region.shape, cells), strict=True)
    ]
    return [type(region)(*(edge for edges in tile for edge in edges)) for tile in product(*sides)]


def _even(length: int, most: int) -> int:
    """The size of as few parts of ``length`` as ``most`` allows, all about alike."""
    parts = -(-length // max(1, most))
    return -(-length // parts)
