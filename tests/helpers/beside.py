"""Scripts outside the packages, in `tools`, `bench` and `examples/quickstart`, imported as they import each other."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from helpers.repository import ROOT


def script(folder: str, name: str) -> ModuleType:
    """The module of a script, which finds the modules in its own folder."""
    path = str(ROOT / folder)
    if path not in sys.path:
        sys.path.insert(0, path)
    return importlib.import_module(name)
