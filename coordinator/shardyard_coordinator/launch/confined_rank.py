"""Starts a program that opens only what a rank needs: `python -m ...confined_rank RIGHTS program-module arguments...`.

RIGHTS is the result of `rank_env.rank_rights` as JSON; empty: no restrictions. The program is started by its
name with exec, so that it has nothing of this package, and inherits this process's restrictions.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from shardyard_coordinator.launch import confine

_MODPROBE_S = 30


def main() -> None:
    """Drops all rights but the given ones, then becomes the program."""
    rights, program = json.loads(sys.argv[1]), sys.argv[2:]
    # No core dumps: a rank's memory contains users' data, and on a GPU machine it is larger than most disks.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if rights:
        _make_gpu_devices()
        _hold_own_proc()
        take_rights(rights)
    os.execv(sys.executable, [sys.executable, "-P", "-m", *program])


def take_rights(rights: dict[str, list[str]]) -> None:
    """Confines this thread. If the kernel refuses, the rank continues unconfined and logs that."""
    try:
        holds = confine.confine_rank(
            rights["reads"], rights["writes"], rights["puts"], hidden=next(iter(rights["hidden"]), "")
        )
    except OSError as error:
        print(f"this rank is not confined: {error}", file=sys.stderr)
    else:
        if not holds:
            print(f"this rank is {confine.rank_words()}", file=sys.stderr)


def _make_gpu_devices() -> None:
    """Creates the device files that CUDA's setuid helper would create at first use; a confined rank cannot run it."""
    if Path("/dev/nvidiactl").exists() and not Path("/dev/nvidia-uvm").exists():
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["nvidia-modprobe", "-u", "-c=0"], check=False, capture_output=True, timeout=_MODPROBE_S)


def _hold_own_proc() -> None:
    """The process's own folder in /proc, where CUDA writes its threads' names; without it CUDA does not start.

    The rule refers to this folder as it is now; keeping it open keeps the rule valid.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.set_inheritable(os.open("/proc/self", os.O_PATH), True)


if __name__ == "__main__":
    main()
