"""Reading the ranks' log files from byte offsets on. Plain functions over files; they block, so they run in threads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from shardyard.v1 import log_service_pb2 as pb

MAX_TEXT: Final = 16 * 1024
MAX_BATCH_LINES: Final = 1000
MAX_BATCH_BYTES: Final = 512 * 1024
MAX_READ_BYTES: Final = 16 * 1024 * 1024
_BLOCK: Final = 128 * 1024
_FILE: Final = re.compile(r"rank-(0|[1-9][0-9]{0,5})\.(stdout|stderr)\.log")
_LINE: Final = re.compile(
    r"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,6})?(?:Z|[+-]\d\d:?\d\d)?)\s+"
    r"(DEBUG|INFO|WARNING|WARN|ERROR|CRITICAL|FATAL)\b"
)
_LEVELS: Final = {
    "DEBUG": pb.LOG_LEVEL_DEBUG,
    "INFO": pb.LOG_LEVEL_INFO,
    "WARNING": pb.LOG_LEVEL_WARNING,
    "WARN": pb.LOG_LEVEL_WARNING,
    "ERROR": pb.LOG_LEVEL_ERROR,
    "CRITICAL": pb.LOG_LEVEL_ERROR,
    "FATAL": pb.LOG_LEVEL_ERROR,
}
_STREAMS: Final = {"stdout": pb.LOG_STREAM_STDOUT, "stderr": pb.LOG_STREAM_STDERR}


@dataclass(frozen=True, order=True)
class Source:
    """A log file: what one rank of one attempt wrote to one stream."""

    attempt: int
    rank: int
    stream: int
    path: str

    @property
    def key(self) -> str:
        """Its key in a cursor."""
        return f"{self.attempt}.{self.rank}.{self.stream}"


@dataclass(frozen=True)
class Chosen:
    """The requested lines."""

    rank: int | None
    attempt: int | None
    min_level: int


def sources(job_dir: Path, chosen: Chosen) -> list[Source]:
    """The existing log files, attempt by attempt, rank by rank."""
    found = []
    for folder in job_dir.glob("e[0-9]*"):
        if not folder.name[1:].isdigit():
            continue
        attempt = int(folder.name[1:])
        if chosen.attempt not in (None, attempt):
            continue
        logs = folder / "logs"
        for entry in os.scandir(logs) if logs.is_dir() else ():
            name = _FILE.fullmatch(entry.name)
            if name is not None and chosen.rank in (None, int(name[1])):
                found.append(Source(attempt, int(name[1]), _STREAMS[name[2]], entry.path))
    return sorted(found)


def read(
    found: list[Source], offsets: Mapping[str, int], chosen: Chosen, *, whole: frozenset[int] | None
) -> tuple[list[pb.LogLine], dict[str, int]]:
    """A batch of lines after the offsets, and the new offsets, which also skip lines that were not requested.

    A last line without a line break is still being written and left for later, unless its attempt is in `whole`: the
    attempts that have ended; None: all.
    """
    lines: list[pb.LogLine] = []
    after = dict(offsets)
    size = read_bytes = 0
    for source in found:
        ended = whole is None or source.attempt in whole
        for raw, offset in _lines(source.path, after.get(source.key, 0), ended=ended):
            after[source.key] = offset
            read_bytes += len(raw)
            line = parse(source, raw)
            if line.level >= chosen.min_level:
                lines.append(line)
                size += len(line.text) + 32
            if len(lines) >= MAX_BATCH_LINES or size >= MAX_BATCH_BYTES or read_bytes >= MAX_READ_BYTES:
                return lines, after
    return lines, after


def _lines(path: str, offset: int, *, ended: bool) -> Iterator[tuple[bytes, int]]:
    """Lines from an offset on, each with the offset after it; one longer than a block is split."""
    with open(path, "rb") as file:
        file.seek(offset)
        while raw := file.readline(_BLOCK):
            if not raw.endswith(b"\n") and len(raw) < _BLOCK and not ended:
                return
            offset += len(raw)
            yield raw, offset


def parse(source: Source, raw: bytes) -> pb.LogLine:
    """A line with its level and time if it begins with `TIME LEVEL`; else INFO on stdout, WARNING on stderr."""
    text = raw.rstrip(b"\r\n").decode("utf-8", "replace")
    level = pb.LOG_LEVEL_INFO if source.stream == pb.LOG_STREAM_STDOUT else pb.LOG_LEVEL_WARNING
    line = pb.LogLine(attempt=source.attempt, rank=source.rank, stream=source.stream, level=level)  # type: ignore[arg-type]
    line.text = text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
    if head := _LINE.match(text):
        line.level = _LEVELS[head[2]]
        try:
            time = datetime.fromisoformat(head[1].replace(",", "."))
            line.time.FromDatetime(time if time.tzinfo else time.replace(tzinfo=UTC))
        except ValueError:
            pass  # It looks like a time, but there is no such day: the line has none then.
    return line


def tail_offsets(found: list[Source], num_lines: int) -> dict[str, int]:
    """Offsets before the last lines of each rank and stream in its newest attempt; older attempts are skipped."""
    newest = {(each.rank, each.stream): each for each in found}
    kept = {each.key for each in newest.values()}
    offsets = {}
    for source in found:
        size = os.stat(source.path).st_size  # noqa: PTH116 - a path as text, from scandir.
        offsets[source.key] = _start_of_last(source.path, size, num_lines) if source.key in kept else size
    return offsets


def _start_of_last(path: str, size: int, num_lines: int) -> int:
    """The offset of the last lines, found by reading backwards."""
    at, seen = size, 0
    with open(path, "rb") as file:
        while at > 0:
            start = max(0, at - _BLOCK)
            file.seek(start)
            block = file.read(at - start)
            position = len(block)
            while (position := block.rfind(b"\n", 0, position)) >= 0:
                if start + position + 1 < size:
                    seen += 1
                    if seen == num_lines:
                        return start + position + 1
            at = start
    return 0
