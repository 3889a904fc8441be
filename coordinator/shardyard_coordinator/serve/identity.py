"""The identity of the files that a spec names: path, inode, size and times of each, checked at every call.

Plans are cached under it, so no plan is returned for files that have changed or are gone since.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from shardyard.remote_uris import hub_cache
from shardyard.v1 import spec_pb2
from shardyard_coordinator.domain.errors import FieldViolation, refused_fields
from shardyard_coordinator.serve.validation import sources

_INDEX = ".index"
_PARTS = re.compile(r"\.(index|meta|data-[0-9]{5}-of-[0-9]{5})$")
_MOST_ENTRIES = 10_000
_MOST_NAMES = 4
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Named(NamedTuple):
    """What a spec names on disks: (field, URI) pairs of clients, and folders of the service's own."""

    uris: tuple[tuple[str, str], ...] = ()
    folders: tuple[str, ...] = ()


def identify(named: Named, roots: Sequence[str]) -> bytes:
    """The identity of all files: the URIs, then the folders. Refused if a URI is outside the roots or not regular.

    The worker that opens the files checks again, because they may be replaced meanwhile. A missing folder of the
    service has an identity too: the planner reports it.
    """
    return _digest(_of_uris(named.uris, roots)) + _digest([_or_gone(folder) for folder in named.folders])


def hub_folders(hubs: Iterable[spec_pb2.HubModel], cache_dir: str) -> tuple[str, ...]:
    """The folders in the Hub's cache of models and tokenizers that are pinned to a commit."""
    return tuple(
        f"{cache_dir}/{hub_cache(hub.token)}/models--{hub.id.replace('/', '--')}/snapshots/{hub.revision}"
        for hub in hubs
        if _COMMIT.fullmatch(hub.revision)
    )


def are_pinned(hubs: Iterable[spec_pb2.HubModel]) -> bool:
    """Whether all name a commit: the branch of a Hub model may move."""
    return all(_COMMIT.fullmatch(hub.revision) for hub in hubs)


def _digest(texts: Sequence[str]) -> bytes:
    return hashlib.sha256(os.fsencode("".join(texts))).digest() if texts else b""


def _of_uris(uris: Iterable[tuple[str, str]], roots: Sequence[str]) -> list[str]:
    real_roots = [os.path.realpath(root) for root in roots]
    found: list[str] = []
    refused: list[FieldViolation] = []
    for field, uri in uris:
        real = os.path.realpath(uri)
        if not any(real == root or real.startswith(root.rstrip("/") + "/") for root in real_roots):
            refused.append(sources.not_allowed(field, uri))
            continue
        try:
            found.append(_identity_of_checkpoint(Path(real)) or _identity(Path(real)))
        except FileNotFoundError:
            # Above a root nothing is listed.
            refused.append(sources.not_there(field, uri, [] if real in real_roots else _like(Path(real))))
        except OSError:
            refused.append(sources.not_allowed(field, uri))
    if refused:
        raise refused_fields(refused)
    return found


def _like(path: Path) -> list[str]:
    """What lies where a path leads to nothing, and is called like it: checkpoints by the names that they are given."""
    try:
        with os.scandir(path.parent) as entries:
            names = {_PARTS.sub("", entry.name) for entry in islice(entries, _MOST_ENTRIES)}
    except OSError:
        return []
    near = difflib.get_close_matches(path.name, sorted(names), n=_MOST_NAMES)
    return near or sorted(names & {_PARTS.sub("", path.name)})


def _identity_of_checkpoint(path: Path) -> str:
    """Of a TensorFlow checkpoint, named by its index or without its ending: of the files beside it; empty: it is none.

    Raises: OSError.
    """
    if not path.name:  # the root of the file system
        return ""
    index = path if path.name.endswith(_INDEX) else path.with_name(path.name + _INDEX)
    if not index.is_file() or (index != path and path.exists()):
        return ""
    with os.scandir(path.parent) as entries:
        files = sorted((entry.name, entry.stat()) for entry in entries if entry.is_file())
    return "".join(
        f"{path.parent}/{name} {file.st_ino} {file.st_size} {file.st_mtime_ns} {file.st_ctime_ns}\n"
        for name, file in files
    )


def _or_gone(folder: str) -> str:
    try:
        return _identity(Path(folder))
    except OSError:
        return f"{folder} is not there\n"


def _identity(path: Path) -> str:
    """Raises: OSError if it is not there, or not a regular file or folder."""
    found = path.stat()
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise OSError(f"{path} is neither a file nor a folder")
    text = f"{path} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}\n"
    if stat.S_ISDIR(found.st_mode):
        for folder, _, files in os.walk(path):
            for name in sorted(files):
                full = os.path.join(folder, name)  # noqa: PTH118 - os.walk returns strings.
                # Of a link its target counts, because that is what is read.
                file = os.stat(full) if os.path.exists(full) else os.lstat(full)  # noqa: PTH110, PTH116 - as above
                text += f"{folder}/{name} {file.st_ino} {file.st_size} {file.st_mtime_ns} {file.st_ctime_ns}\n"
    return text
