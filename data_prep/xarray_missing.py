"""Missing values of arrays that somebody else wrote, by what they say and not by what a library makes of it.

* ``_FillValue`` and ``missing_value`` are attributes of an array, and mask the values that they name. Zarr 2 has no
  place of its own for the first, so that xarray keeps it as the array's fill value; but that is 0 where nobody chose
  it, and then a 0 is a value: measured traffic, or the first stamp.
* A chunk that was never written is missing, whatever value it would be read as. (Zarr leaves out chunks that hold its
  fill value alone unless it is told ``write_empty_chunks``: the two cannot be told apart.) Only of a time axis it is
  read: a 0 that was left out is its first stamp, any other would be repeated or out of order.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import xarray
import zarr
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, WrapperStore

NETCDF_FILLS = {"f": 9.969209968386869e36, "i2": -32767, "i4": -2147483647, "i8": -9223372036854775806}
"""Fill values of NetCDF's library by type: they stand where nothing was written and nobody chose another."""


def open_decoded(path: Path) -> xarray.Dataset:
    """A Zarr store or a NetCDF 4 file, decoded by the CF conventions. Raises what xarray raises."""
    if path.is_dir():
        told = _is_consolidated(path)
        data = xarray.open_dataset(path, engine="zarr", chunks=None, cache=False, decode_cf=False, consolidated=told)
        if not told:  # a folder has no order
            data = data[sorted(data.data_vars, key=str)]
        _forget_defaults(path, data)
    else:
        data = xarray.open_dataset(path, engine="h5netcdf", chunks=None, cache=False, decode_cf=False)
        for array in data.data_vars.values():
            fill = NETCDF_FILLS.get("f" if array.dtype.kind == "f" else array.dtype.str[1:])
            if fill is not None and not {"_FillValue", "missing_value"} & array.attrs.keys():
                array.attrs["_FillValue"] = array.dtype.type(fill)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multiple fill values")  # all of them are missing
        return xarray.decode_cf(data)


def _is_consolidated(path: Path) -> bool:
    root = path / "zarr.json"
    if not root.is_file():
        return (path / ".zmetadata").is_file()
    return json.loads(root.read_text()).get("consolidated_metadata") is not None


def _forget_defaults(path: Path, data: xarray.Dataset) -> None:
    """Takes the ``_FillValue`` back that xarray makes of Zarr 2's default fill value, and has put over one of the
    array's own."""
    group = zarr.open_group(path, mode="r", use_consolidated=False)
    if group.metadata.zarr_format != 2:
        return
    for name, array in data.variables.items():
        written = group[str(name)]
        if "_FillValue" in written.attrs and array.dtype.kind in "fiu":
            array.attrs["_FillValue"] = array.dtype.type(written.attrs["_FillValue"])
        elif written.fill_value == 0:  # type: ignore[union-attr]
            array.attrs.pop("_FillValue", None)


def never_written(path: Path, name: str, where: Sequence[slice | int]) -> np.ndarray | None:
    """The values of ``array[where]`` whose chunk was never written, bool; None where all were."""
    return _unwritten_in_zarr(path, name, where) if path.is_dir() else _unwritten_in_hdf(path, name, where)


def may_lack_chunks(path: Path, name: str) -> bool:
    """False where every chunk of an array was written; what shards hold is not looked at."""
    if not path.is_dir():
        with h5py.File(path, "r") as file:
            array = file[name]
            if array.chunks is None:
                return array.id.get_storage_size() == 0
            return array.id.get_num_chunks() < _count(array.shape, array.chunks)
    array = zarr.open_array(path, path=name, mode="r")
    return array.shards is not None or array.nchunks_initialized < array.nchunks


def _count(shape: Sequence[int], chunks: Sequence[int]) -> int:
    return int(np.prod([-(-side // chunk) for side, chunk in zip(shape, chunks, strict=True)]))


def _unwritten_in_zarr(path: Path, name: str, where: Sequence[slice | int]) -> np.ndarray | None:
    """True at values that change with the array's fill value, which nobody wrote; None where there are none. No layout,
    neither of chunks nor of shards, needs to be known for it."""
    zeros, ones = (
        np.asarray(zarr.open_array(_OtherFill(LocalStore(path, read_only=True), fill), path=name, mode="r")[*where])
        for fill in (0, 1)
    )
    differ = (zeros != ones) & ((zeros == zeros) | (ones == ones))
    return differ if differ.any() else None


class _OtherFill(WrapperStore[LocalStore]):
    """The same store, whose arrays have the fill value ``fill``."""

    def __init__(self, store: LocalStore, fill: int) -> None:
        super().__init__(store)
        self._fill = fill

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        read = await super().get(key, prototype, byte_range)  # type: ignore[arg-type]
        if read is None or key.rpartition("/")[2] not in ("zarr.json", ".zarray"):
            return read
        metadata = json.loads(read.to_bytes())
        if "fill_value" in metadata:
            metadata["fill_value"] = self._fill
        return type(read).from_bytes(json.dumps(metadata).encode())


def _unwritten_in_hdf(path: Path, name: str, where: Sequence[slice | int]) -> np.ndarray | None:
    with h5py.File(path, "r") as file:
        array = file[name]
        unwritten = np.ones(array.shape if array.chunks is None else [], bool)
        if array.chunks is None:
            return unwritten[*where]
        counts = [-(-side // chunk) for side, chunk in zip(array.shape, array.chunks, strict=True)]
        chunks = np.ones(counts, bool)
        for number in range(array.id.get_num_chunks()):
            offset = array.id.get_chunk_info(number).chunk_offset
            chunks[tuple(start // side for start, side in zip(offset, array.chunks, strict=True))] = False
        indices = [
            np.arange(side)[part] // chunk if isinstance(part, slice) else np.array([part // chunk])
            for part, side, chunk in zip(where, array.shape, array.chunks, strict=True)
        ]
        cut = chunks[np.ix_(*indices)]
    kept = tuple(slice(None) if isinstance(part, slice) else 0 for part in where)
    return cut[kept] if cut.any() else None
