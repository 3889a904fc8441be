"""Functions for compute workers: they answer, fail, take long, take much, or die."""

from __future__ import annotations

import os
import signal
import time


def echo(request: bytes) -> bytes:
    return request


def pid(request: bytes) -> bytes:
    return str(os.getpid()).encode()


def fail(request: bytes) -> bytes:
    raise ValueError(request.decode())


def sleep(request: bytes) -> bytes:
    time.sleep(float(request))
    return b"awake"


def die(request: bytes) -> bytes:
    os.kill(os.getpid(), signal.SIGKILL)
    return b""


def grow(request: bytes) -> bytes:
    block = bytearray(os.urandom(1024)) * (int(request) * 1024)
    time.sleep(30)
    return bytes(block[:1])
