"""What differs between waiting and blocking; the async twin is `_async/runtime.py`. Written by hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextlib import closing as closing_object
from typing import Any, ParamSpec, TypeVar

import grpc

P = ParamSpec("P")
T = TypeVar("T")

open_channel: Callable[..., Any] = grpc.insecure_channel
open_secure_channel: Callable[..., Any] = grpc.secure_channel
sleep = time.sleep


def closing(stream: Iterator[T]) -> AbstractContextManager[Iterator[T]]:
    """End a generator where its reader leaves it, not when it is collected."""
    close: Any = closing_object  # Its type asks for a generator; every iterator here is one.
    made: AbstractContextManager[Iterator[T]] = close(stream)
    return made


def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run it: who blocks anyway needs no thread."""
    return function(*args, **kwargs)
