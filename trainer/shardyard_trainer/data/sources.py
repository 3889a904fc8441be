"""Resolves a DataSource to its files, and refuses files outside the server's allowed folders."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import Message

from shardyard.remote_uris import is_remote
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.digests import CHANGED, damage_of
from shardyard_trainer.data.errors import DataError, SpecError, listed, nearest, shorten
from shardyard_trainer.data.magic import GZIP, HEAD_BYTES, PARQUET, recognise
from shardyard_trainer.data.picture_folders import ENDINGS, NOT_READ, check_folders, is_left_out, is_metadata

Source = (
    spec_pb2.DataSource | spec_pb2.ModelSource | spec_pb2.TokenizerSource | spec_pb2.AdapterFolder | spec_pb2.BaseModel
)

_MOST_FILES = 1_000_000
_FOR_TESTS = frozenset({"t10k", "test", "dev", "val", "valid", "validation", "eval"})

_FORMATS = {
    ".txt": spec_pb2.DATA_FORMAT_TEXT,
    ".text": spec_pb2.DATA_FORMAT_TEXT,
    ".jsonl": spec_pb2.DATA_FORMAT_JSONL,
    ".ndjson": spec_pb2.DATA_FORMAT_JSONL,
    ".csv": spec_pb2.DATA_FORMAT_CSV,
    ".tsv": spec_pb2.DATA_FORMAT_TSV,
    ".parquet": spec_pb2.DATA_FORMAT_PARQUET,
    **dict.fromkeys((".conll", ".bio", ".iob", ".iob2"), spec_pb2.DATA_FORMAT_CONLL),
    ".inter": spec_pb2.DATA_FORMAT_INTERACTIONS,
    **dict.fromkeys((*ENDINGS, *NOT_READ), spec_pb2.DATA_FORMAT_IMAGES),
}
_PACKED = ".gz"
_JSON = ".json"
"""One list of objects, or one object a line; next to data files it usually describes them and is not data itself."""

_IDX = re.compile(r"(idx[0-9]-ubyte|\.idx[0-9]?)(\.gz)?$", re.IGNORECASE)
_TEXT_ENDINGS = [ending for ending, kind in _FORMATS.items() if kind != spec_pb2.DATA_FORMAT_IMAGES]
_ENDINGS = f"{', '.join([*_TEXT_ENDINGS, _JSON])}, each also with {_PACKED}, nor pictures"


@dataclass(frozen=True)
class DataFile:
    """A regular file, its name as messages show it (relative to its source), and its format."""

    path: Path
    name: str
    format: spec_pb2.DataFormat.ValueType


def named_sources(spec: spec_pb2.JobSpec) -> Iterator[tuple[str, Source]]:
    """Every model, tokenizer and data set in a spec, with its path in the spec."""
    yield from _named(spec, "spec")


def _named(message: Message, path: str) -> Iterator[tuple[str, Source]]:
    for field, value in message.ListFields():
        if not isinstance(value, Message):
            continue
        here = f"{path}.{field.name}"
        if isinstance(value, Source) and not (isinstance(value, spec_pb2.ModelSource) and value.HasField("adapter")):
            if value.WhichOneof("source"):
                yield here, value
        else:
            yield from _named(value, here)


def resolve_source(
    source: spec_pb2.DataSource, locations: worker_pb2.Locations, *, field: str = "spec.train_data"
) -> list[DataFile]:
    """The files of a source, sorted by path.

    Raises SpecError PATH_NOT_ALLOWED, DATASET_NOT_FOUND, SPEC_INVALID or DATA_INVALID.
    """
    if source.WhichOneof("source") == "dataset":
        base, roots, origin = _dataset_folder(source.dataset, locations, field), None, f"{field}.dataset"
        _check_uploaded(source, locations, origin)
    elif source.WhichOneof("source") == "uri":
        base, origin = resolve_uri(source.uri, locations, field=f"{field}.uri"), f"{field}.uri"
        roots = None if is_remote(source.uri) else locations.data_roots
    else:
        raise SpecError(
            field, "SPEC_INVALID", "no source: give uri (a path on the server) or dataset (an uploaded one)"
        )
    inside = [Path(root).resolve() for root in roots] if roots is not None else [base]
    if (folder := _folder_below(base, source.path, inside)) is not None:
        return _chosen(_walk(folder, source.format, inside, field, f"{field}.path"), source)
    if source.path:
        return _with_partner(_single(base, source, inside, field), inside)
    if base.is_file():
        return _with_partner(_file(base, base.name, source.format, field), inside)
    return _chosen(_walk(base, source.format, inside, field, origin), source)


def _chosen(files: list[DataFile], source: spec_pb2.DataSource) -> list[DataFile]:
    """The text files that `columns` names, if it names files: text files have no columns."""
    wanted = set(source.columns.values())
    chosen = [file for file in files if file.name in wanted and file.format == spec_pb2.DATA_FORMAT_TEXT]
    return chosen if wanted and len(chosen) == len(wanted) else files


def _check_uploaded(source: spec_pb2.DataSource, locations: worker_pb2.Locations, field: str) -> None:
    """Raises SpecError DATA_CHANGED if the service's copy differs from the upload: the user's rows are not at fault."""
    folder = locations.folders[source.dataset]
    known = locations.known_files[folder].files if folder in locations.known_files else ()
    folder_path = source.path.rstrip("/") + "/"
    asked = [file for file in known if source.path in ("", file.path) or file.path.startswith(folder_path)]
    if damage := damage_of(Path(folder), asked, open_regular):
        name, how = damage
        message = (
            f"the service's copy is damaged: {name} {how}; restore the file, or delete the data set and upload it again"
        )
        raise SpecError(field, CHANGED, message, {"file": name})


def is_for_tests(name: str) -> bool:
    """Whether a file is named after a split that is not for training, such as `test.csv`, `a/dev-0.tsv`."""
    # The name of a picture says nothing: `val_1.jpg` may well be training data.
    name = str(Path(name).parent) if _format_of(name) == spec_pb2.DATA_FORMAT_IMAGES else name
    return not _FOR_TESTS.isdisjoint(re.split(r"[^a-z0-9]+|(?<=[a-z])[0-9]+$", name.lower()))


def resolve_uri(uri: str, locations: worker_pb2.Locations, *, field: str) -> Path:
    """The file or folder at a path on the server, symlinks resolved, or the copy of the objects of a pinned URI.

    Raises SpecError if it is not allowed, or the copy is not there.
    """
    if is_remote(uri):
        return _copy(uri, locations, field)
    if "://" in uri or uri.startswith("file:") or "::" in uri:
        scheme = shorten(uri.split(":", 1)[0])
        reason = "PATH_NOT_ALLOWED" if scheme == "file" else "ADDRESS_NOT_ALLOWED"
        raise SpecError(field, reason, f"scheme {scheme!r}: give the absolute path of a file or folder on the server")
    refused = SpecError(
        field,
        "PATH_NOT_ALLOWED",
        f"{shorten(uri)!r} is not a file or folder under an allowed data root; "
        "upload the data, or have its folder allowed with --data-root",
    )
    path = Path(uri)
    if not path.is_absolute() or ".." in path.parts or "\0" in uri:
        raise refused
    try:
        resolved = path.resolve(strict=True)
        mode = resolved.stat().st_mode
    except (OSError, RuntimeError):
        raise refused from None
    roots = [Path(root).resolve() for root in locations.data_roots]
    if not _is_inside(resolved, roots):
        raise refused
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise SpecError(field, "PATH_NOT_ALLOWED", f"{shorten(uri)!r} is not a regular file or folder")
    return resolved


def _copy(uri: str, locations: worker_pb2.Locations, field: str) -> Path:
    place = locations.folders.get(uri, "")
    if not place:
        text = f"{shorten(uri)!r}: objects are read by a service that allows their address; start it with --remote-root"
        raise SpecError(field, "ADDRESS_NOT_ALLOWED", text)
    if not Path(place).exists():
        text = f"the service's copy of {shorten(uri)!r} is gone; submit the job again"
        raise SpecError(field, "OBJECT_NOT_FOUND", text)
    return Path(place).resolve()


def open_regular(path: Path, name: str) -> BinaryIO:
    """Opens a file for reading, never waiting on a FIFO or a device; raises DataError if it is not a regular file."""
    try:
        # O_NONBLOCK: opening a FIFO would otherwise wait forever for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"cannot be opened: {error.strerror}", file=name) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError("is not a regular file", file=name, reason="PATH_NOT_ALLOWED")
    return os.fdopen(descriptor, "rb")


def _dataset_folder(name: str, locations: worker_pb2.Locations, field: str) -> Path:
    folder = locations.folders.get(name, "")
    if not folder or not Path(folder).is_dir():
        raise SpecError(f"{field}.dataset", "DATASET_NOT_FOUND", f"there is no data set {shorten(name)!r}")
    return Path(folder).resolve()


def _single(base: Path, source: spec_pb2.DataSource, inside: list[Path], field: str) -> DataFile:
    relative = Path(source.path)
    place = f"{field}.path"
    if relative.is_absolute() or ".." in relative.parts or "\0" in source.path:
        raise SpecError(place, "PATH_NOT_ALLOWED", f"{shorten(source.path)!r} leaves the folder; give a path inside it")
    if base.is_file():
        raise SpecError(place, "SPEC_INVALID", "the source is one file already; leave path empty")
    try:
        resolved = (base / relative).resolve(strict=True)
    except (OSError, RuntimeError):
        there = [str(p.relative_to(base)) for p in sorted(base.rglob("*")) if p.is_file()][:1000]
        hint = nearest(source.path, there)
        raise SpecError(
            place, "DATA_INVALID", f"there is no file {shorten(source.path)!r}{hint}; there are: {listed(there)}"
        ) from None
    if not _is_inside(resolved, inside) or not resolved.is_file():
        raise SpecError(place, "PATH_NOT_ALLOWED", f"{shorten(source.path)!r} is not a regular file inside the folder")
    return _file(resolved, source.path, source.format, field)


def _walk(
    base: Path, wanted: spec_pb2.DataFormat.ValueType, inside: list[Path], field: str, origin: str
) -> list[DataFile]:
    found: list[DataFile] = []
    others: list[tuple[str, Path]] = []
    by_ending = wanted in (spec_pb2.DATA_FORMAT_UNSPECIFIED, spec_pb2.DATA_FORMAT_IMAGES)
    for number, path in enumerate(_files_below(base)):
        if number >= _MOST_FILES:
            raise SpecError(origin, "DATA_INVALID", f"the folder has more than {_MOST_FILES:,} files")
        name = str(path.relative_to(base))
        if not name.isprintable():
            raise SpecError(origin, "DATA_INVALID", f"the file name {shorten(name)!r} is not printable UTF-8")
        try:
            resolved = path.resolve()
        except RuntimeError:  # What Python raises for a loop of links.
            text = f"{shorten(name)!r} is a link that leads back to itself; remove it"
            raise SpecError(origin, "PATH_NOT_ALLOWED", text) from None
        if not _is_inside(resolved, inside):
            raise SpecError(origin, "PATH_NOT_ALLOWED", f"{shorten(name)!r} is a link out of the folder")
        if not resolved.is_file():
            raise SpecError(origin, "PATH_NOT_ALLOWED", f"{shorten(name)!r} is not a regular file")
        if not by_ending or (_format_of(name) and not _is_json(name)):
            found.append(_file(resolved, name, wanted if not by_ending else _format_of(name), field))
        else:
            others.append((name, resolved))
    if by_ending:
        described = [
            _file(path, name, spec_pb2.DATA_FORMAT_UNSPECIFIED, field) for name, path in others if is_metadata(name)
        ]
        found = _of_pictures(base, found, described, wanted, origin)
    found = found or [_file(path, name, wanted, field) for name, path in others if _is_json(name)]
    if not found:
        for name, path in others:
            _refuse_container(path, name, field)
        what = f"it has {listed(name for name, _ in others)}; give path and format" if others else "it is empty"
        raise SpecError(origin, "DATA_INVALID", f"the folder has no {_ENDINGS} file: {what}")
    if len({file.format for file in found}) > 1:
        names = listed(file.name for file in found)
        raise SpecError(
            field, "DATA_INVALID", f"the folder has files of several formats ({names}); choose one with path"
        )
    return found


def _of_pictures(
    base: Path,
    found: list[DataFile],
    described: list[DataFile],
    wanted: spec_pb2.DataFormat.ValueType,
    field: str,
) -> list[DataFile]:
    """The pictures of a folder and their metadata if it is a folder of pictures; else the other files.

    A folder is one of pictures if it has more of them than of other data.
    """
    pictures = [file for file in found if file.format == spec_pb2.DATA_FORMAT_IMAGES]
    others = [file for file in found if file.format != spec_pb2.DATA_FORMAT_IMAGES]
    rows = [file for file in others if not is_metadata(file.name)]
    if not wanted and len(pictures) <= len(rows):
        return others
    described = [*described, *(file for file in others if is_metadata(file.name))]
    if not pictures:
        text = f"the folder has no pictures ({', '.join(ENDINGS)})"
        raise SpecError(field, "DATA_INVALID", f"{text}; leave format out, or choose another folder")
    if not described:
        try:
            check_folders(base, [file.name for file in pictures])
        except DataError as error:
            raise error.at(field) from None
    both = [*pictures, *(replace(file, format=spec_pb2.DATA_FORMAT_IMAGES) for file in described)]
    return sorted(both, key=lambda file: Path(file.name).parts)


def _folder_below(base: Path, relative: str, inside: list[Path]) -> Path | None:
    """A folder inside another one; None if the path does not name one."""
    path = Path(relative)
    if not relative or path.is_absolute() or ".." in path.parts or "\0" in relative:
        return None
    try:
        resolved = (base / path).resolve()
    except RuntimeError:  # A link that leads back to itself.
        return None
    return resolved if _is_inside(resolved, inside) and resolved.is_dir() else None


def _with_partner(file: DataFile, inside: list[Path]) -> list[DataFile]:
    """A single file; an IDX file comes with its partner: the labels of its pictures, or the reverse."""
    if file.format != spec_pb2.DATA_FORMAT_IDX:
        return [file]
    found = {file.path: file}
    stem = partner(file.path.name.removesuffix(_PACKED))
    for name in (stem, stem + _PACKED):
        path = file.path.with_name(name).resolve()
        if path.is_file() and _is_inside(path, [*inside, file.path.parent]) and path not in found:
            found[path] = DataFile(path, str(Path(file.name).with_name(name)), file.format)
            break
    return sorted(found.values(), key=lambda each: each.name)


def partner(name: str) -> str:
    """The name of the labels of a file of pictures, and the reverse: `train-images-idx3-ubyte` and `train-labels-…`."""
    if "images" in name.lower() or "idx3" in name.lower():
        return name.replace("images", "labels").replace("idx3", "idx1")
    return name.replace("labels", "images").replace("idx1", "idx3")


def _files_below(base: Path) -> Iterable[Path]:
    for folder, folders, files in os.walk(base, followlinks=False):
        folders[:] = sorted(name for name in folders if not is_left_out(name))
        # A link to a folder is listed as a folder and never followed: its files have another name anyway.
        for name in folders:
            if (linked := Path(folder, name)).is_symlink():
                yield linked
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(folder, name)


def _file(path: Path, name: str, wanted: spec_pb2.DataFormat.ValueType, field: str) -> DataFile:
    format_ = wanted or _format_of(path.name) or _format_of(name)
    if not format_:
        _refuse_container(path, name, field)
        raise SpecError(
            f"{field}.format",
            "SPEC_INVALID",
            f"the ending of {shorten(name)!r} is none of {_ENDINGS}; give the format",
        )
    return DataFile(path, name, format_)


def _format_of(name: str) -> spec_pb2.DataFormat.ValueType:
    """The format by the ending (for `.gz` files the one before it); 0 if unknown."""
    if _IDX.search(name):
        return spec_pb2.DATA_FORMAT_IDX
    suffix = Path(name.lower().removesuffix(_PACKED)).suffix
    if suffix in ENDINGS and name.lower().endswith(_PACKED):
        return spec_pb2.DATA_FORMAT_UNSPECIFIED
    return spec_pb2.DATA_FORMAT_JSONL if suffix == _JSON else _FORMATS.get(suffix, spec_pb2.DATA_FORMAT_UNSPECIFIED)


def _is_json(name: str) -> bool:
    return Path(name.lower().removesuffix(_PACKED)).suffix == _JSON


def _refuse_container(path: Path, name: str, field: str) -> None:
    """Raises DataError if the first bytes of a file of unknown ending show another kind."""
    with open_regular(path, name) as stream:
        kind = recognise(stream.read(HEAD_BYTES))
    if kind not in (None, GZIP, PARQUET):
        raise DataError(f"is {kind.name}; {kind.advice}", file=name, field=field)


def _is_inside(path: Path, roots: Iterable[Path]) -> bool:
    return any(path == root or root in path.parents for root in roots)
