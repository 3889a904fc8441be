"""What a string means as a model, data or a tokenizer."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shardyard._names import parent_name
from shardyard._text import is_utf8, not_utf8, shown
from shardyard.errors import invalid
from shardyard.remote_uris import is_remote

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")

Kind = Literal["model", "data", "tokenizer", "adapter"]


@dataclass(frozen=True)
class Source:
    """A source: `field` is the oneof member of the proto, or `local` for a path to upload."""

    field: Literal["uri", "hub", "model", "dataset", "local"]
    value: str


def classify(kind: Kind, text: str, *, base: Path, project: str) -> Source | str:
    """The source that `text` means; an error sentence instead if it means none.

    In this order: `server:/path`, `hub:id`, `s3://bucket/prefix`, `model:ID` and `dataset:ID`, `projects/…`, a path
    that exists here (relative to `base`), and, for all but data, the id of a model on the Hub.
    """
    if problem := _unreadable(text):
        return problem
    scheme, colon, rest = text.partition(":")
    if colon and scheme == "server":
        return Source("uri", rest) if rest.startswith("/") else f"`{text}`: an absolute path must follow `server:`"
    if colon and scheme == "hub" and kind != "data":
        return Source("hub", rest) if HUB_ID.fullmatch(rest) else f"`{text}`: `name` or `owner/name` must follow `hub:`"
    if is_remote(text):
        return Source("uri", text)
    if text.startswith("projects/") or (colon and scheme in ("model", "dataset")):
        return _resource(kind, text, project)
    if colon and re.fullmatch(r"[a-z][a-z0-9+.-]+", scheme) and rest.startswith("//"):
        return f"`{text}`: only files here, `server:/path` for files on the server, and `s3://…` can be read"
    path = base / expanded(text)
    if path.exists():
        return Source("local", str(path.resolve()))
    if kind != "data" and HUB_ID.fullmatch(text):
        return Source("hub", text)
    return _missing(kind, text, path)


def expanded(text: str | Path) -> Path:
    """The path with `~` expanded; unchanged if there is no such user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def local_path(field: str, path: str | Path) -> Path:
    """A path from a caller, checked.

    Raises: InvalidArgument if it is empty, which would mean the current folder, or no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise invalid(field, f"{shown(path)} is given, but a path is needed; give a text or a Path")
    if not str(path).strip():
        raise invalid(field, f"{shown(str(path))} is empty; give a path, `.` for the current folder")
    return expanded(path)


def _unreadable(text: str) -> str | None:
    """The error sentence for a text that means no source."""
    if not text.strip():
        return f"{shown(text)} is empty; give a path, `.` for the current folder, or leave it out"
    return None if is_utf8(text) else not_utf8(text)


def _resource(kind: Kind, text: str, project: str) -> Source | str:
    """A model or data set of the service, short or in full."""
    scheme, _, rest = text.partition(":")
    if text.startswith("projects/"):
        parts = text.split("/")
        name, collection = text, parts[2] if len(parts) == 4 else ""
    else:
        name, collection = f"{parent_name(project)}/{scheme}s/{rest}", f"{scheme}s"
    allowed = {"model": ("models",), "data": ("datasets",), "tokenizer": ("models", "datasets")}.get(
        kind, ("datasets",)
    )
    if collection not in allowed:
        what = f"{'an' if kind == 'adapter' else 'a'} {kind}"
        return f"`{text}`: {what} is named `projects/{{project}}/{allowed[0]}/{{id}}` or `{allowed[0][:-1]}:{{id}}`"
    return Source("model" if collection == "models" else "dataset", name)


def _missing(kind: Kind, text: str, path: Path) -> str:
    near: list[str] = []
    if path.parent.is_dir():
        near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=0.6)
    hint = f"; did you mean `{Path(text).parent / near[0]}`?" if near else ""
    what = {"model": "folder", "data": "file or folder", "tokenizer": "folder", "adapter": "folder"}[kind]
    return f"`{text}`: no such {what} here (looked at {path}); a path on the server is written `server:/path`{hint}"
