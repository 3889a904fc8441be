"""What may be read and written elsewhere, and with which secrets: the operator's rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shardyard.remote_uris import ObjectUri, is_below

MOST_BYTES = 256 * 1024**3


@dataclass(frozen=True)
class RemoteRoot:
    """An address below which objects may be named. `secret` has its keys; empty: its requests are not signed."""

    uri: ObjectUri
    secret: str = ""


@dataclass(frozen=True)
class Remote:
    """The object store and its allowed roots, and the projects of each secret.

    Models may be written below `export_roots`. `most_bytes`: of all copies here together. An empty `endpoint` is Amazon
    S3.
    """

    roots: tuple[RemoteRoot, ...] = ()
    export_roots: tuple[RemoteRoot, ...] = ()
    endpoint: str = ""
    region: str = ""
    most_bytes: int = MOST_BYTES
    secrets: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def may_use(self, project: str, secret: str) -> bool:
        """Whether a project may use a secret; nobody may use one that is not named."""
        return project in self.secrets.get(secret, frozenset())

    def root_of(self, uri: ObjectUri, project: str) -> RemoteRoot | None:
        """The closest root above a URI; None if there is none, or the project may not use its secret."""
        root = _closest(self.roots, uri)
        return root if root is not None and (not root.secret or self.may_use(project, root.secret)) else None

    def export_root_of(self, uri: ObjectUri, project: str) -> RemoteRoot | None:
        """The closest root above a URI to write below; None likewise, for nothing is written without a secret."""
        root = _closest(self.export_roots, uri)
        return root if root is not None and self.may_use(project, root.secret) else None


def _closest(roots: Iterable[RemoteRoot], uri: ObjectUri) -> RemoteRoot | None:
    above = [root for root in roots if is_below(uri, root.uri)]
    return max(above, key=lambda each: len(each.uri.key)) if above else None
