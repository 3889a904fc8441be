"""The operator's settings of object stores and secrets: their text, and what they mean together."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from shardyard.remote_uris import SECRET, is_secret_name, parse, secret_name
from shardyard_coordinator.control.remote import Remote, RemoteRoot
from shardyard_coordinator.launch.confine import open_paths
from shardyard_coordinator.serve.validation.text import id_complaint

_REGION = re.compile(r"[a-z0-9-]{1,64}")


def remote_complaint(name: str, value: str | Sequence[str]) -> str:
    """The error in one setting's text; empty: none."""
    if isinstance(value, str):
        return _text_complaint(name, value)
    check = _CHECKS[name]
    missing = "objects need further packages; install them with: pip install 'shardyard[s3]'"
    if check is not _secret_complaint and value and find_spec("s3fs") is None:
        return missing
    return next(filter(None, map(check, value)), "")


def secrets_complaint(remote: Remote, projects: Collection[str]) -> str:
    """What is wrong between the settings: a secret that nobody may use, or a project that does not exist."""
    for name, users in remote.secrets.items():
        if unknown := sorted(users - set(projects)):
            return f"--secret {name}={unknown[0]}: there is no such project; correct it, or add --project {unknown[0]}"
    reads = (("--remote-root", "read", root) for root in remote.roots)
    writes = (("--remote-export-root", "write", root) for root in remote.export_roots)
    for option, does, root in (*reads, *writes):
        if root.secret and root.secret not in remote.secrets:
            return (
                f"{option} {root.uri.address} needs the secret {root.secret}, which no project may use; add "
                f"--secret {root.secret}=PROJECT for each project that may {does} it"
            )
    return ""


def remote_of(
    roots: Sequence[str],
    export_roots: Sequence[str],
    secrets: Sequence[str],
    endpoint: str,
    region: str,
    *,
    most_bytes: int,
) -> Remote:
    """The rules of valid settings."""
    users: dict[str, set[str]] = defaultdict(set)
    for name, _, project in (each.partition("=") for each in secrets):
        users[name].add(project)
    return Remote(
        tuple(map(_root, roots)),
        tuple(map(_root, export_roots)),
        endpoint.rstrip("/"),
        region,
        most_bytes,
        {name: frozenset(projects) for name, projects in users.items()},
    )


def _root(text: str) -> RemoteRoot:
    address, equals, secret = text.rpartition(f"={SECRET}")
    return RemoteRoot(parse(address), secret_name(SECRET + secret)) if equals else RemoteRoot(parse(text))


def _root_complaint(text: str) -> str:
    try:
        root = _root(text)
    except ValueError as error:
        return f"a remote root: {error}; give s3://BUCKET/PREFIX, or s3://BUCKET/PREFIX=secret://NAME"
    return f"the remote root {root.uri.address} has a digest; leave it out" if root.uri.digest else ""


def _export_root_complaint(text: str) -> str:
    if complaint := _root_complaint(text):
        return complaint
    root = _root(text)
    need = f"nothing is written to {root.uri.address} without keys; give {root.uri.address}=secret://NAME"
    return "" if root.secret else need


def _secret_complaint(text: str) -> str:
    name, equals, project = text.partition("=")
    rule = "give NAME=PROJECT, once for each project that may use the secret; its value is a file of that name"
    if not equals or not is_secret_name(name):
        return f"a secret: {rule}"  # Not repeated: it may be the value.
    return f"--secret {name}: {complaint}" if (complaint := id_complaint(project)) else ""


_CHECKS = {
    "remote_roots": _root_complaint,
    "remote_export_roots": _export_root_complaint,
    "secrets": _secret_complaint,
}


def _text_complaint(name: str, value: str) -> str:
    if name == "s3_region":
        return "" if not value or _REGION.fullmatch(value) else f"{value!r} is not a region; give one such as eu-west-1"
    rule = "is not a URL of an object store; give https://HOST or http://HOST:PORT, without keys in it"
    try:
        parts = urlsplit(value)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.path in ("", "/")
        is_right = is_right and not (parts.username or parts.password or parts.query or parts.fragment)
        _ = parts.port
    except ValueError:
        is_right = False
    return "" if not value or is_right else f"the endpoint {rule}"


def folder_complaint(folder: Path, open_to_jobs: Iterable[str], hidden: str) -> str:
    """What is wrong with a folder of secrets: jobs, or the processes that open clients' files, could read it."""
    readable = [*open_to_jobs, *open_paths(hidden)]
    if not any(Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(path)) for path in readable):
        return ""
    return f"--secrets-dir {folder} can be read by jobs; give a folder outside of data roots, storage and programs"
