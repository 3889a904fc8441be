"""Keeps the compute actor of an agent alive: started once, and replaced when it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from shardyard_coordinator.launch.agent_server import Unavailable
from shardyard_coordinator.launch.frames import Header

_log = logging.getLogger(__name__)
# How often an actor is looked at of which nothing is asked.
_LOOK_S = 5.0


class ComputePlace:
    """The one actor with the compute processes.

    `start` makes an actor and returns it once it has started, or raises Unavailable; `gone` is the error of calls to
    an actor that no longer exists.
    """

    def __init__(self, start: Callable[[], Awaitable[Any]], *, gone: type[Exception], look_s: float = _LOOK_S) -> None:
        self._start = start
        self._gone = gone
        self._actor: Any = None
        self._starting = asyncio.Lock()
        self._beginning = self._begin()
        self._watching = asyncio.create_task(self._watch(look_s))

    async def call(self, payload: bytes) -> bytes:
        """Passes a call to the actor. Raises: Unavailable if there is no actor, or if it is gone."""
        actor = await self._living()
        try:
            answer: bytes = await actor.call.remote(payload)
        except self._gone as error:
            self._replace(actor)
            raise Unavailable(f"the compute actor is gone: {error}".partition("\n")[0]) from error
        return answer

    async def confinement(self) -> Header:
        """The restrictions of its processes, in words; empty while they start."""
        actor = self._actor
        if actor is not None:
            with contextlib.suppress(self._gone):
                return dict(await actor.confinement.remote())
        self._replace(actor)
        return {}

    async def _watch(self, look_s: float) -> None:
        """Replaces an actor that is gone before it is asked: ranks start from its processes, too."""
        while True:
            await asyncio.sleep(look_s)
            try:
                await self.confinement()
            except Exception as error:  # The edge: whatever Ray raises while it is away, the next look comes.
                _log.info("the compute actor cannot be looked at: %s", error)

    def _begin(self) -> asyncio.Task[Any]:
        beginning = asyncio.create_task(self._living())
        beginning.add_done_callback(note_error)  # The next call tries again.
        return beginning

    def _replace(self, gone: Any) -> None:
        """Starts a replacement, unless one was already started."""
        if self._actor is gone:
            self._actor = None
            if self._beginning.done():
                self._beginning = self._begin()

    async def _living(self) -> Any:
        async with self._starting:
            if self._actor is None:
                self._actor = await self._start()
            return self._actor


def note_error(task: asyncio.Task[Any]) -> None:
    """Retrieves the error of a task that may no longer be awaited, so that asyncio does not log it as unhandled."""
    if not task.cancelled():
        task.exception()
