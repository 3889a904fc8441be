"""Imported by a server: forks that begin late, and none at all while the file of `NO_FORKS` is there.

It sets a variable, as DeepSpeed does.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

os.environ["TORCH_SET_BY_AN_IMPORT"] = "1"
_fork = os.fork


def fork() -> int:
    if Path(os.environ.get("NO_FORKS", "/nowhere")).exists():
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return _fork()


os.fork = fork
os.register_at_fork(after_in_child=lambda: time.sleep(float(os.environ.get("LATE_FORKS_S", "0"))))


def pid(_request: bytes) -> bytes:
    """A function for an inspection."""
    return str(os.getpid()).encode()
