"""Streams that are opened in a burst take turns, so that other calls are answered soon.

The transport hands over new calls one by one, between the work of those already handed over: a call that arrives
after a thousand streams would wait for the work of all of them. Therefore the streams of a burst wait until all of
them have been handed over, and then start a few at a time. Streams opened one after the other are not delayed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

# More open streams than this that came within this time are a burst.
_FEW: Final = 8
_BURST_S: Final = 0.02
# A burst ends after this many moments without a new stream, or after the bound. A moment is a turn of the loop: time
# alone would also pass while the machine is busy with something else.
_MOMENT_S: Final = 0.001
_QUIET_MOMENTS: Final = 5
_PATIENCE_S: Final = 0.5


class Openings:
    """Gives streams their turns to begin. Used from one loop only."""

    def __init__(self) -> None:
        self._came: dict[object, float] = {}
        self._num_came = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._running: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Enter it to wait for the stream's turn; leave it when the stream has ended."""
        stream = object()
        now_s = self._came[stream] = asyncio.get_running_loop().time()
        self._num_came += 1
        try:
            if self._waiting or self._is_burst(now_s):
                await self._wait()
            yield
        finally:
            self._came.pop(stream, None)

    def _is_burst(self, now_s: float) -> bool:
        """Whether many streams came just now; forgets older ones."""
        while self._came and self._came[first := next(iter(self._came))] < now_s - _BURST_S:
            del self._came[first]
        return len(self._came) > _FEW

    async def _wait(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        if self._running is None:
            self._running = asyncio.create_task(self._give())
        await turn

    async def _give(self) -> None:
        """Gives turns until no stream waits."""
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + _PATIENCE_S
        try:
            seen, quiet = self._num_came, 0
            while quiet < _QUIET_MOMENTS and loop.time() < ends_s:
                await asyncio.sleep(_MOMENT_S)
                quiet = quiet + 1 if self._num_came == seen else 0
                seen = self._num_came
            while self._waiting:
                for turn in [self._waiting.popleft() for _ in range(min(_FEW, len(self._waiting)))]:
                    if not turn.done():  # The caller went away meanwhile.
                        turn.set_result(None)
                await asyncio.sleep(_MOMENT_S)
        finally:
            self._running = None
