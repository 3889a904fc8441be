"""Some workers that do the same work beside each other, as for the objects of a copy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


async def all_of(work: Callable[[], Coroutine[Any, Any, None]], count: int) -> None:
    """Runs as many of the same worker; raises the first error, once all have ended."""
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(work())
    except BaseExceptionGroup as several:
        first = several.exceptions[0]
        raise first from first.__cause__  # Which has the store's code.
