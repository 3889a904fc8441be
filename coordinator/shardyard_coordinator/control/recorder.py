"""Records what all followers have read together, in one operation of the store every 50 ms.

A commit costs more than its content. A single batch is written at once; with a thousand gangs a few dozen batches share
a commit. Each has a savepoint: one follower's StaleWrite or SpoolGap does not affect the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

from sqlalchemy import Connection

from shardyard_coordinator.seams import SYSTEM
from shardyard_coordinator.store.sql import in_savepoint
from shardyard_coordinator.store.store import Store
from shardyard_coordinator.store.together import Together, writes_together

_T = TypeVar("_T")
_EVERY_S = 0.05


class _Part(NamedTuple):
    operation: Callable[[Connection], Any]
    size_bytes: int


class Recorder:
    """Records the events of all attempts in shared transactions; one for all followers."""

    def __init__(self, store: Store) -> None:
        self._together: Together[_Part, Any] = writes_together(
            store, _run, SYSTEM, size=lambda part: part.size_bytes, every_s=_EVERY_S
        )

    async def record(self, operation: Callable[[Connection], _T], size_bytes: int) -> _T:
        """Runs `operation` in one of the next commits. Raises: what the operation raised; Refused as `Store.write`."""
        return cast(_T, await self._together.ask(_Part(operation, size_bytes)))


def _run(conn: Connection, parts: Sequence[_Part]) -> list[Any]:
    """The result of each part, or the exception that it raised and that undid its changes."""
    outcomes = []
    for part in parts:
        value, error = in_savepoint(conn, part.operation)
        outcomes.append(value if error is None else error)
    return outcomes
