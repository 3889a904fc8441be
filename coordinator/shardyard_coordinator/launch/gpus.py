"""Which GPUs of this machine gangs may use."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def usable_gpus(count: int | None = None, devices: Path = Path("/dev")) -> list[str]:
    """The first `count`, else all NVIDIA devices that there are for this process; what CUDA_VISIBLE_DEVICES calls them.

    A torch that was built without CUDA can use none: where no count is given, there are none then.
    """
    found = [path.name[6:] for path in devices.glob("nvidia[0-9]*") if path.name[6:].isdigit()]
    if count is None and not _torch_has_cuda():
        return []
    numbers = [str(number) for number in range(len(found) if count is None else count)]
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return numbers
    names = [name.strip() for name in allowed.split(",") if name.strip()]
    return numbers if count is not None and count > len(names) else names[: len(numbers)]


def _torch_has_cuda() -> bool:
    """By the name of its build; importing it takes a second."""
    try:
        return not version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False
