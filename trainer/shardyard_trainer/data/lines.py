"""Lines of a text file or a gzip file, read strictly in constant memory: UTF-8, no NUL, none over 16 MiB."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

from shardyard_trainer.data.bad_rows import refuse
from shardyard_trainer.data.containers import open_text
from shardyard_trainer.data.errors import DataError
from shardyard_trainer.data.sources import DataFile

LONGEST_LINE_BYTES = 16 * 2**20
_BOM = b"\xef\xbb\xbf"


def read_lines(
    file: DataFile, *, keep_ends: bool = False, skip: Callable[[DataError], None] = refuse
) -> Iterator[tuple[int, str]]:
    """Yields lines, numbered from 1. Drops a byte-order mark, reads CRLF as LF; `keep_ends` keeps the LF on the line.

    A gzip file is unpacked. Raises DataError with the line if it is over 16 MiB; one that is not UTF-8 or has a NUL is
    given to `skip`.
    """
    with open_text(file) as stream:
        number = offset = 0
        while raw := _next_line(stream, file, number + 1):
            number += 1
            if len(raw) > LONGEST_LINE_BYTES:
                raise DataError(
                    f"the line is longer than {LONGEST_LINE_BYTES // 2**20} MiB; break it into lines, one a row",
                    file=file.name,
                    line=number,
                )
            try:
                line = _decode(raw, file.name, number, offset, keep_ends=keep_ends)
            except DataError as error:
                skip(error)
            else:
                yield number, line
            offset += len(raw)


def not_utf8(byte: int, at: int) -> str:
    """The message about an invalid byte at offset `at` of the file."""
    return (
        f"byte {at + 1:,} of the file (0x{byte:02x}) is not UTF-8; save the file as UTF-8 "
        "(of Windows: `iconv -f WINDOWS-1252 -t UTF-8`)"
    )


def _next_line(stream: io.BufferedReader, file: DataFile, number: int) -> bytes:
    try:
        return stream.readline(LONGEST_LINE_BYTES + 1)
    except DataError as error:
        raise DataError(error.plain, file=file.name, line=number) from None
    except OSError as error:
        message = f"cannot be read: {error.strerror}; check the disk, and copy the file again"
        raise DataError(message, file=file.name, line=number) from None


def _decode(raw: bytes, name: str, number: int, offset: int, *, keep_ends: bool) -> str:
    start = len(_BOM) if number == 1 and raw.startswith(_BOM) else 0
    try:
        line = raw[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + start + error.start
        raise DataError(not_utf8(raw[start + error.start], at), file=name, line=number) from None
    if "\0" in line:
        message = "the line has a NUL character; if the file is text, remove it, as `tr -d '\\0'` does"
        raise DataError(message, file=name, line=number)
    body = line.removesuffix("\n").removesuffix("\r")
    return body + "\n" if keep_ends and line.endswith("\n") else body
