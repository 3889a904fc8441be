"""Polling for states of other processes that have no event to wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], bool], *, timeout_s: float | None, every_s: float = 0.02) -> bool:
    """Polls until it is true, forever if there is no timeout; returns whether it became true."""
    loop = asyncio.get_running_loop()
    end = None if timeout_s is None else loop.time() + timeout_s
    while not condition():
        if end is not None and loop.time() >= end:
            return False
        await asyncio.sleep(every_s)
    return True
