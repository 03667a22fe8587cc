"""Kinds of files by their first bytes: a refusal names a file for what it is, and not as damaged."""

import zipfile
from pathlib import Path

from data_prep.common import existing
from stdist.errors import InputError

MAGIC = (
    (b"PAR1", "parquet"),
    (b"\x89HDF\r\n\x1a\n", "hdf5"),
    (b"\x93NUMPY", "npy"),
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"Rar!", "rar"),
    (b"ARROW1", "arrow"),
    (b"CDF", "netcdf3"),
    (b"SQLite format 3", "sqlite"),
    (b"%PDF", "pdf"),
    (b"\xd0\xcf\x11\xe0", "xls"),
    (b"version https:/", "lfs"),
    (b"<!doctype", "html"),
    (b"<!DOCTYPE", "html"),
    (b"<html", "html"),
    (b'{"', "json"),
    (b"[{", "json"),
)
WORDS = {
    "parquet": "a Parquet file; read it with `stdist prepare table`",
    "hdf5": "an HDF5 file; `stdist prepare table` reads a frame of pandas in one, `stdist prepare xarray` NetCDF 4",
    "npy": "a .npy array; read it with `stdist prepare table` or `city-npz`",
    "gzip": "packed with gzip; unpack it first: gunzip -k {name}",
    "bzip2": "packed with bzip2; unpack it first: bunzip2 -k {name}",
    "xz": "packed with xz; unpack it first: unxz -k {name}",
    "zip": "a zip archive; unpack it first: unzip {name}",
    "npz": "an .npz of arrays; read it with `stdist prepare table`, `city-npz` or another reader of npz",
    "xlsx": "an Excel workbook; save its sheet as CSV",
    "xls": "an Excel workbook of the old kind; save its sheet as CSV",
    "zstd": "packed with zstd; unpack it first: unzstd {name}",
    "7z": "a 7z archive; unpack it first",
    "rar": "a RAR archive; unpack it first",
    "arrow": "an Arrow (Feather) file; write it as Parquet: polars.read_ipc('{name}').write_parquet('new.parquet')",
    "netcdf3": "a NetCDF 3 file; make it NetCDF 4: nccopy -k nc4 {name} new.nc",
    "sqlite": "an SQLite database; write its table as CSV",
    "pdf": "a PDF; give the table itself as CSV",
    "html": "a page of HTML, as servers send in place of a file; fetch the file again",
    "json": "JSON; write it as a table, CSV or Parquet",
    "lfs": "a pointer of Git LFS, not the file; fetch it: git lfs pull",
    "pickle": (
        "a pickle, which could run any program and is never loaded; where you trust it, write its frame as Parquet: "
        "pandas.read_pickle('{name}').to_parquet('new.parquet'), or its array with numpy.save"
    ),
}
PICKLES = (".pkl", ".pickle")


def kind_of(path: Path, head: bytes | None = None) -> str:
    """``parquet``, ``pickle``, … by the first bytes (of the file, or ``head``), ``text`` where nothing else is known.

    A zip is told from an npz and an Excel workbook by its members. Raises InputError where there is no such file.
    """
    if head is None:
        with existing(path).open("rb") as file:
            head = file.read(16)
    kind = next((kind for magic, kind in MAGIC if head.startswith(magic)), None)
    if kind == "zip":
        return _kind_of_zip(path)
    if kind:
        return kind
    # Protocols 2 to 5 begin so; older ones are text, told by the name alone.
    if (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05") or path.suffix.lower() in PICKLES:
        return "pickle"
    return "text"


def refuse_kind(path: Path, kind: str | None = None) -> None:
    """Raise InputError saying what a file is that a reader of something else was given; nothing where it is text."""
    kind = kind or kind_of(path)
    if kind in WORDS:
        raise InputError(f"{path} is {WORDS[kind].format(name=path.name)}")


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return "npz" if path.suffix.lower() == ".npz" else "zip"
    if path.suffix.lower() == ".npz" or (names and all(name.endswith(".npy") for name in names)):
        return "npz"
    return "xlsx" if "[Content_Types].xml" in names else "zip"
