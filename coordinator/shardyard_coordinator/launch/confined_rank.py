"""Starts a program that opens only what a rank needs: `python -m ...confined_rank RIGHTS program-module arguments...`.

RIGHTS is what `rank_env.rank_rights` makes, as JSON; empty: none are taken away. The program is started anew by its
name, so that nothing of this package is in it, and has what holds for this process.
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
    """Gives up the rights, then becomes the program."""
    rights, program = json.loads(sys.argv[1]), sys.argv[2:]
    # The memory of a rank is others' data, and on a GPU machine larger than most disks.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if rights:
        _make_gpu_devices()
        _hold_own_proc()
        take_rights(rights)
    os.execv(sys.executable, [sys.executable, "-P", "-m", *program])


def take_rights(rights: dict[str, list[str]]) -> None:
    """Confines this thread; where the kernel will not, a rank goes on as it is, and says so in its log."""
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
    """What CUDA would have a program with more rights make, at its first use on a machine: a rank cannot have that."""
    if Path("/dev/nvidiactl").exists() and not Path("/dev/nvidia-uvm").exists():
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["nvidia-modprobe", "-u", "-c=0"], check=False, capture_output=True, timeout=_MODPROBE_S)


def _hold_own_proc() -> None:
    """CUDA names its threads by writing to files there, and does not start if it cannot.

    The rule is about this folder as the kernel has it now: it stays the same while this program holds it open.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.set_inheritable(os.open("/proc/self", os.O_PATH), True)


if __name__ == "__main__":
    main()
