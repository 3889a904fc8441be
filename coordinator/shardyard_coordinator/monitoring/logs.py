"""The lines of the service's log: text for people, or one JSON object each, for programs that collect them.

A line is one line: control characters of a message are shown, not obeyed, so that nobody's input can look like another
line. Secrets are removed by their shape. JSON lines are made to leave the machine, so they have no text that could be a
user's: of an exception its type and where it was raised, not its message; of a path in the storage nothing.
"""

from __future__ import annotations

import errno
import json
import logging
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any, TextIO

from shardyard_coordinator.log_context import about
from shardyard_coordinator.redaction import one_line, redacted
from shardyard_coordinator.settings import LogFormat, LogLevel

MAX_TEXT = 2000
_MAX_FRAMES = 20


def set_up_logging(stream: TextIO, form: LogFormat, level: LogLevel) -> None:
    """Writes the lines of this process's log to the stream."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines() if form is LogFormat.JSON else TextLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("shardyard_coordinator").setLevel(level.value.upper())
    logging.captureWarnings(True)


class TextLines(logging.Formatter):
    """Lines for people: time, level, logger, message, and what it is about. A traceback follows on lines of its own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line and the traceback; one that another handler has formatted is of no use, for it may have secrets."""
        before, record.exc_text = record.exc_text, None
        try:
            return super().format(record)
        finally:
            record.exc_text = before

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, without the traceback."""
        record.message = one_line(redacted(record.message))
        fields = " ".join(f"{name}={one_line(str(value))}" for name, value in about().items())
        return super().formatMessage(record) + (f" ({fields})" if fields else "")

    def formatException(self, ei: Any) -> str:
        """The traceback, each of its lines indented, so that none looks like a line of the log."""
        text = redacted(super().formatException(ei))
        return "\n".join(f"  {one_line(line)}" for line in text.splitlines())


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, event, the numbers of the message, what it is about, the exception.

    `event` is the message without its values, which may be a user's: numbers and this service's own ids and names are
    beside it, texts are not.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The object; all its control characters are escaped."""
        line: dict[str, object] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _event(record),
        }
        values = record.args if isinstance(record.args, tuple) else ()
        if numbers := [value for value in values if isinstance(value, int | float)]:
            line["numbers"] = numbers
        line.update(about())
        errors = [value for value in values if isinstance(value, BaseException)]
        error = record.exc_info[1] if record.exc_info else (errors[0] if errors else None)
        if error is not None:
            line["exception"] = _exception(error)
        return json.dumps(line, ensure_ascii=True, default=str)


def _event(record: logging.LogRecord) -> str:
    """The message without its values. Libraries put theirs into it, but hardly into its beginning."""
    text = redacted(str(record.msg))
    return text[:MAX_TEXT] if record.name.startswith("shardyard_coordinator") else text.partition("\n")[0][:200]


def _exception(error: BaseException) -> dict[str, object]:
    """Type and place of an exception and its causes; for an error of the operating system also its name."""
    found: dict[str, object] = {"type": type(error).__qualname__, "stack": list(_frames(error.__traceback__))}
    if isinstance(error, OSError) and error.errno:
        found["errno"] = errno.errorcode.get(error.errno, str(error.errno))
    if error.__cause__ is not None:
        found["cause"] = type(error.__cause__).__qualname__
    return found


def _frames(trace: TracebackType | None) -> Iterator[str]:
    """The innermost frames, as file:line function, without the folders of this machine."""
    for frame in traceback.extract_tb(trace)[-_MAX_FRAMES:]:
        yield f"{'/'.join(frame.filename.split('/')[-3:])}:{frame.lineno} {frame.name}"
