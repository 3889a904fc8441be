"""Models of the Hugging Face Hub, pinned to a commit."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import httpx2  # The HTTP library of huggingface_hub 2, whose connection errors it raises.
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils.tqdm import tqdm

from shardyard.remote_uris import hub_cache
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import SpecError, shorten
from shardyard_trainer.models.door import Folder, open_folder

_WANTED = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 20.0

MOST_VARIABLE = "SHARDYARD_HUB_MODEL_BYTES"
MOST_BYTES = 64 * 1024**3
"""Of one model, all files that are fetched together, unless the variable says otherwise."""

_LEFT_FREE_BYTES = 1024**3
_OF_THE_NETWORK = {errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.EADDRNOTAVAIL}


class HubFolder(NamedTuple):
    """The folder of a model's files, and their commit."""

    folder: Folder
    commit: str


def resolve_hub(
    hub: spec_pb2.HubModel, cache_dir: Path, *, field: str = "spec.model.hub", token: str = ""
) -> HubFolder:
    """Fetches a model's files (once) and pins its commit. `HF_ENDPOINT` is the Hub's address.

    A model that names a secret is fetched with `token`, its value; without the value it is only looked up.

    Raises SpecError MODEL_NOT_FOUND, REVISION_NOT_FOUND, HUB_UNREACHABLE, MODEL_UNSAFE, QUOTA_EXCEEDED for a model over
    the bound, STORAGE_FULL for one that the disk has no room for, or SPEC_INVALID for an id that is not one.
    """
    target = cache_dir / hub_cache(hub.token)
    if _COMMIT.fullmatch(hub.revision) and (cached := _cached(hub, target)):
        return HubFolder(_opened(cached), hub.revision)
    if hub.token and not token:
        text = f"{shorten(hub.id)} is private, and its copy is not in the service's cache any more; submit again"
        raise SpecError(field, "HUB_UNREACHABLE", text)
    endpoint = os.environ.get("HF_ENDPOINT") or None
    revision = hub.revision or "main"
    try:
        # No token of the server's account: what that may read is not for everybody who may submit.
        api = HfApi(endpoint=endpoint, token=token or False)
        info = api.model_info(hub.id, revision=revision, timeout=_TIMEOUT_S, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
        _check_files(hub, set(sizes), field)
        with _bounded(hub, sizes, target, field) as counted:
            folder = snapshot_download(
                hub.id,
                revision=info.sha,
                cache_dir=target,
                endpoint=endpoint,
                token=token or False,
                allow_patterns=_WANTED,
                # Other frameworks' weights and demos have their own folders.
                ignore_patterns=["*/*"],
                etag_timeout=_TIMEOUT_S,
                tqdm_class=counted,
            )
    except HFValidationError:
        raise SpecError(
            f"{field}.id", "SPEC_INVALID", f"{shorten(hub.id)!r} is not a Hub id; it is `name` or `owner/name`"
        ) from None
    except RevisionNotFoundError:
        raise SpecError(
            f"{field}.revision",
            "REVISION_NOT_FOUND",
            f"{shorten(hub.id)} has no branch, tag or commit {shorten(revision)!r}",
        ) from None
    except (RepositoryNotFoundError, GatedRepoError):
        raise _not_found(hub, field) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, httpx2.HTTPError, OSError) as error:
        if _is_of_this_disk(error):
            raise
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise _not_found(hub, field) from None
        raise SpecError(
            field,
            "HUB_UNREACHABLE",
            f"the Hub cannot be reached ({type(error).__name__}); try again, or upload the model",
        ) from None
    _complete(target, str(info.sha)).parent.mkdir(parents=True, exist_ok=True)
    _complete(target, str(info.sha)).touch()
    return HubFolder(_opened(Path(folder)), str(info.sha))


def _not_found(hub: spec_pb2.HubModel, field: str) -> SpecError:
    text = f"the Hub has no model {shorten(hub.id)!r}, or it is private or gated"
    if hub.token:
        text += f", and the token of {shorten(hub.token)} may not read it; have the operator correct it"
    else:
        text += "; give its `token`, as the name of a secret (secret://NAME), or upload the model"
    return SpecError(f"{field}.id", "MODEL_NOT_FOUND", text)


@contextmanager
def _bounded(hub: spec_pb2.HubModel, sizes: Mapping[str, int], target: Path, field: str) -> Iterator[type]:
    """Refuses a model by the sizes that the Hub states, and stops files that grow over the bound anyway.

    Yields the progress bar to download with, which counts the bytes of all files together.
    """
    most = int(os.environ.get(MOST_VARIABLE, MOST_BYTES))
    target.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target).free - _LEFT_FREE_BYTES
    wanted = [name for name in sizes if "/" not in name and any(fnmatch(name, pattern) for pattern in _WANTED)]
    need = sum(sizes[name] for name in wanted)
    metadata = {"need_bytes": str(need), "most_bytes": str(most), "free_bytes": str(max(free, 0))}
    if need > most:
        raise _too_large(hub, f"{need:,} bytes in {len(wanted)} files", most, field, metadata)
    if need > free:
        raise SpecError(
            field,
            "STORAGE_FULL",
            f"{shorten(hub.id)} has {need:,} bytes, but the service's cache has room for {max(free, 0):,}; use a "
            "smaller model, or ask the operator to make space",
            metadata,
        )
    # Of one file the kernel holds the bound, whatever writes it.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    hard = most if before[1] == resource.RLIM_INFINITY else min(most, before[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, before[1]))
    try:
        yield _counting(min(most, free))
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        what = "files that are longer than the sizes that the Hub reports"
        raise _too_large(hub, what, most, field, metadata) from None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _counting(most: int) -> type:
    """A progress bar that shows nothing, and raises OSError EFBIG before more than `most` bytes are written."""

    class Counting(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]
            self._counts = options.get("unit") == "B"
            self._bytes = 0
            self._lock_bytes = threading.Lock()

        def update(self, n: float | None = 1) -> None:
            """Called by each download for what it is about to write, from threads."""
            if not self._counts:
                return
            with self._lock_bytes:
                self._bytes += int(n or 0)
                if self._bytes > most:
                    raise OSError(errno.EFBIG, "the files are larger than the Hub says")

    return Counting


def _too_large(hub: spec_pb2.HubModel, what: str, most: int, field: str, metadata: Mapping[str, str]) -> SpecError:
    return SpecError(
        field,
        "QUOTA_EXCEEDED",
        f"{shorten(hub.id)} has {what}, but at most {most:,} bytes of a model are fetched from the Hub; use a smaller "
        f"one, or ask the operator to raise {MOST_VARIABLE}",
        metadata,
    )


def snapshot_folder(hub: spec_pb2.HubModel, cache_dir: Path) -> Path:
    """The folder in the cache for a model of a commit, existing or not."""
    return (
        cache_dir
        / hub_cache(hub.token)
        / repo_folder_name(repo_id=hub.id, repo_type="model")
        / "snapshots"
        / hub.revision
    )


def _is_of_this_disk(error: Exception) -> bool:
    """Whether the cache could not be written or read, which is not the Hub's fault."""
    if not isinstance(error, OSError) or isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
        return False
    return error.errno is not None and error.errno not in _OF_THE_NETWORK


def _opened(snapshot: Path) -> Folder:
    # `models--owner--name/snapshots/COMMIT`: its files are links into `models--owner--name/blobs`.
    return open_folder(snapshot, roots=(snapshot.parents[1],))


def _complete(target: Path, commit: str) -> Path:
    # A download that was cut off leaves a folder that looks like a whole one.
    return target / "complete" / commit


def _cached(hub: spec_pb2.HubModel, target: Path) -> Path | None:
    if not _complete(target, hub.revision).is_file():
        return None
    try:
        return Path(snapshot_download(hub.id, revision=hub.revision, cache_dir=target, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _check_files(hub: spec_pb2.HubModel, files: set[str], field: str) -> None:
    has_safe = any(name.endswith(".safetensors") for name in files)
    if files and not has_safe and any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in files):
        raise SpecError(
            field,
            "MODEL_UNSAFE",
            f"{shorten(hub.id)} has weights in pickle files only; use a revision with safetensors",
        )
