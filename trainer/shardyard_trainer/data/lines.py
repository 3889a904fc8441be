"""Lines of a text file, strictly: UTF-8, no NUL, none over 16 MiB, in flat memory."""

from __future__ import annotations

from collections.abc import Iterator

from shardyard_trainer.data.errors import DataError
from shardyard_trainer.data.sources import DataFile, open_regular

LONGEST_LINE_BYTES = 16 * 2**20
_BOM = b"\xef\xbb\xbf"


def read_lines(file: DataFile, *, keep_ends: bool = False) -> Iterator[tuple[int, str]]:
    """Numbered lines from 1. A byte-order mark is dropped, CRLF reads as LF; `keep_ends` leaves the LF on the line.

    Raises DataError with the line where bytes are not UTF-8, a NUL stands, or a line is over 16 MiB.
    """
    with open_regular(file.path, file.name) as stream:
        number = offset = 0
        while raw := stream.readline(LONGEST_LINE_BYTES + 1):
            number += 1
            if len(raw) > LONGEST_LINE_BYTES:
                raise DataError(
                    f"the line is longer than {LONGEST_LINE_BYTES // 2**20} MiB", file=file.name, line=number
                )
            yield number, _decode(raw, file.name, number, offset, keep_ends=keep_ends)
            offset += len(raw)


def _decode(raw: bytes, name: str, number: int, offset: int, *, keep_ends: bool) -> str:
    start = len(_BOM) if number == 1 and raw.startswith(_BOM) else 0
    try:
        line = raw[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + start + error.start
        raise DataError(
            f"byte {at + 1:,} of the file (0x{raw[start + error.start]:02x}) is not UTF-8; save the file as UTF-8",
            file=name,
            line=number,
        ) from None
    if "\0" in line:
        raise DataError("the line has a NUL character; is the file text?", file=name, line=number)
    body = line.removesuffix("\n").removesuffix("\r")
    return body + "\n" if keep_ends and line.endswith("\n") else body
