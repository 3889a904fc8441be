"""What the guard says about each call to the part that counts, logs and traces calls; the null twin ignores it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.serve.call import Call

UNKNOWN_METHOD = "unknown"
"""The method of calls to paths that no service has."""


class Outcome:
    """How a call ended: `refused` is its error. A call that raises without one was cancelled.

    `principal` is who calls, once that is known; empty: nobody that is known.
    """

    __slots__ = ("principal", "refused", "traceparent")

    def __init__(self, traceparent: str = "") -> None:
        self.refused: Refused | None = None
        self.traceparent = traceparent
        self.principal = ""


class Observer(Protocol):
    """Observes all calls."""

    def call(self, call: Call, metadata: Mapping[str, str]) -> AbstractContextManager[Outcome]:
        """Surrounds a call from its arrival to its end; the guard sets `principal` and `refused` before it leaves.

        `metadata` is the caller's, unchecked. `traceparent` of the outcome is the call's own span; empty: none.
        """


class NullObserver:
    """Ignores every call."""

    def call(self, call: Call, metadata: Mapping[str, str]) -> AbstractContextManager[Outcome]:
        """Surrounds a call."""
        del call, metadata
        return nullcontext(Outcome())


class Spans(Protocol):
    """Makes spans of the steps of a call."""

    def span(self, name: str, parent: str) -> AbstractContextManager[None]:
        """Surrounds a step; `parent` is the call's traceparent, empty if the call is not traced."""


class NullSpans:
    """Makes none."""

    def span(self, name: str, parent: str) -> AbstractContextManager[None]:
        """Surrounds a step."""
        del name, parent
        return nullcontext()
