"""TLS: the service's certificate and key, read again when their files change, and client certificates as callers.

gRPC asks before every handshake which certificate to use. A pair that does not belong together, as while files are
being replaced, is not used: the one before it stays until both are there. Connections that are open are not touched.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from shardyard_coordinator.domain.access import CERTIFICATE_CREDENTIAL, CERTIFICATE_PREFIX, MAX_MEMBER, Caller
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.seams import Clock
from shardyard_coordinator.serve.protection import TlsFiles
from shardyard_coordinator.serve.validation.text import control_complaint

log = logging.getLogger(__name__)

# The first kind that a certificate has names its holder.
_KINDS: Final = ("peer_uri", "peer_email", "peer_dns")
_Stamp = tuple[tuple[int, int, int], ...]


class TlsUnusable(Exception):
    """The files of TLS cannot be used."""


class Tls:
    """The server's credentials. Raises: TlsUnusable if the files cannot be used at the start."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._seen = self._refused = self._stamp()
        self._first = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """With `client_ca`, only clients with a certificate of that authority are connected."""
        has_ca = self._files.client_ca is not None
        return grpc.dynamic_ssl_server_credentials(self._first, self._changed, require_client_authentication=has_ca)

    def _changed(self) -> Any:
        """The new certificate, if the files have changed and can be used; None: as before. Called by gRPC's threads."""
        try:
            stamp = self._stamp()
            if stamp in (self._seen, self._refused):
                return None
            self._refused = stamp  # Said once, not at every handshake.
            made = self._read()
        except TlsUnusable as error:
            log.warning("the TLS files cannot be used, the ones before stay: %s", error)
            return None
        self._seen = stamp
        log.warning("the TLS files have changed: new connections use them")
        return made

    def _stamp(self) -> _Stamp:
        try:
            found = [path.stat() for path in self._files.all]
        except OSError as error:
            raise _unreadable(error) from error
        return tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in found)

    def _read(self) -> Any:
        files = self._files
        try:
            certificate, key = files.certificate.read_bytes(), files.key.read_bytes()
            authority = files.client_ca.read_bytes() if files.client_ca else None
        except OSError as error:
            raise _unreadable(error) from error
        _check_pair(files, certificate, key)
        if authority is not None and not _parsed(files.client_ca, authority):
            raise TlsUnusable(f"{files.client_ca} has no certificate; give the authority's in PEM")
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authority)


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


class Certificates:
    """Recognises callers by their client certificates, which TLS has checked already."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def caller(self, context: Mapping[str, Sequence[bytes]]) -> Caller | None:
        """The holder of the connection's certificate; None: it has none. Raises: Refused CREDENTIALS_INVALID,
        CREDENTIALS_EXPIRED.
        """
        pem = context.get("x509_pem_cert")
        if not pem:
            return None
        name = next((value for kind in _KINDS for value in context.get(kind, ())), b"").decode("utf-8", "replace")
        if not name or control_complaint(name) or len(name) > MAX_MEMBER - len(CERTIFICATE_PREFIX):
            text = "the client certificate names no URI, e-mail address or DNS name as its subject; get one that does"
            raise Refused(Reason.CREDENTIALS_INVALID, text)
        caller = Caller(CERTIFICATE_PREFIX + name, CERTIFICATE_CREDENTIAL, expire_us=_expire_us(bytes(pem[0])))
        if (refused := self.verdict(caller)) is not None:
            raise refused
        return caller

    def verdict(self, caller: Caller) -> Refused | None:
        """Why a certificate is not accepted any more; None: it is. TLS itself looks at its dates once a connection."""
        if caller.expire_us > self._clock.now_us():
            return None
        return Refused(Reason.CREDENTIALS_EXPIRED, "the client certificate has expired; get a new one")


@lru_cache(maxsize=4096)
def _expire_us(pem: bytes) -> int:
    return int(x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp() * 1e6)


def _unreadable(error: OSError) -> TlsUnusable:
    return TlsUnusable(f"{error.filename}: {error.strerror}; give files of TLS that this account can read")


def _parsed(path: Path | None, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise TlsUnusable(f"{path} is not a PEM file of certificates") from error
