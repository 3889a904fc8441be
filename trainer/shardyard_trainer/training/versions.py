"""The versions that a result depends on, for manifests of checkpoints and for model cards."""

from __future__ import annotations

import importlib.metadata
import platform

_PACKAGES = ("shardyard", "torch", "transformers", "tokenizers", "deepspeed")


def versions() -> dict[str, str]:
    """Of Python and of the packages that are installed, by name."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
