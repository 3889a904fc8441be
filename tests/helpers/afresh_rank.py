"""A program, and a module of its server: what a rank that is a fork has of its own."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import numpy as np

FOUND = "FOUND"
"""The variable with the file that the rank writes; beside it are those that are written at the end."""


def main() -> None:
    """Writes what it has drawn."""
    path = Path(os.environ[FOUND])
    found = {
        "python": random.random(),
        "numpy": float(np.random.random()),
        "authkey": bytes(multiprocessing.current_process().authkey).hex(),
        "zone": time.tzname[0],
    }
    path.write_text(json.dumps(found))
    atexit.register(path.with_suffix(".end").touch)


def _end_of_the_server() -> None:
    Path(os.environ[FOUND]).with_suffix(".server").touch()


if __name__ == "__main__":
    main()
else:
    atexit.register(_end_of_the_server)
