"""TLS: the service's certificate and key, read again when their files change, and client certificates as callers.

The files are looked at before every handshake. A pair that does not belong together, as while files are
being replaced, is not used: the one before it stays until both are there. Connections that are open are not touched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, TypeVar

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from shardyard_coordinator.domain.access import CERTIFICATE_CREDENTIAL, CERTIFICATE_PREFIX, Caller, vouched_for
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.seams import Clock
from shardyard_coordinator.serve.protection import TlsFiles

log = logging.getLogger(__name__)

# The first kind that a certificate has names its holder.
_KINDS: Final = (x509.UniformResourceIdentifier, x509.RFC822Name, x509.DNSName)
_Stamp = tuple[tuple[int, int, int], ...]
_T = TypeVar("_T")


class TlsUnusable(Exception):
    """The files of TLS cannot be used."""


class Watched(Generic[_T]):
    """What `make` makes of the files of TLS, made again when they change. `make` raises TlsUnusable.

    Raises: TlsUnusable if the files cannot be used at the start.
    """

    def __init__(self, files: TlsFiles, make: Callable[[TlsFiles], _T]) -> None:
        self._files = files
        self._make = make
        self._seen = self._refused = _stamp(files)
        self.first = make(files)

    def changed(self) -> _T | None:
        """The new one, if the files have changed and can be used; None: as before."""
        try:
            stamp = _stamp(self._files)
            if stamp in (self._seen, self._refused):
                return None
            self._refused = stamp  # Said once, not at every handshake.
            made = self._make(self._files)
        except TlsUnusable as error:
            log.warning("the TLS files cannot be used, the ones before stay: %s", error)
            return None
        self._seen = stamp
        log.warning("the TLS files have changed: new connections use them")
        return made


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """The server's credentials; with `client_ca`, only clients with a certificate of that authority are connected.

    Raises: TlsUnusable.
    """
    watched = Watched(files, _configuration)
    has_ca = files.client_ca is not None
    # gRPC's threads ask before every handshake.
    return grpc.dynamic_ssl_server_credentials(watched.first, watched.changed, require_client_authentication=has_ca)


def read_pair(files: TlsFiles) -> tuple[bytes, bytes, bytes | None]:
    """Certificate chain, key, and the authority of clients, in PEM. Raises: TlsUnusable."""
    try:
        certificate, key = files.certificate.read_bytes(), files.key.read_bytes()
        authority = files.client_ca.read_bytes() if files.client_ca else None
    except OSError as error:
        raise _unreadable(error) from error
    _check_pair(files, certificate, key)
    if authority is not None and not _parsed(files.client_ca, authority):
        raise TlsUnusable(f"{files.client_ca} has no certificate; give the authority's in PEM")
    return certificate, key, authority


def _configuration(files: TlsFiles) -> Any:
    certificate, key, authority = read_pair(files)
    return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authority)


def _stamp(files: TlsFiles) -> _Stamp:
    try:
        found = [path.stat() for path in files.all]
    except OSError as error:
        raise _unreadable(error) from error
    return tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in found)


def _check_pair(files: TlsFiles, certificate: bytes, key: bytes) -> None:
    """Raises: TlsUnusable unless the key is that of the first certificate."""
    chain = _parsed(files.certificate, certificate)
    if not chain:
        raise TlsUnusable(f"{files.certificate} has no certificate; give a PEM file, the service's certificate first")
    try:
        private = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError) as error:
        raise TlsUnusable(f"{files.key} is not a private key in PEM without a password") from error
    if private.public_key() != chain[0].public_key():
        raise TlsUnusable(f"{files.key} is not the key of the certificate {files.certificate}; give both of one pair")


class Holder(NamedTuple):
    """Whom a client certificate names, and until when it is valid, in microseconds. `name` is empty: nobody."""

    name: str
    expire_us: int


@lru_cache(maxsize=4096)
def holder_of(pem: bytes) -> Holder:
    """The holder of a certificate that TLS has checked: its first URI, else e-mail address, else DNS name."""
    certificate = x509.load_pem_x509_certificate(pem)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        found = next((value for kind in _KINDS for value in names.get_values_for_type(kind)), "")
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        found = ""
    return Holder(found, int(certificate.not_valid_after_utc.timestamp() * 1e6))


class Certificates:
    """Recognises callers by the holders of their client certificates."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def caller(self, holder: Holder | None) -> Caller | None:
        """The caller; None: the connection has no certificate. Raises: Refused CREDENTIALS_INVALID,
        CREDENTIALS_EXPIRED.
        """
        if holder is None:
            return None
        principal = vouched_for(CERTIFICATE_PREFIX, holder.name)
        if principal is None:
            text = "the client certificate names no URI, e-mail address or DNS name in plain characters; get another"
            raise Refused(Reason.CREDENTIALS_INVALID, text)
        caller = Caller(principal, CERTIFICATE_CREDENTIAL, expire_us=holder.expire_us)
        if (refused := self.verdict(caller)) is not None:
            raise refused
        return caller

    def verdict(self, caller: Caller) -> Refused | None:
        """Why a certificate is not accepted any more; None: it is. TLS itself looks at its dates once a connection."""
        if caller.expire_us > self._clock.now_us():
            return None
        return Refused(Reason.CREDENTIALS_EXPIRED, "the client certificate has expired; get a new one")


def _unreadable(error: OSError) -> TlsUnusable:
    return TlsUnusable(f"{error.filename}: {error.strerror}; give files of TLS that this account can read")


def _parsed(path: Path | None, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise TlsUnusable(f"{path} is not a PEM file of certificates") from error
