"""How a service is protected, as its settings say: TLS, and how callers are recognised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Issuer:
    """Whose JWTs are accepted, for whom they must be, and which claims say who calls."""

    url: str
    audience: str
    principal_claim: str = "sub"
    groups_claim: str = "groups"


@dataclass(frozen=True)
class Authentication:
    """How callers are recognised: not at all, or by tokens, client certificates, and JWTs of an issuer."""

    is_required: bool = False
    issuer: Issuer | None = None


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: certificate chain and key of the service; of the authority whose client certificates are accepted."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    @property
    def all(self) -> tuple[Path, ...]:
        """The files that are there to be read."""
        return (self.certificate, self.key, *([self.client_ca] if self.client_ca else []))


def url_complaint(url: str) -> str | None:
    """What is wrong with the URL of an issuer or of its keys; None: nothing. http is for this machine only."""
    parts = urlsplit(url)
    is_here = parts.hostname in ("127.0.0.1", "localhost", "::1")
    if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and is_here)):
        return f"{url[:200]!r} is not an https URL; give one such as https://issuer.example.org"
    return None
