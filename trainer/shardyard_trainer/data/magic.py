"""Recognises kinds of files by their first bytes, whatever their names say; each kind has a next step."""

from __future__ import annotations

from typing import NamedTuple

HEAD_BYTES = 512
"""Bytes examined at the start of a file; the mark of a tar archive is at byte 257."""

_LEAST_FOR_UTF_16 = 8


class Kind(NamedTuple):
    """A kind of file that is not read as text, and the next step for its owner."""

    name: str
    advice: str


GZIP = Kind("a gzip file", "unpack it")
PARQUET = Kind("a Parquet file", "give format PARQUET")

_BZIP2 = Kind("a bzip2 file", "unpack it with `bunzip2`, or pack it with gzip")
_ORC = Kind("an ORC file", "save it as Parquet")
_UNPACK = "unpack it, and give the files in it"
_AS_CSV = "save its sheet as CSV (UTF-8)"
_UTF_8 = "save it as UTF-8, as `iconv -f {} -t UTF-8` does"
_KINDS: tuple[tuple[bytes, Kind], ...] = (
    (b"\x1f\x8b", GZIP),
    (b"PAR1", PARQUET),
    (b"PARE", Kind("an encrypted Parquet file", "save it without encryption")),
    (b"PK\x03\x04", Kind("a zip archive", _UNPACK)),
    (b"PK\x05\x06", Kind("an empty zip archive", "give the files themselves")),
    *((b"BZh%d1AY&SY" % level, _BZIP2) for level in range(1, 10)),
    (b"\xfd7zXZ\0", Kind("an xz file", "unpack it with `unxz`, or pack it with gzip")),
    (b"\x28\xb5\x2f\xfd", Kind("a Zstandard file", "unpack it with `unzstd`, or pack it with gzip")),
    (b"\x04\x22\x4d\x18", Kind("an LZ4 file", "unpack it with `unlz4`, or pack it with gzip")),
    (b"\xff\x06\0\0sNaPpY", Kind("a Snappy file", "unpack it, or pack it with gzip")),
    (b"7z\xbc\xaf\x27\x1c", Kind("a 7z archive", _UNPACK)),
    (b"Rar!\x1a\x07", Kind("a RAR archive", _UNPACK)),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", Kind("an old Office file (such as .xls)", _AS_CSV)),
    (b"SQLite format 3\0", Kind("a SQLite database", "save the query's rows as CSV, JSONL or Parquet")),
    (b"ARROW1\0\0", Kind("an Arrow (Feather) file", "save it as Parquet, as pandas' to_parquet does")),
    (b"FEA1\0", Kind("a Feather file", "save it as Parquet, as pandas' to_parquet does")),
    (b"\xff\xff\xff\xff", Kind("an Arrow stream", "save it as Parquet, as the `to_parquet` of datasets does")),
    (b"Obj\x01", Kind("an Avro file", "save it as Parquet or JSONL")),
    *((b"ORC" + bytes([control]), _ORC) for control in (*range(9), 0x0B, 0x0C, *range(0x0E, 0x20))),
    (b"\x93NUMPY", Kind("a NumPy array", "save the texts as JSONL or CSV")),
    (b"\x89HDF\r\n\x1a\n", Kind("an HDF5 file", "save it as Parquet")),
    (b"%PDF-", Kind("a PDF", "save its text as UTF-8")),
    (b"{\\rtf", Kind("an RTF document", "save its text as UTF-8")),
    (b"\x89PNG\r\n\x1a\n", Kind("a picture", "give texts")),
    (b"\xff\xd8\xff", Kind("a picture", "give texts")),
    (
        b"version https://git-lfs.github.com/spec/",
        Kind("a Git LFS pointer, not the file", "fetch the file with `git lfs pull`"),
    ),
    # UTF-32's little-endian mark begins as UTF-16's does.
    (b"\xff\xfe\0\0", Kind("UTF-32 text", _UTF_8.format("UTF-32"))),
    (b"\0\0\xfe\xff", Kind("UTF-32 text", _UTF_8.format("UTF-32"))),
    (b"\xff\xfe", Kind("UTF-16 text", _UTF_8.format("UTF-16"))),
    (b"\xfe\xff", Kind("UTF-16 text", _UTF_8.format("UTF-16"))),
)
_OFFICE = Kind("a workbook or document of Office (such as .xlsx)", _AS_CSV)
_PICKLE = Kind("a Python pickle", "pickles are never opened, as they can run code; save it as Parquet, JSONL or CSV")
_TAR = Kind("a tar archive", _UNPACK)
_MARKUP = Kind("a web page or XML", "a download may have failed; give the data file itself")


def recognise(head: bytes) -> Kind | None:
    """The kind of a file with these first bytes; None if it may be text."""
    if head.startswith(b"PK\x03\x04") and (b"[Content_Types].xml" in head or b"mimetypeapplication/vnd" in head):
        return _OFFICE
    for start, kind in _KINDS:
        if head.startswith(start):
            return kind
    # A pickle starts with its protocol; no UTF-8 text begins with 0x80.
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return _PICKLE
    if head[257:262] == b"ustar":
        return _TAR
    return _wide_text(head)


def recognise_markup(head: bytes) -> Kind | None:
    """Recognises web pages and XML where rows are expected; as plain text they may well be intended."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:16].lower()
    return _MARKUP if start.startswith((b"<!doctype", b"<html", b"<?xml")) else None


def _wide_text(head: bytes) -> Kind | None:
    """UTF-16 without a mark: Latin letters leave every other byte zero."""
    pairs = len(head) // 2
    if pairs < _LEAST_FOR_UTF_16:
        return None
    even, odd = head[0 : 2 * pairs : 2].count(0), head[1 : 2 * pairs : 2].count(0)
    for zeros, others, name in ((odd, even, "UTF-16LE"), (even, odd, "UTF-16BE")):
        if zeros > 0.6 * pairs and others == 0:
            return Kind(f"UTF-16 text without a byte-order mark ({name})", _UTF_8.format(name))
    return None
