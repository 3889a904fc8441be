"""Disks that are full, and have room again."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def no_room_for(path: Path, instead: str = "/dev/full", *, flags: int = os.O_RDWR) -> Iterator[None]:
    """Every write of this process to the file (open already) fails: with ENOSPC, or as `instead` fails."""
    found = [int(link.name) for link in Path("/proc/self/fd").iterdir() if link.exists() and link.samefile(path)]
    assert found, f"{path} is not open"
    kept = [os.dup(number) for number in found]
    for number in found:
        broken = os.open(instead, os.O_RDWR if instead == "/dev/full" else flags)
        os.dup2(broken, number)
        os.close(broken)
    try:
        yield
    finally:
        for number, whole in zip(found, kept, strict=True):
            os.dup2(whole, number)
            os.close(whole)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """The folder as a file system of its own, in memory. Skips the test if this process may not mount."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this process may not mount a file system: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Takes all the room there is; the file that holds it."""
    filler = folder / "filler"
    with filler.open("wb") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(1 << 20))
    with filler.open("ab") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(512))
    return filler
