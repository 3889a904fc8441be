"""Tokens on the wire, `authorization: Bearer sy_<id>_<secret>`: compared in constant time, and slow to guess.

A caller hears the same, in the same time, whether a token's id is known or not. Guesses are slowed for one address and
one id at a time: who guesses locks out nobody else.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Final

from shardyard_coordinator.domain.access import Caller, TokenRecord
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.seams import Clock
from shardyard_coordinator.serve.buckets import Buckets

SHAPE: Final = re.compile(r"sy_([a-z2-7]{12})_([A-Za-z0-9_-]{43})")
TOKEN_ID: Final = re.compile(r"[a-z2-7]{12}")
PREFIX: Final = "sy_"
_NOBODY: Final = hashlib.sha256(b"").digest()
_GUESSES: Final = 10
_GUESS_EVERY_S: Final = 10.0


def make_token() -> tuple[str, str, bytes]:
    """A new token's id, its text, which nobody can read again, and the sha256 that is kept."""
    token_id = base64.b32encode(secrets.token_bytes(8)).decode().lower()[:12]
    secret = base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
    return token_id, f"{PREFIX}{token_id}_{secret}", _digest(secret)


def bearer_of(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """The bearer token of a call; None: it has none. Raises: Refused CREDENTIALS_INVALID for two, or another scheme."""
    values = [value for key, value in metadata if key == "authorization"]
    if not values:
        return None
    if len(values) > 1:
        raise invalid("the call has two `authorization` values; send one")
    scheme, _, token = str(values[0]).partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise invalid("`authorization` is not `Bearer` and a token; send `Bearer TOKEN`")
    return token.strip()


def invalid(text: str) -> Refused:
    """The error for credentials that are not accepted; it shows nothing of them."""
    return Refused(Reason.CREDENTIALS_INVALID, text)


class TokenBook:
    """The tokens of the store, in memory."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: Mapping[str, TokenRecord] = {}
        self._guesses = Buckets(_GUESSES, 1 / _GUESS_EVERY_S, clock)

    def replace(self, tokens: Iterable[TokenRecord]) -> None:
        """Takes these from now on."""
        self._known = {token.id: token for token in tokens}

    def caller(self, text: str, host: str) -> Caller:
        """Whose token it is. Raises: Refused CREDENTIALS_INVALID, CREDENTIALS_EXPIRED, RATE_LIMITED (too many guesses).

        `host` is where the call comes from.
        """
        found = SHAPE.fullmatch(text)
        token_id, secret = found.groups() if found else ("", "")
        guesses = (host, token_id)
        if wait_s := self._guesses.wait_s(guesses):
            text = "too many calls with a wrong token; try again after the delay"
            raise Refused(Reason.RATE_LIMITED, text, retry_after_s=wait_s)
        known = self._known.get(token_id)
        # Compared even if there is nothing to compare with, so that the time does not tell which ids are known.
        is_right = hmac.compare_digest(_digest(secret), known.sha256 if known else _NOBODY)
        if known is None or not is_right:
            self._guesses.take(guesses)
            raise invalid("the token is not one of this service; ask an admin for one (`shardyard create-token`)")
        if not known.is_live(self._clock.now_us()):
            raise ended(known)
        return Caller(known.principal, known.name, scopes=known.scopes or None, expire_us=known.expire_us)

    def live(self, principal: str) -> list[TokenRecord]:
        """The tokens with which the principal can call now."""
        now_us = self._clock.now_us()
        return [each for each in self._known.values() if each.principal == principal and each.is_live(now_us)]

    def verdict(self, caller: Caller) -> Refused | None:
        """Why the token of a caller is not accepted any more; None: it is."""
        known = self._known.get(caller.credential.removeprefix("tokens/"))
        if known is None:
            return invalid("the token is gone; ask an admin for another one")
        return None if known.is_live(self._clock.now_us()) else ended(known)


def ended(token: TokenRecord) -> Refused:
    """The error for a token that was valid once, which only its holder hears."""
    how = "was revoked" if token.revoke_us else "has expired"
    return Refused(Reason.CREDENTIALS_EXPIRED, f"{token.name} {how}; ask an admin for another one")


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
