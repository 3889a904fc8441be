"""Models of PyTorch Hub: the repository that a spec means, and the model folder that is made of what it returns.

A `hubconf.py` is Python code. Whether it may run is the operator's decision for each repository, and only processes of
the trainer run it (`hub_code`). A repository is copied into the cache, and the copy is run: what was hashed is what
runs. What its function returns is written as a model folder with a copy of the code (`hub_folder`), which plans,
training and answers then read like any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from google.protobuf import json_format

from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.budget import in_use, tokenised
from shardyard_trainer.data.digests import file_sha256
from shardyard_trainer.data.errors import SpecError, shorten
from shardyard_trainer.data.sources import open_regular, resolve_uri
from shardyard_trainer.models.door import CODE, Folder, FolderInvalid, open_folder
from shardyard_trainer.models.hub_faults import HUBCONF, HubCodeFailed
from shardyard_trainer.reading import reading

CHANGED = "MODEL_CHANGED"
MOST_FILES = 5_000
MOST_BYTES = 16 * 1024**3
_FORMAT = 2
# A message has its whole name once, to be copied.
_MOST_OF_A_PATH = 500
_SKIPPED = frozenset({".git", "__pycache__"})


class Repository(NamedTuple):
    """A repository whose code may run: its name in the operator's list, its folder, and the commit that names it."""

    name: str
    path: Path
    commit: str


class HubFolder(NamedTuple):
    """The model folder of what an entry point returns, and the revision of its repository."""

    folder: Folder
    revision: str


def resolve_torch_hub(
    source: spec_pb2.TorchHubModel, locations: worker_pb2.Locations, *, field: str, image_size: int = 0
) -> HubFolder:
    """The model folder of an entry point, made once. Raises SpecError for code that may not run, is not there or fails,
    and MODEL_CHANGED if the repository is not the one of `revision`.

    `image_size` is the side that the spec's pictures have, 0 if it gives none: what the module is tried with.
    """
    from shardyard_trainer.models.hub_folder import Wanted, write_folder  # It imports transformers' models.

    repository = find_repository(source, locations, field=field)
    digest = _digest(repository, source, field)
    wanted = Wanted(repository.name, repository.commit or digest, source.entrypoint, arguments_of(source), image_size)
    cache = Path(locations.cache_dir) / "torch_hub"
    # A plan writes the side that was found into the spec: the folder that it was found with is then the same one.
    found = cache / _key(digest, wanted._replace(side=0))
    if image_size and in_use(found) and _side_of(found) == image_size:
        return HubFolder(open_folder(found, runs=locations.torch_hub), wanted.revision)

    def build(target: Path) -> None:
        _copy(repository.path, target / CODE, digest, field)
        try:
            write_folder(target, wanted)
        except HubCodeFailed as error:
            place = f"{field}.{error.part}" if error.part else field
            raise SpecError(place, error.reason, str(error), error.metadata) from None
        except FolderInvalid as error:
            raise SpecError(field, error.reason, str(error), error.metadata) from None

    made = tokenised(cache / _key(digest, wanted), build)
    return HubFolder(open_folder(made, runs=locations.torch_hub), wanted.revision)


def _key(digest: str, wanted: Any) -> str:
    parts = [_FORMAT, digest, *wanted, torch.__version__, transformers.__version__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _side_of(folder: Path) -> int:
    """The side of the pictures that a folder's model was made for; 0 if they are not square, or it reads texts."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        size = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))["size"]
        return int(size["height"]) if size["height"] == size["width"] else 0
    return 0


def identity(source: spec_pb2.TorchHubModel, locations: worker_pb2.Locations, *, field: str) -> str:
    """A hash of everything that decides the model, found without running anything. Raises SpecError likewise."""
    digest = _digest(find_repository(source, locations, field=field), source, field)
    text = json.dumps([digest, source.entrypoint, arguments_of(source)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def find_repository(source: spec_pb2.TorchHubModel, locations: worker_pb2.Locations, *, field: str) -> Repository:
    """The repository that a source names. Raises SpecError if its code may not run, or it is not there."""
    place = f"{field}.repo"
    shown = repository_name(source)
    if shown.startswith("/"):
        path, commit = resolve_uri(shown, locations, field=place), ""
        name = next((each for each, folder in locations.torch_hub.items() if Path(folder).resolve() == path), "")
    else:
        commit = shown.rpartition(":")[2]
        name = shown if shown in locations.torch_hub else ""
        path = Path(locations.torch_hub[shown]) if name else Path()
    if not name:
        raise SpecError(
            place,
            "CUSTOM_CODE_REFUSED",
            f"the code of {shorten(shown)} may not run here: a hubconf.py is Python code, which runs only if the "
            "operator allows its repository; have the service started with --torch-hub-repo "
            f"{shorten(shown, _MOST_OF_A_PATH)}",
        )
    if not path.is_dir():
        raise SpecError(
            place,
            "MODEL_NOT_FOUND",
            f"{shorten(shown)} is not in the service's torch hub cache, and nothing is downloaded here; have the "
            f"operator run torch.hub.list({shown!r}, trust_repo=True, skip_validation=True) once",
        )
    if not (path / HUBCONF).is_file():
        raise SpecError(
            place,
            "MODEL_INVALID",
            f"{shorten(shown)} has no {HUBCONF}, which defines the functions that return models; give the folder that "
            "has it",
            {"file": HUBCONF},
        )
    return Repository(name, path, commit)


def repository_name(source: spec_pb2.TorchHubModel) -> str:
    """The path of a repository, or `owner/name:commit`, whichever field has the commit."""
    if source.repo.startswith("/") or ":" in source.repo:
        return source.repo
    return f"{source.repo}:{source.revision}"


def arguments_of(source: spec_pb2.TorchHubModel) -> dict[str, Any]:
    """The keyword arguments as Python values; a Struct has one kind of number, so whole ones are integers here."""
    return {name: _as_python(value) for name, value in json_format.MessageToDict(source.arguments).items()}


def _as_python(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_python(each) for each in value]
    if isinstance(value, dict):
        return {name: _as_python(each) for name, each in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _digest(repository: Repository, source: spec_pb2.TorchHubModel, field: str) -> str:
    """The sha256 of a repository's files, their names and bytes. Raises SpecError if a given one is another."""
    found = _hash_of(repository.path, f"{field}.repo")
    if not repository.commit and source.revision not in ("", found):
        raise SpecError(
            f"{field}.revision",
            CHANGED,
            f"the files of {shorten(source.repo)} have changed: their sha256 is {found}, not {source.revision}; "
            "bring them back, or leave `revision` out for the files as they are",
        )
    return found


def _hash_of(root: Path, place: str) -> str:
    total = hashlib.sha256()
    for name in code_files(root, place):
        reading(name)
        total.update(f"{name}\0{file_sha256(root / name, name, open_regular)}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def code_files(root: Path, place: str) -> list[str]:
    """The files of a repository, sorted; without git's own and compiled ones.

    Raises SpecError for a link, for what is not a regular file, and for too many files or bytes.
    """
    names, num_bytes = [], 0
    for path in _walk(root):
        name = str(path.relative_to(root))
        if path.is_symlink() or not path.is_file():
            what = "a link" if path.is_symlink() else "not a regular file"
            text = f"{shorten(name)!r} of the repository is {what}; put the file itself there"
            raise SpecError(place, "PATH_NOT_ALLOWED", text, {"file": name})
        names.append(name)
        num_bytes += path.stat().st_size
        if len(names) > MOST_FILES or num_bytes > MOST_BYTES:
            text = f"the repository has more than {MOST_FILES:,} files or {MOST_BYTES:,} bytes; give one with less"
            raise SpecError(place, "MODEL_INVALID", text)
    return sorted(names)


def _walk(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        links = [name for name in below if Path(folder, name).is_symlink()]
        below[:] = [name for name in below if name not in _SKIPPED and name not in links]
        for name in (*links, *names):
            if not name.endswith(".pyc"):
                yield Path(folder, name)


def _copy(root: Path, target: Path, digest: str, field: str) -> None:
    """Copies a repository. Raises SpecError MODEL_CHANGED if the copy is not what was hashed."""
    for name in code_files(root, f"{field}.repo"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with open_regular(root / name, name) as file, (target / name).open("wb") as copy:
            shutil.copyfileobj(file, copy)
    if _hash_of(target, f"{field}.repo") != digest:
        text = "the repository changed while it was read; submit again when nobody writes into it"
        raise SpecError(f"{field}.repo", CHANGED, text)
