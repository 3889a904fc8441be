"""What the lines of the log are about: the call, or the attempt, that the current task works for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

_ABOUT: ContextVar[Mapping[str, str | float]] = ContextVar("shardyard_log", default={})  # noqa: B039 - never changed


def about() -> Mapping[str, str | float]:
    """The fields that every line of the current task has."""
    return _ABOUT.get()


@contextmanager
def logged_about(**fields: str | float) -> Iterator[None]:
    """Adds fields, such as `request_id`, to all lines that are logged inside, also by tasks and threads begun there."""
    before = _ABOUT.get()
    token = _ABOUT.set({**before, **fields})
    try:
        yield
    finally:
        _ABOUT.reset(token)
