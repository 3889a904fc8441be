"""The values of secrets: each is a file of its name in one folder of this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from shardyard.remote_uris import is_secret_name

_MOST_BYTES = 64 * 1024

_log = logging.getLogger(__name__)


def read_secrets(folder: str, names: Iterable[str]) -> dict[str, str | None]:
    """The values by name, without the space around them; None if there is no such file, or it is none of a secret."""
    return {name: _read(Path(folder), name) if folder and is_secret_name(name) else None for name in names}


def _read(folder: Path, name: str) -> str | None:
    try:
        with (folder / name).open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) <= _MOST_BYTES:
            return data.decode("utf-8").strip()
        _log.warning("the secret %s has more than %d bytes", name, _MOST_BYTES)
    except OSError as error:
        _log.warning("the secret %s cannot be read: %s", name, error)
    except UnicodeDecodeError:
        _log.warning("the secret %s is not UTF-8", name)  # Not the error itself, which has the bytes.
    return None
