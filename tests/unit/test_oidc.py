"""JWTs of an issuer: which claim names the holder, and where keys are fetched from."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.clock import ManualClock
from helpers.guarded import AUDIENCE, ISSUER, FakeIssuer
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.serve.oidc import Jwts, fetch_https
from shardyard_coordinator.serve.protection import Issuer


def jwts(issuer: FakeIssuer, clock: ManualClock, **claims: str) -> Jwts:
    return Jwts(Issuer(ISSUER, AUDIENCE, **claims), clock, issuer.fetch)


@pytest.fixture
def issuer() -> FakeIssuer:
    made = FakeIssuer()
    made.add_ec("ec")
    return made


async def test_an_address_counts_only_if_the_issuer_has_verified_it(issuer: FakeIssuer) -> None:
    clock = ManualClock()
    known, now_s = jwts(issuer, clock, principal_claim="email"), clock.now_us() / 1e6
    claims: dict[str, Any] = {"email": "alice@example.org"}
    for verified in ({}, {"email_verified": False}, {"email_verified": "false"}, {"email_verified": "true"}):
        with pytest.raises(Refused, match="not verified"):
            await known.caller(issuer.token("ec", now_s, **claims, **verified))
    caller = await known.caller(issuer.token("ec", now_s, **claims, email_verified=True))
    assert caller.principal == "oidc:alice@example.org"


@pytest.mark.parametrize("groups", [None, 7, {"a": 1}, [f"g{n}" for n in range(501)]], ids=["none", "7", "map", "many"])
async def test_groups_that_are_no_list_of_names_are_not_read(issuer: FakeIssuer, groups: Any) -> None:
    clock = ManualClock()
    token = issuer.token("ec", clock.now_us() / 1e6, teams=groups)
    assert (await jwts(issuer, clock, groups_claim="teams").caller(token)).groups == frozenset()


async def test_one_group_may_be_a_text(issuer: FakeIssuer) -> None:
    clock = ManualClock()
    token = issuer.token("ec", clock.now_us() / 1e6, groups="nlp")
    assert (await jwts(issuer, clock).caller(token)).groups == {"group:nlp"}


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "http://169.254.169.254/keys", "ftp://host/x", "https:///keys", "data:,{}", "None"]
)
def test_keys_are_fetched_by_https_only(url: str) -> None:
    with pytest.raises(ValueError, match="https"):
        fetch_https(url)


async def test_a_document_of_another_issuer_gives_no_keys(issuer: FakeIssuer) -> None:
    clock = ManualClock()
    documents = {
        "openid-configuration": {"issuer": "https://evil.example.org", "jwks_uri": f"{ISSUER}/keys"},
        "keys": json.loads(issuer.fetch(f"{ISSUER}/keys")),
    }

    def fetch(url: str) -> bytes:
        return json.dumps(documents[url.rpartition("/")[2]]).encode()

    known = Jwts(Issuer(ISSUER, AUDIENCE), clock, fetch)
    token = issuer.token("ec", clock.now_us() / 1e6)
    with pytest.raises(Refused, match="cannot be fetched"):
        await known.caller(token)
    documents["openid-configuration"]["issuer"] = ISSUER
    clock.advance(61)
    assert (await known.caller(token)).principal == "oidc:alice"


@pytest.mark.parametrize(
    "change", [{"use": "enc"}, {"alg": "HS256"}, {"kty": "oct", "k": "c2VjcmV0"}, {"crv": "P-384"}]
)
async def test_keys_that_are_for_something_else_are_passed_over(issuer: FakeIssuer, change: dict[str, str]) -> None:
    clock = ManualClock()
    keys = json.loads(issuer.fetch(f"{ISSUER}/keys"))
    keys["keys"][0] |= change

    def fetch(url: str) -> bytes:
        return json.dumps(keys).encode() if url.endswith("/keys") else issuer.fetch(url)

    with pytest.raises(Refused):
        await Jwts(Issuer(ISSUER, AUDIENCE), clock, fetch).caller(issuer.token("ec", clock.now_us() / 1e6))
