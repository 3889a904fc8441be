"""The differences between async and blocking code; the sync twin of this one file is written by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, ParamSpec, TypeVar

import grpc.aio

P = ParamSpec("P")
T = TypeVar("T")

open_channel: Callable[..., Any] = grpc.aio.insecure_channel
open_secure_channel: Callable[..., Any] = grpc.aio.secure_channel
sleep = asyncio.sleep


def closing(stream: AsyncIterator[T]) -> AbstractAsyncContextManager[AsyncIterator[T]]:
    """Close an async generator when its reader leaves it, not when it is garbage-collected."""
    close: Any = aclosing  # Its type requires a generator; every iterator here is one.
    made: AbstractAsyncContextManager[AsyncIterator[T]] = close(stream)
    return made


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run disk-heavy work without blocking the loop."""
    return await asyncio.to_thread(function, *args, **kwargs)
