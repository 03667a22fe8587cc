"""Writes a data frame as ``pandas.DataFrame.to_hdf`` does in its fixed layout, without pandas and PyTables.

Groups, arrays, dtypes and attributes are those of a file that pandas 3.1 with PyTables 3.11 wrote; pandas before 3
names the index's kind ``datetime64`` and counts nanoseconds, as the published files do.
"""

from pathlib import Path

import h5py
import numpy as np

ARRAY = {"CLASS": b"ARRAY", "FLAVOR": b"numpy", "TITLE": h5py.Empty("S1"), "VERSION": b"2.4"}
GROUP = {"CLASS": b"GROUP", "TITLE": h5py.Empty("S1"), "VERSION": b"1.0"}
# A pickle: what freq holds in genuine files.
FREQ = b"cpandas._libs.tslibs.offsets\nMinute\np0\n(I5\nI00\ntp1\nRp2\n."


def write_frame(
    path: Path,
    stamps: np.ndarray,
    ids: np.ndarray | list[str] | list[int],
    values: np.ndarray,
    *,
    key: str = "t",
    unit: str | None = None,
    compression: str | None = None,
) -> Path:
    """values [T, N] under stamps, datetime64 [T]; unit: of the index, nanoseconds of an older pandas by default."""
    labels = np.asarray(ids)
    with h5py.File(path, "w") as file:
        _describe(file, {**GROUP, "PYTABLES_FORMAT_VERSION": b"2.1"})
        group = file.create_group(key)
        _describe(
            group,
            {
                **GROUP,
                "pandas_type": b"frame",
                "ndim": np.int64(2),
                "nblocks": np.int64(1),
                "encoding": b"UTF-8",
                "errors": b"strict",
                **dict.fromkeys(("axis0_variety", "axis1_variety", "block0_items_variety"), b"regular"),
            },
        )
        text = labels.dtype.kind in "US"
        axis = labels.astype("S") if text else labels
        named = {"kind": b"string", "nan_rep": h5py.Empty("S1")} if text else {"kind": b"integer"}
        named["name"] = b"N."
        _array(group, "axis0", axis, compression, named)
        kind = f"datetime64[{unit}]" if unit else "datetime64"
        index = stamps.astype(f"datetime64[{unit or 'ns'}]").view(np.int64)
        told = {"kind": kind.encode(), "index_class": b"datetime", "freq": FREQ, "name": b"N."}
        _array(group, "axis1", index, compression, told)
        _array(group, "block0_items", axis, compression, named)
        _array(group, "block0_values", values, compression, {})
    return path


def _array(
    group: h5py.Group, name: str, data: np.ndarray, compression: str | None, attributes: dict[str, object]
) -> None:
    array = group.create_dataset(name, data=data, compression=compression, chunks=True if compression else None)
    _describe(array, {**ARRAY, "transposed": np.uint8(1), **attributes})


def _describe(what: h5py.Group | h5py.Dataset, attributes: dict[str, object]) -> None:
    """Text as PyTables writes it: UTF-8 of fixed length."""
    for name, value in attributes.items():
        text = isinstance(value, bytes)
        what.attrs.create(name, value, dtype=h5py.string_dtype("utf-8", len(value)) if text else None)
