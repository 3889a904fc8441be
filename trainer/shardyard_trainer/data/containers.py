"""A data file as a stream of text bytes: unpacks gzip on the way, refuses other containers by name."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import BinaryIO

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import DataError
from shardyard_trainer.data.magic import GZIP, HEAD_BYTES, PARQUET, Kind, recognise, recognise_markup
from shardyard_trainer.data.sources import DataFile, open_regular

LARGEST_RATIO = 200
"""The largest ratio of decoded size to file size: a few megabytes can decode to terabytes."""

_ALWAYS_ALLOWED_BYTES = 256 * 2**20
_LINE_BYTES = 256
"""Bytes charged for each line on top of its own: a kilobyte can unpack to a million empty lines."""

_BUFFER = 2**16


def allowed_bytes(size: int) -> int:
    """Bytes that a file of `size` bytes may decode to."""
    return max(_ALWAYS_ALLOWED_BYTES, LARGEST_RATIO * size)


def open_text(file: DataFile) -> io.BufferedReader:
    """Opens a file of text, unpacked if it is gzip. Raises DataError, also from reads of damaged or too large ones."""
    stream: io.BufferedReader = io.BufferedReader(open_regular(file.path, file.name), _BUFFER)  # type: ignore[arg-type]
    head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
    if head.startswith(b"\x1f\x8b"):
        stream = io.BufferedReader(_Unpacked(stream, file), _BUFFER)
        head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
        if kind := recognise(head):
            stream.close()
            raise _refused(file, kind, inside=True)
    kind = recognise(head) or (recognise_markup(head) if file.format != spec_pb2.DATA_FORMAT_TEXT else None)
    if kind:
        stream.close()
        raise _refused(file, kind)
    return stream


def open_packed(file: DataFile) -> io.BufferedReader:
    """Opens a file of any bytes, unpacked if it is gzip. Raises DataError, also from reads of damaged ones."""
    stream: io.BufferedReader = io.BufferedReader(open_regular(file.path, file.name), _BUFFER)  # type: ignore[arg-type]
    if stream.peek(2)[:2] == b"\x1f\x8b":
        return io.BufferedReader(_Unpacked(stream, file, line_bytes=0), _BUFFER)
    return stream


def check_parquet(file: DataFile, stream: BinaryIO) -> None:
    """Raises DataError if the file is not a whole Parquet file; leaves the stream where it was."""
    head = stream.read(HEAD_BYTES)
    if not head.startswith(b"PAR1"):
        kind = recognise(head)
        if kind is None:
            message = "not a Parquet file: it does not begin with `PAR1`; is it text? give the format, such as CSV"
            raise DataError(message, file=file.name)
        more = "; Parquet packs its columns itself, so give the .parquet file" if kind is GZIP else ""
        raise DataError(f"not a Parquet file, but {kind.name}; {kind.advice}{more}", file=file.name)
    stream.seek(-4, io.SEEK_END)
    if stream.read(4) != b"PAR1":
        message = "not a readable Parquet file: its footer is missing; copy it again"
        raise DataError(message, file=file.name)
    stream.seek(0)


def _refused(file: DataFile, kind: Kind, *, inside: bool = False) -> DataError:
    if kind is PARQUET and inside:
        return DataError("is a Parquet file inside gzip; unpack it, and give the .parquet file", file=file.name)
    return DataError(f"is {kind.name}{' inside gzip' if inside else ''}; {kind.advice}", file=file.name)


class _Unpacked(io.RawIOBase):
    """The content of a gzip file, up to the limit for a file of its size."""

    def __init__(self, packed: io.BufferedReader, file: DataFile, *, line_bytes: int = _LINE_BYTES) -> None:
        self._packed = packed
        self._gzip = gzip.GzipFile(fileobj=packed)
        self._file = file
        self._allowed = allowed_bytes(file.path.stat().st_size)
        self._line_bytes = line_bytes
        self._num_bytes = 0
        self._cost = 0

    def readable(self) -> bool:
        """True, as `io.RawIOBase` requires of a stream to read."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """The next bytes. Raises DataError."""
        try:
            size = self._gzip.readinto(buffer)
        except EOFError:
            raise self._damaged("the gzip file is cut short", "copy it again") from None
        except gzip.BadGzipFile as error:
            what = (
                "the gzip file has other data after its compressed data"
                if "Not a gzipped" in str(error)
                else "the gzip file is damaged"
            )
            raise self._damaged(what, "pack it again") from None
        except zlib.error:
            raise self._damaged("the gzip file is damaged", "copy it again, or pack it again") from None
        self._num_bytes += size
        self._cost += size + (self._line_bytes * bytes(buffer[:size]).count(b"\n") if self._line_bytes else 0)
        if self._cost > self._allowed:
            raise DataError(
                f"decodes to more than {self._allowed:,} bytes ({_LINE_BYTES} counted for each line), over "
                f"{LARGEST_RATIO} times its size; if that is meant, unpack it",
                file=self._file.name,
            )
        return size

    def close(self) -> None:
        """Closes this stream and the file below it."""
        if not self.closed:
            self._gzip.close()
            self._packed.close()
        super().close()

    def _damaged(self, what: str, next_step: str) -> DataError:
        place = f" (after {self._num_bytes:,} bytes of content)" if self._num_bytes else ""
        return DataError(f"{what}{place}; {next_step}", file=self._file.name)
