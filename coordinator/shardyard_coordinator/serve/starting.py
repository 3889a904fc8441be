"""Calls that come before the service is ready wait briefly, then hear UNAVAILABLE STARTING with a delay."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.serve.call import Call

_PATIENCE_S: Final = 10.0
# Time reserved for sending the answer before the caller's deadline.
_ANSWER_S: Final = 0.5


async def until_ready(ready: asyncio.Future[Any], call: Call) -> None:
    """Returns when `ready` is done. Raises: Refused STARTING if that takes too long for the caller."""
    if not ready.done():
        left_s = _PATIENCE_S
        if call.deadline_s is not None:
            left_s = min(left_s, call.deadline_s - asyncio.get_running_loop().time() - _ANSWER_S)
        await asyncio.wait({ready}, timeout=max(left_s, 0.0))
    if not ready.done():
        text = "the service is starting: it looks through its store; try again after the delay"
        raise Refused(Reason.STARTING, text, retry_after_s=1.0)
