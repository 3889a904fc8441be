"""Starts a program that ends with its parent: `python guard.py PARENT_PID program arguments...`.

Run as a file, isolated and without site packages, so that it costs milliseconds. A function run between fork and exec
would do the same, but is not safe in a process with threads. Only Linux has such a signal; elsewhere the program ends
when it finds its socket closed.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def main() -> None:
    """Asks for SIGKILL at the parent's death, then becomes the program."""
    parent, program = int(sys.argv[1]), sys.argv[2:]
    bind_to(parent)
    os.execv(program[0], program)


def bind_to(parent: int) -> None:
    """Makes this process end with its parent; its own forks do not inherit that."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # It died before the request.


class Owner:
    """The compute process, whose end its `fork_server` has to look for.

    It is confined soon after the fork: then its end is not signalled to a process beside it (Landlock's scopes).
    """

    def __init__(self, pid: int) -> None:
        self._ended = os.pidfd_open(pid)
        if os.getppid() != pid:
            raise SystemExit  # Before that was opened, so it may be of another process.

    def sleep(self, seconds: float) -> None:
        """Ends this process if the owner has ended, or ends meanwhile."""
        if select.select([self._ended], [], [], seconds)[0]:
            raise SystemExit

    def close(self) -> None:
        """For a fork that the owner does not end: no rank may have it."""
        os.close(self._ended)


def call_process(name: str) -> None:
    """Names this process for `ps` and `top`, where a fork looks like what it is a copy of; up to 15 characters."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NAME, name.encode())


if __name__ == "__main__":
    main()
