"""Where models and data may come from: URIs, Hub ids, names, paths inside a folder."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from typing import Final

from shardyard.remote_uris import is_remote, parse, secret_name
from shardyard_coordinator.domain.errors import FieldViolation
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.serve.validation.names import name_complaint
from shardyard_coordinator.serve.validation.text import control_complaint, show

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_HUB_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_MAX_PATH: Final = 4096
# PostgreSQL indexes no value of more than 2,704 bytes.
_MAX_PATH_BYTES: Final = 2048
_REVISION: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,199}")


def check_uri(field: str, uri: str, *, objects: bool = True) -> list[FieldViolation]:
    """The errors in a URI's text; whether it exists is checked later. `objects`: whether it may name objects.

    The allowed roots are not named: they concern the operator only.
    """
    absolute = "it must be the absolute path of a file or folder under an allowed data root"
    if not uri:
        return [FieldViolation(field, f"is empty; {absolute}")]
    if complaint := control_complaint(uri):
        return [FieldViolation(field, complaint)]
    if len(uri) > 4096:
        return [FieldViolation(field, f"{show(uri)} has {len(uri)} characters; at most 4,096 are allowed; shorten it")]
    if "::" in uri:
        return [
            FieldViolation(
                field,
                f"{show(uri)} is a chained URL, which is refused; {absolute}, or upload the files",
                Reason.ADDRESS_NOT_ALLOWED,
            )
        ]
    if objects and is_remote(uri):
        return _check_objects(field, uri)
    scheme = _SCHEME.match(uri)
    if scheme is not None and scheme[1].lower() != "file":
        return [
            FieldViolation(
                field,
                f"{show(uri)}: the scheme {scheme[1][:20]} is not allowed; {absolute}, or upload the files",
                Reason.ADDRESS_NOT_ALLOWED,
            )
        ]
    if scheme is not None or not uri.startswith("/") or ".." in uri.split("/"):
        return [
            FieldViolation(
                field,
                f"{show(uri)} is not allowed; {absolute}, without a scheme and without ..; or upload the files",
                Reason.PATH_NOT_ALLOWED,
            )
        ]
    return []


def _check_objects(field: str, uri: str) -> list[FieldViolation]:
    try:
        parse(uri)
    except ValueError as error:
        # Not repeated if it may have keys of the object store in it.
        shown = f"{show(uri)}: " if "@" not in uri.split("/", 3)[2] else ""
        text = f"{shown}{error}; write s3://bucket/key of an object, or s3://bucket/prefix/ of all below it"
        return [FieldViolation(field, text, Reason.ADDRESS_NOT_ALLOWED)]
    return []


def check_target(field: str, uri: str) -> list[FieldViolation]:
    """The errors in the text of an address to write to; whether it is allowed is checked later."""
    if complaint := control_complaint(uri):
        return [FieldViolation(field, complaint)]
    if not is_remote(uri):
        text = f"{show(uri)} is not an address of an object store; write s3://bucket/prefix"
        return [FieldViolation(field, text, Reason.ADDRESS_NOT_ALLOWED)]
    if found := _check_objects(field, uri):
        return found
    if parse(uri).digest:
        return [FieldViolation(field, f"{show(uri)} has a digest, which is of objects that are there; leave it out")]
    return []


def not_there(field: str, uri: str, beside: Sequence[str]) -> FieldViolation:
    """The violation of a path under an allowed root that leads to nothing; `beside` are names in the nearest folder."""
    step = f"there are {', '.join(map(show, beside))}: name one of them" if beside else "check its spelling"
    return FieldViolation(field, f"{show(uri)} is not there; {step}", Reason.PATH_NOT_ALLOWED)


def not_allowed(field: str, uri: str) -> FieldViolation:
    """The violation of a path that is not under an allowed root, or is not a regular file or folder."""
    return FieldViolation(
        field,
        f"{show(uri)} is not a regular file or folder under an allowed data root; "
        "ask the operator for a data root, or upload the files",
        Reason.PATH_NOT_ALLOWED,
    )


def check_hub(field: str, hub_id: str, revision: str, token: str) -> list[FieldViolation]:
    """The errors in the text of a Hub id, a revision, and the name of a secret."""
    found = []
    parts = hub_id.split("/")
    fits = len(parts) <= 2 and all(
        _HUB_PART.fullmatch(part) and ".." not in part and "--" not in part for part in parts
    )
    if hub_id and not fits:
        form = "it has the form name or owner/name, such as `google-bert/bert-base-uncased`"
        text = f"{show(hub_id)} is not a Hub id; {form}"
        found.append(FieldViolation(f"{field}.id", text))
    if revision and (not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision):
        text = f"{show(revision)} is not a branch, tag or commit; leave it out for the main branch"
        found.append(FieldViolation(f"{field}.revision", text))
    if token:
        try:
            secret_name(token)
        except ValueError as error:
            # Perhaps it is a token, so it is not repeated.
            text = f"{error}; a token itself is not taken, because specs are shown: the operator keeps it as a secret"
            found.append(FieldViolation(f"{field}.token", text))
    return found


def check_torch_hub(field: str, repo: str, revision: str) -> list[FieldViolation]:
    """The errors in the text of a repository of PyTorch Hub; whether its code may run is checked later."""
    if repo.startswith("/"):
        found = check_uri(f"{field}.repo", repo)
        if revision and not re.fullmatch("[0-9a-f]{64}", revision):
            text = f"{show(revision)} is not the sha256 of a folder's files; leave it out for the folder as it is"
            found.append(FieldViolation(f"{field}.revision", text))
        return found
    name, _, commit = repo.partition(":")
    parts = name.split("/")
    if len(parts) != 2 or not all(_HUB_PART.fullmatch(part) and ".." not in part for part in parts):
        form = "the absolute path of a folder with a hubconf.py, or owner/name:commit"
        return [FieldViolation(f"{field}.repo", f"{show(repo)} is not a repository; give {form}")]
    where, wanted = (f"{field}.repo", commit) if commit else (f"{field}.revision", revision)
    if not re.fullmatch("[0-9a-f]{40}", wanted):
        text = f"{show(wanted)} is not a commit, and a branch or tag may move; give the 40 digits of the commit"
        return [FieldViolation(where, text)]
    if commit and revision and commit != revision:
        text = f"{show(revision)}, but `repo` has the commit {commit}; leave one of them out"
        return [FieldViolation(f"{field}.revision", text)]
    return []


def check_name(field: str, kind: str, name: str) -> list[FieldViolation]:
    """The errors in the text of a resource name."""
    complaint = name_complaint(kind, name)
    return [FieldViolation(field, complaint)] if complaint else []


def relative_path_complaint(path: str) -> str | None:
    """The error in a path inside a folder; None if it is valid."""
    rule = "a path is relative, with /, without empty, . or .. parts and without control characters"
    if len(path) > _MAX_PATH:
        return f"{show(path)} has {len(path):,} characters; a path has at most {_MAX_PATH:,}; shorten it"
    if (size := len(path.encode())) > _MAX_PATH_BYTES:
        return f"{show(path)} takes {size:,} bytes; a path takes at most {_MAX_PATH_BYTES:,}; shorten it"
    if complaint := control_complaint(path):
        return complaint
    plain = posixpath.normpath(path) == path and "\\" not in path
    if not plain or path.split("/", maxsplit=1)[0] in ("", ".", ".."):
        return f"{show(path)} is not allowed: {rule}; correct it"
    if any(len(part.encode()) > 255 for part in path.split("/")):
        return f"{show(path)} has a part of over 255 bytes; shorten it"
    return None
