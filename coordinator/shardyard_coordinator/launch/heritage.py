"""What a process has from the one that starts it, beside its environment: read in that one, taken by a fork of another.

A rank that is a fork of a `fork_server` would have all this from the server, and so be another rank than one that its
watcher has started: on Ray, say, its niceness, and the order in which the kernel ends processes if memory runs out.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_OOM_SCORE = Path("/proc/self/oom_score_adj")
_NAMESPACES = Path("/proc/self/ns")
_LIMITS = [name for name in dir(resource) if name.startswith("RLIMIT_")]

# Variables that Python and libraries read when they start or are imported, and never again.
_READ_ONCE = re.compile(
    r"""
    ^(HF|HUGGINGFACE|TRANSFORMERS|TORCH|PYTORCH|OMP|KMP|GOMP|MKL|OPENBLAS|DNNL|ONEDNN|DS|LD|LC|MALLOC|GLIBC)_
    | ^LANG$ | ^PYTHON(PATH|HOME|HASHSEED|UTF8|IOENCODING|WARNINGS|OPTIMIZE|MALLOC)$
    """,
    re.VERBOSE,
)
# Named like those, but a rank sets its threads again, the service gives both the same value, or they are read when
# they are used.
_NO_MATTER = {
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
    *("DS_ACCELERATOR", "HF_HOME"),
    *("TORCH_EXTENSIONS_DIR", "TORCH_HOME"),
}


def heritage() -> dict[str, Any]:
    """What a child of this process would have, as JSON values."""
    found: dict[str, Any] = {
        "place": place(),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in _LIMITS},
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "processors": sorted(os.sched_getaffinity(0)),
    }
    with suppress(OSError, ValueError):
        found["oom_score"] = int(_OOM_SCORE.read_text())
    with suppress(FileNotFoundError):  # It was removed: then a child would be elsewhere, as the server is.
        found["folder"] = os.getcwd()  # noqa: PTH109 - a path as text.
    return found


def take(found: Mapping[str, Any]) -> None:
    """Makes this process one with that heritage. Raises: OSError or ValueError if it may not have it."""
    for name, limits in found["limits"].items():
        resource.setrlimit(getattr(resource, name), tuple(limits))
    os.sched_setaffinity(0, found["processors"])
    os.setpriority(os.PRIO_PROCESS, 0, found["niceness"])
    if "oom_score" in found:
        _OOM_SCORE.write_text(str(found["oom_score"]))
    if "folder" in found and not _is_in(found["folder"]):
        os.chdir(found["folder"])


def _is_in(folder: str) -> bool:
    """Whether this process is in that folder; it may be in one that it may not enter."""
    with suppress(FileNotFoundError):
        return os.getcwd() == folder  # noqa: PTH109 - a path as text.
    return False


def place() -> dict[str, str]:
    """What a process cannot give itself: namespaces, such as a container's, and control groups.

    Processes of a service unit of systemd, say, are ended with it. The account is not here: a caller could lie.
    """
    found: dict[str, str] = {}
    with suppress(OSError):
        found = {each.name: os.readlink(each) for each in sorted(_NAMESPACES.iterdir())}  # noqa: PTH115 - no path.
    with suppress(OSError):
        found["cgroup"] = Path("/proc/self/cgroup").read_text()
    return found


def elsewhere(theirs: Mapping[str, str]) -> str:
    """In what another process's `place` is not this one's, in words; empty if it is the same."""
    ours = place()
    names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    return f"the watcher has another {', '.join(names)}" if names else ""


def set_otherwise(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Which variables that are read once differ between two environments, in words; empty: none."""
    names = [name for name in sorted({*ours, *theirs}) if _is_read_once(name) and ours.get(name) != theirs.get(name)]
    return f"the watcher's environment has another {', '.join(names)}" if names else ""


def _is_read_once(name: str) -> bool:
    return name not in _NO_MATTER and _READ_ONCE.search(name) is not None


def packages(folders: Iterable[str] | None = None) -> dict[str, int]:
    """What is installed in Python's folders: an installer makes a new folder with a package's metadata."""
    found: dict[str, int] = {}
    for folder in dict.fromkeys(sys.path if folders is None else folders):
        with suppress(OSError), os.scandir(folder or ".") as entries:
            for entry in entries:
                if entry.name.endswith((".dist-info", ".egg-info")):
                    found[entry.path] = entry.stat().st_mtime_ns
    return found


@dataclass(frozen=True)
class Origin:
    """What a process began with, before it imported anything: packages as they were installed, and its environment."""

    packages: Mapping[str, int]
    environment: Mapping[str, str]

    @classmethod
    def now(cls) -> Origin:
        """This process's, if it has not imported anything yet."""
        return cls(packages(), dict(os.environ))

    def set_since(self) -> dict[str, str]:
        """The variables that imports have set for others: DeepSpeed sets one for torch.

        A fork makes the others itself: torch, say, that of a folder for compiled code, below its own `TMPDIR`.
        """
        found = {name: value for name, value in os.environ.items() if self.environment.get(name) != value}
        return {name: value for name, value in found.items() if _is_read_once(name)}

    def why_not(self, order: Mapping[str, Any]) -> str:
        """Why a fork would be another rank than one that its watcher starts; empty: it would not."""
        why = elsewhere(order["heritage"]["place"]) or set_otherwise(self.environment, order["environment"])
        if not why and packages() != self.packages:
            why = "packages were installed or removed since the service started: restart it"
        return why
