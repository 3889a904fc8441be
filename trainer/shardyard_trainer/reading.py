"""The file that is being read at the moment: an observer of this process can name it if the process ends.

A file that kills its reader, or never ends, cannot be complained of by an exception.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

Note = dict[str, str]

_LISTENER: ContextVar[Callable[[Note], None] | None] = ContextVar("listener", default=None)
_SUBJECT: ContextVar[Note] = ContextVar("subject", default={})  # noqa: B039 - never changed, only replaced.


def listen(listener: Callable[[Note], None]) -> None:
    """Has `listener` called with each note from here on: its `field`, `reason` and `what`."""
    _LISTENER.set(listener)


def about(field: str, reason: str) -> None:
    """Notes that files of `field` are read from here on: if the process dies, the field is refused with `reason`."""
    _SUBJECT.set({"field": field, "reason": reason})


def reading(what: str) -> None:
    """Says that `what` is read from here on, such as a file's name."""
    listener = _LISTENER.get()
    if listener is not None:
        listener({"field": "", "reason": "", **_SUBJECT.get(), "what": what})
