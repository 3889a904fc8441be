"""How a service is reached: its address, TLS, and who calls; from arguments, the environment, or a profile.

An address that is given is used without a profile, unless the profile is that address's: a token that was saved for one
service is never sent to another one.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from shardyard._profiles import Profile, default_profile, read_profile
from shardyard._retry import DEFAULT_ADDRESS, check_address, check_token, is_loopback
from shardyard._text import shown
from shardyard.errors import FailedPrecondition, invalid, local_file

SYSTEM = "system"
"""The `ca` that stands for the certificate authorities of this machine."""


@dataclass(frozen=True)
class Reach:
    """Where a service is, and what is needed to call it. `token_file` is read again when it changes."""

    address: str
    project: str
    token: str | None = None
    token_file: Path | None = None
    ca: str | None = None
    cert: str | None = None
    key: str | None = None

    @property
    def is_encrypted(self) -> bool:
        """Whether it is reached by TLS."""
        return self.ca is not None


def reach_of(
    address: str | None,
    token: str | None,
    project: str | None,
    *,
    ca: str | Path | None,
    cert: str | Path | None,
    key: str | Path | None,
    profile: str | None,
) -> Reach:
    """What the arguments, the environment and the profiles say, in this order. Raises: InvalidArgument."""
    entry = profile_of(address, profile)
    found = address or (entry.address if entry else None) or os.environ.get("SHARDYARD_ADDRESS") or DEFAULT_ADDRESS
    check_address(found)
    own = entry or Profile("", found)
    # The token of a profile that was asked for by name is not replaced by one that is meant for another server.
    token = token or (own.token if profile else None) or _env("SHARDYARD_TOKEN") or own.token
    file = None if token else _env("SHARDYARD_TOKEN_FILE")
    reach = Reach(
        address=found,
        project=(_env("SHARDYARD_PROJECT") or own.project or "default") if project is None else project,
        token=token,
        token_file=Path(file) if file else None,
        ca=_text(ca) or own.ca or _env("SHARDYARD_CA"),
        cert=_text(cert) or own.cert or _env("SHARDYARD_CERT"),
        key=_text(key) or own.key or _env("SHARDYARD_KEY"),
    )
    _check(reach)
    return reach


def profile_of(address: str | None, name: str | None) -> Profile | None:
    """The profile to use, if there is one. Raises: InvalidArgument."""
    if name:
        entry = read_profile(name)
        if address and address != entry.address:
            text = f"{shown(name)} is of {entry.address}, but the address {address} is given; leave one of them out"
            raise invalid("profile", text)
        return entry
    named = _env("SHARDYARD_PROFILE")
    wanted = address or _env("SHARDYARD_ADDRESS")
    chosen = read_profile(named) if named else default_profile()
    return None if chosen is None or wanted not in (None, chosen.address) else chosen


def _check(reach: Reach) -> None:
    check_token(reach.token)
    if (reach.cert is None) != (reach.key is None):
        raise invalid("cert", "a client certificate and its key go together; give both, or none")
    if reach.cert is not None and not reach.is_encrypted:
        raise invalid("ca", "is missing: a client certificate is sent over TLS alone; give the service's authority")
    has_token = reach.token is not None or reach.token_file is not None
    if has_token and not reach.is_encrypted and not is_loopback(reach.address):
        raise invalid(
            "token",
            f"`{reach.address}` is not on this machine and the connection is not encrypted: the token would be "
            "readable on the way; give --ca (SHARDYARD_CA) with the service's authority, or `system`, or use an "
            "address on loopback, such as the end of an ssh tunnel",
            reason="ADDRESS_NOT_ALLOWED",
        )


def absolute(path: str | None) -> str | None:
    """A path as it is to be saved: from wherever later commands are run."""
    return path if path in (None, SYSTEM) else str(Path(str(path)).expanduser().absolute())


class TokenFile:
    """A token in a file that others replace, as Kubernetes and credential helpers do: read again when it changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._token = ""

    def read(self) -> str:
        """The token. Raises: FailedPrecondition if there is none; InvalidArgument for what is not a token."""
        try:
            found = self._path.stat()
            if (seen := (found.st_ino, found.st_mtime_ns)) != self._seen:
                self._token, self._seen = self._path.read_text().strip(), seen
        except OSError as error:
            raise local_file(error, f"the token file {self._path}") from None
        if not self._token:
            raise FailedPrecondition(f"the token file {self._path} is empty; write a token", reason="LOCAL_FILE")
        check_token(self._token)
        return self._token


def pem_files(reach: Reach) -> tuple[bytes | None, bytes | None, bytes | None]:
    """The authority's certificates (None: those that gRPC knows), the client's key and its certificate.

    Raises: FailedPrecondition.
    """
    roots = None
    if reach.ca == SYSTEM:
        paths = ssl.get_default_verify_paths()
        if paths.cafile is not None:
            roots = _bytes(paths.cafile)
    elif reach.ca is not None:
        roots = _bytes(reach.ca)
        if b"-----BEGIN " not in roots or b"CERTIFICATE-----" not in roots:
            text = f"the file {reach.ca} has no certificate in PEM; give that of the service's authority, or `system`"
            raise FailedPrecondition(text, reason="LOCAL_FILE")
    return roots, _bytes(reach.key) if reach.key else None, _bytes(reach.cert) if reach.cert else None


def _bytes(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise local_file(error, f"the file {path}") from None


def _env(name: str) -> str | None:
    return os.environ.get(name) or None


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path) or None
