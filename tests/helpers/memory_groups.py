"""Memory groups with a limit, if this process may make them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_BASES = (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max"))


@contextlib.contextmanager
def limited_group(limit_bytes: int) -> Iterator[Path]:
    """A new group of so many bytes; the test is skipped if none can be made here."""
    for base, file in _BASES:
        group = Path(base, f"shardyard-test-{os.getpid()}")
        try:
            group.mkdir()
            (group / file).write_text(str(limit_bytes))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        try:
            yield group
        finally:
            _remove(group)
        return
    pytest.skip("no memory group can be made here")


@contextlib.contextmanager
def joined(group: Path) -> Iterator[None]:
    """This process is in the group meanwhile, and what it starts is for good."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))


def _remove(group: Path) -> None:
    """What was in it ends at the same time as a rule, and may take a moment."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.05)
