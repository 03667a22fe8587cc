"""Data frames that pandas wrote to HDF5 (``DataFrame.to_hdf``, layout "fixed"), read row by row with h5py.

The layout: a group (``t``, ``df``, ``speed``, …) holds ``axis0`` (column labels), ``axis1`` (the index; time as
int64 since 1970 in the unit of its attribute ``kind``, nanoseconds where that names none) and one or more
blocks of columns, ``block0_items`` (labels) and ``block0_values`` (rows, columns). PyTables, which pandas reads
it with, unpickles attributes as soon as it opens a file (``freq`` is a pickle); h5py hands them over as bytes,
so that nothing from the file is ever executed, and reads a day's rows alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from data_prep.kinds import kind_of, refuse_kind
from data_prep.steps import whole_minutes
from stdist.errors import InputError, is_damage

BLOSC = 32001
"""HDF5's number of the filter that pandas calls ``complib="blosc"``; h5py has no decoder of its own for it."""


@dataclass(frozen=True, eq=False)
class PandasFrame:
    """One data frame of ``rows`` rows in a file, before it is read. Made by ``open_frame``; picklable.

    ids: column labels, int64 or str [N], in the frame's order. unit: of the index, ``ns`` or ``us``, ….
    blocks: name of the values' array, and the columns of the frame that its columns are, int64 [n].
    """

    path: Path
    group: str
    rows: int
    ids: np.ndarray
    unit: str
    blocks: tuple[tuple[str, np.ndarray], ...]

    def stamps(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Index of rows [start, stop), all by default, datetime64[m]; InputError where one is no whole minute."""
        with _opened(self.path) as file:
            stamps = file[self.group]["axis1"][start:stop].view(f"datetime64[{self.unit}]")
        return whole_minutes(self.path, stamps)

    def values(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop), float64 [stop - start, N]."""
        read = np.empty((stop - start, len(self.ids)))
        with _opened(self.path) as file:
            for name, columns in self.blocks:
                read[:, columns] = file[self.group][name][start:stop]
        return read


def open_frame(path: Path) -> PandasFrame:
    """The one data frame of a file; reads labels and shapes only.

    Raises InputError where the file is no HDF5 or was cut short, holds no or several frames, or holds one that
    is not time by columns of numbers in the fixed layout.
    """
    with _opened(path) as file:
        groups = [name for name, item in file.items() if isinstance(item, h5py.Group) and "pandas_type" in item.attrs]
        if len(groups) != 1:
            holds = f"pandas data frames {', '.join(groups)}" if groups else f"no pandas data frame ({_names(file)})"
            raise InputError(f"{path} holds {holds}; give a file of one, written by DataFrame.to_hdf")
        return _frame(path, file[groups[0]])


def _frame(path: Path, group: h5py.Group) -> PandasFrame:
    where = f"{path}, data frame {group.name[1:]!r}"
    if "table" in group:
        raise InputError(f"{where} has pandas' table layout; write it anew with to_hdf(…, format='fixed')")
    absent = [name for name in ("axis0", "axis1", "block0_items", "block0_values") if name not in group]
    if absent:
        raise InputError(f"{where} lacks {', '.join(absent)}; it is no whole data frame, fetch the file again")
    index = group["axis1"]
    kind = _text(index.attrs.get("kind", b""))
    if not kind.startswith("datetime64") or index.dtype != np.int64:
        raise InputError(f"{where} is indexed by {kind or index.dtype}, not by time; write it with a DatetimeIndex")
    if "tz" in index.attrs:
        raise InputError(f"{where} has stamps of a time zone; write the clock's local time with tz_localize(None)")
    unit = kind.removeprefix("datetime64").strip("[]") or "ns"
    ids = _labels(where, group["axis0"])
    position = {label: column for column, label in enumerate(ids.tolist())}
    if len(position) != len(ids):
        raise InputError(f"{where} has columns of one name; give each sensor once")
    blocks = []
    for number in range(int(group.attrs.get("nblocks", 1))):
        name = f"block{number}_values"
        values, items = group.get(name), group.get(f"block{number}_items")
        if values is None or items is None or values.dtype.kind not in "fiu":
            what = "absent" if values is None else values.dtype
            raise InputError(f"{where}: {name} is {what}, not an array of numbers; write the frame as floats")
        labels = _labels(where, items).tolist()
        if values.shape != (len(index), len(labels)) or not position.keys() >= set(labels):
            raise InputError(f"{where}: {name} is {values.shape}, its axes say ({len(index)}, {len(labels)})")
        _require_decoder(where, values)
        blocks.append((name, np.array([position[label] for label in labels])))
    if sum(len(columns) for _, columns in blocks) != len(ids) or not len(index):
        raise InputError(f"{where} holds no values for all its {len(ids)} columns, {len(index)} rows; check it")
    return PandasFrame(Path(path), group.name, len(index), ids, unit, tuple(blocks))


def _labels(where: str, labels: h5py.Dataset) -> np.ndarray:
    """Sensor ids, int64 or str [N]."""
    _require_decoder(where, labels)
    if labels.dtype.kind in "iu":
        ids = labels[:]
        # Beyond int64 they are text.
        return ids.astype(np.int64) if not len(ids) or ids.max() < 2**63 else ids.astype(str)
    if labels.dtype.kind == "S":
        return np.array([label.decode() for label in labels[:].tolist()], dtype=np.str_)
    raise InputError(f"{where}: its columns are named by {labels.dtype}; sensor ids are whole numbers or text")


def _require_decoder(where: str, array: h5py.Dataset) -> None:
    filters = array.id.get_create_plist()
    for number in range(filters.get_nfilters()):
        code = filters.get_filter(number)[0]
        if not h5py.h5z.filter_avail(code):
            name = "blosc" if code == BLOSC else f"filter {code}"
            raise InputError(f"{where} is compressed with {name}; write it anew with to_hdf(…, complib='zlib')")


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """The file, read only; what HDF5 says of a broken one becomes one line."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError) as error:
        if not is_damage(error):
            raise
        if kind_of(path) != "hdf5":
            refuse_kind(path)
        why = "was cut short" if "truncated" in str(error) else "is no HDF5 file, or is damaged"
        raise InputError(f"{path} {why}; fetch the file again") from error


def _names(file: h5py.File) -> str:
    return f"it holds {', '.join(file)}" if len(file) else "it is empty"


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
