"""A service with authentication: callers by name, and what they may be given."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from helpers.service import Service, serving
from shardyard.v1 import auth_service_pb2 as auth
from shardyard_coordinator.serve.access import Access
from shardyard_coordinator.serve.first_admin import ensure_admin
from shardyard_coordinator.serve.oidc import Jwts
from shardyard_coordinator.serve.protection import Authentication, Issuer

ISSUER = "https://issuer.example.org"
AUDIENCE = "shardyard"


def metadata(*tokens: str) -> Any:
    """What sends these tokens with a call."""
    return tuple(("authorization", f"Bearer {token}") for token in tokens)


@dataclass
class FakeIssuer:
    """An OpenID Connect issuer without a network: its keys, and how often they were fetched."""

    keys: dict[str, Any] = field(default_factory=dict)
    fetches: int = 0
    is_away: bool = False

    def add_rsa(self, kid: str) -> None:
        """A new RSA key."""
        self.keys[kid] = rsa.generate_private_key(65537, 2048)

    def add_ec(self, kid: str) -> None:
        """A new key on P-256."""
        self.keys[kid] = ec.generate_private_key(ec.SECP256R1())

    def fetch(self, url: str) -> bytes:
        """What the issuer serves at a URL."""
        if self.is_away:
            raise OSError("nobody answers")
        if url.endswith("/openid-configuration"):
            return json.dumps({"issuer": ISSUER, "jwks_uri": f"{ISSUER}/keys"}).encode()
        self.fetches += 1
        return json.dumps({"keys": [_jwk(kid, key) for kid, key in self.keys.items()]}).encode()

    def token(self, kid: str, now_s: float, headers: dict[str, Any] | None = None, **claims: Any) -> str:
        """A JWT that is right, except for the headers and claims given; a claim that is None is left out."""
        is_rsa = isinstance(self.keys[kid], rsa.RSAPrivateKey)
        given = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": int(now_s) + 600, **claims}
        payload = {name: value for name, value in given.items() if value is not None}
        algorithm = "RS256" if is_rsa else "ES256"
        return jwt.encode(payload, self.keys[kid], algorithm=algorithm, headers={"kid": kid, **(headers or {})})


def _jwk(kid: str, key: Any) -> dict[str, Any]:
    kind = jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
    return {**json.loads(kind.to_jwk(key.public_key())), "kid": kid, "use": "sig"}


@dataclass
class Guarded:
    """A service that wants to know who calls, and the token of its first admin."""

    service: Service
    admin: str
    issuer: FakeIssuer

    @property
    def now_s(self) -> float:
        """The service's clock."""
        return self.service.clock.now_us() / 1e6

    async def token(self, principal: str, **fields: Any) -> str:
        """A new token of a principal."""
        request = auth.CreateTokenRequest(principal=principal, **fields)
        return (await self.service.auth.CreateToken(request, metadata=metadata(self.admin))).secret

    async def grant(self, member: str, role: str, project: str = "default") -> auth.RoleBinding:
        """Gives a role."""
        request = auth.CreateRoleBindingRequest(
            parent=f"projects/{project}", member=member, role=auth.Role.Value(f"ROLE_{role.upper()}")
        )
        return await self.service.auth.CreateRoleBinding(request, metadata=metadata(self.admin))

    async def member(self, principal: str, role: str, project: str = "default") -> str:
        """A principal with a role; its token."""
        await self.grant(principal, role, project)
        return await self.token(principal)


@contextlib.asynccontextmanager
async def guarded(folder: Path, **options: Any) -> AsyncIterator[Guarded]:
    """A service with authentication by tokens and JWTs, and its first admin; `options` are those of `serving`."""
    issuer = FakeIssuer()

    def access(clock: Any) -> Access:
        known = Issuer(ISSUER, AUDIENCE)
        return Access(Authentication(is_required=True, issuer=known), clock, Jwts(known, clock, issuer.fetch))

    async with serving(folder, access=access, **options) as service:
        path = await ensure_admin(service.store, folder, service.clock)
        assert path is not None and path.stat().st_mode & 0o777 == 0o600
        await service.access.reload()
        yield Guarded(service, path.read_text().strip(), issuer)
