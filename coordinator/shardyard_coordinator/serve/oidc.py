"""JWTs of one OpenID Connect issuer: signed by its keys, `iss` and `aud` exact, times with a minute's skew.

Only RS256 and ES256 with public keys: `none`, and HMAC with a public key as its secret, are not even tried. What a
header says about keys (`jwk`, `jku`, `x5u`) is not read. Keys are fetched from the issuer's discovery document, kept,
and fetched again for an unknown key id, but at most once a minute: callers with invented ids cannot make this service
call the issuer again and again.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from http.client import HTTPException, HTTPMessage
from typing import IO, Any, Final
from urllib.request import HTTPRedirectHandler, Request, build_opener

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from shardyard_coordinator.domain.access import GROUP_PREFIX, OIDC_CREDENTIAL, OIDC_PREFIX, Caller, vouched_for
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.seams import Clock
from shardyard_coordinator.serve.bearer import invalid
from shardyard_coordinator.serve.protection import Issuer, url_complaint

log = logging.getLogger(__name__)

ALGORITHMS: Final = ("RS256", "ES256")
SKEW_S: Final = 60
_TYPES: Final = ("", "jwt", "at+jwt", "application/at+jwt")
_FRESH_S: Final = 3600.0
_STALE_S: Final = 86_400.0
_AGAIN_S: Final = 60.0
_FETCH_S: Final = 10.0
_MOST_BYTES: Final = 1024 * 1024
_MOST_KEYS: Final = 100
_MOST_GROUPS: Final = 500
_MOST_TOKEN: Final = 8 * 1024
_LEAST_RSA_BITS: Final = 2048

Fetch = Callable[[str], bytes]


class Jwts:
    """Recognises callers by JWTs. `fetch` gets a URL's content; it is called in a thread."""

    def __init__(self, issuer: Issuer, clock: Clock, fetch: Fetch | None = None) -> None:
        self._issuer = issuer
        self._clock = clock
        self._keys = _Keys(issuer, clock, fetch or fetch_https)

    async def caller(self, token: str) -> Caller:
        """Whose JWT it is. Raises: Refused CREDENTIALS_INVALID, CREDENTIALS_EXPIRED, ISSUER_UNREACHABLE."""
        header = _header(token)
        key = await self._keys.get(str(header.get("kid", "")), header["alg"])
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=[header["alg"]],
                # Times are compared below, with the service's own clock.
                options={"require": ["exp"], "verify_exp": False, "verify_nbf": False, "verify_iat": False},
                issuer=self._issuer.url,
                audience=self._issuer.audience,
            )
        except jwt.InvalidIssuerError:
            raise invalid(f"the JWT is not of the issuer {self._issuer.url}; get one there") from None
        except (jwt.InvalidAudienceError, jwt.MissingRequiredClaimError):
            text = f"the JWT is not for the audience `{self._issuer.audience}`, or lacks `iss`, `aud` or `exp`"
            raise invalid(f"{text}; ask its issuer for one that is") from None
        except (jwt.PyJWTError, ValueError, TypeError):
            raise invalid("the JWT's signature is not one of its issuer; get a new one") from None
        expire_us = self._times(claims)
        return Caller(self._principal(claims), OIDC_CREDENTIAL, self._groups(claims), None, expire_us)

    def verdict(self, caller: Caller) -> Refused | None:
        """Why a caller's JWT is not accepted any more; None: it is."""
        return expired() if 0 < caller.expire_us <= self._clock.now_us() else None

    def _times(self, claims: Mapping[str, Any]) -> int:
        """Until when the JWT is accepted, in microseconds."""
        now_s = self._clock.now_us() / 1e6
        until, since = _number(claims, "exp"), _number(claims, "nbf") if "nbf" in claims else 0.0
        if until + SKEW_S <= now_s:
            raise expired()
        if since - SKEW_S > now_s:
            raise invalid("the JWT is not valid yet: its `nbf` is in the future; check the clocks")
        return int((until + SKEW_S) * 1e6)

    def _principal(self, claims: Mapping[str, Any]) -> str:
        claim = self._issuer.principal_claim
        principal = vouched_for(OIDC_PREFIX, claims.get(claim))
        if principal is None:
            raise invalid(f"the JWT's claim `{claim}` does not name its holder; the operator chooses the claim")
        # Anybody can write any address into an account that nobody has verified.
        if claim == "email" and claims.get("email_verified") is not True:
            raise invalid("the JWT's `email` is not verified (`email_verified`); verify it at the issuer")
        return principal

    def _groups(self, claims: Mapping[str, Any]) -> frozenset[str]:
        found = claims.get(self._issuer.groups_claim, ())
        names = [found] if isinstance(found, str) else found
        if not isinstance(names, list | tuple) or len(names) > _MOST_GROUPS:
            return frozenset()
        return frozenset(group for name in names if (group := vouched_for(GROUP_PREFIX, name)) is not None)


class _Keys:
    """The issuer's public keys by key id."""

    def __init__(self, issuer: Issuer, clock: Clock, fetch: Fetch) -> None:
        self._issuer = issuer
        self._clock = clock
        self._fetch = fetch
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_s = self._tried_s = float("-inf")
        self._fetching: asyncio.Task[None] | None = None

    async def get(self, kid: str, algorithm: str) -> Any:
        """The public key of that id; without an id the only one. Raises: Refused."""
        age_s = self._clock.monotonic_s() - self._fetched_s
        if age_s > _STALE_S:
            self._keys = {}  # A key that the issuer has withdrawn must not count any longer.
        if self._find(kid) is None or age_s > _FRESH_S:
            await self._refresh(wait=self._find(kid) is None)
        found = self._find(kid)
        if found is None:
            if not self._keys:
                text = f"the keys of {self._issuer.url} cannot be fetched at the moment; try again after the delay"
                raise Refused(Reason.ISSUER_UNREACHABLE, text, retry_after_s=_AGAIN_S / 4)
            raise invalid(f"the JWT's key is not one of {self._issuer.url}; get a new JWT there")
        if found.algorithm_name != algorithm:
            raise invalid("the JWT's algorithm is not that of its key; get a new JWT")
        return found.key

    def _find(self, kid: str) -> jwt.PyJWK | None:
        if kid:
            return self._keys.get(kid)
        return next(iter(self._keys.values())) if len(self._keys) == 1 else None

    async def _refresh(self, *, wait: bool) -> None:
        now_s = self._clock.monotonic_s()
        if self._fetching is None and now_s - self._tried_s >= _AGAIN_S:
            self._tried_s = now_s
            self._fetching = asyncio.create_task(self._load())
        if wait and self._fetching is not None:
            await asyncio.wait({self._fetching})

    async def _load(self) -> None:
        """Replaces the keys; after a failure the old ones stay."""
        try:
            keys = await asyncio.to_thread(self._read)
            self._keys, self._fetched_s = keys, self._clock.monotonic_s()
        except (OSError, ValueError, HTTPException, RecursionError) as error:
            log.warning("the keys of %s cannot be fetched: %s", self._issuer.url, error)
        finally:
            self._fetching = None

    def _read(self) -> dict[str, jwt.PyJWK]:
        """Raises: OSError, ValueError."""
        discovery = _json(self._fetch(f"{self._issuer.url.rstrip('/')}/.well-known/openid-configuration"))
        if discovery.get("issuer") != self._issuer.url:
            raise ValueError(f"its discovery document is of the issuer {str(discovery.get('issuer'))[:200]!r}")
        found = _json(self._fetch(str(discovery.get("jwks_uri")))).get("keys")
        if not isinstance(found, list):
            raise ValueError("its key set has no keys")
        read = (_key(each) for each in found[:_MOST_KEYS])
        return {key.key_id or "": key for key in read if key is not None}


def expired() -> Refused:
    """The error for a JWT that was valid once."""
    return Refused(Reason.CREDENTIALS_EXPIRED, "the JWT has expired; get a new one of its issuer")


def fetch_https(url: str) -> bytes:
    """The content of an https URL, or of an http one on this machine: at most 1 MiB, without redirects elsewhere.

    Raises: OSError, ValueError.
    """
    if complaint := url_complaint(url):
        raise ValueError(complaint)
    with build_opener(_NoRedirect).open(url, timeout=_FETCH_S) as answer:
        data: bytes = answer.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{url} has over {_MOST_BYTES:,} bytes")
    return data


class _NoRedirect(HTTPRedirectHandler):
    """Follows no redirect: it would lead to a URL that nobody has checked."""

    def redirect_request(  # noqa: PLR0917 - As its base declares it.
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        """Refuses the redirect."""


def _json(data: bytes) -> dict[str, Any]:
    found = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def _key(data: Any) -> jwt.PyJWK | None:
    """A key for signatures of the two algorithms, strong enough; None for any other."""
    if not isinstance(data, dict) or data.get("use", "sig") != "sig" or data.get("kty") not in ("RSA", "EC"):
        return None
    algorithm = data.get("alg") or ("RS256" if data["kty"] == "RSA" else "ES256")
    if algorithm not in ALGORITHMS:
        return None
    try:
        key = jwt.PyJWK(data, algorithm=algorithm)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    is_strong = isinstance(key.key, RSAPublicKey) and key.key.key_size >= _LEAST_RSA_BITS
    is_curve = isinstance(key.key, EllipticCurvePublicKey) and isinstance(key.key.curve, SECP256R1)
    return key if (is_strong and algorithm == "RS256") or (is_curve and algorithm == "ES256") else None


def _header(token: str) -> dict[str, Any]:
    """The header of a JWT, as far as it is read: algorithm and key id. Raises: Refused."""
    if len(token) > _MOST_TOKEN or token.count(".") != 2:
        raise invalid("the bearer token is neither one of this service nor a JWT; log in again")
    try:
        header = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
        raise invalid("the JWT cannot be read; get a new one") from None
    if header.get("alg") not in ALGORITHMS:
        raise invalid(f"the JWT is not signed with {' or '.join(ALGORITHMS)}; get one that is")
    if "crit" in header or str(header.get("typ", "")).lower() not in _TYPES:
        raise invalid("the JWT is of a kind that is not accepted here (`typ`, `crit`); use an ID or access token")
    return header


def _number(claims: Mapping[str, Any], name: str) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e11:
        raise invalid(f"the JWT's `{name}` is not a time; get a new one")
    return float(value)
