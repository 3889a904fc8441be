"""Where a call comes from, as the HTTP door says it and as the service reads it."""

from __future__ import annotations

from typing import Any

import pytest

from shardyard_coordinator.domain.access import ANONYMOUS
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.serve.call import Call
from shardyard_coordinator.serve.certificates import Holder
from shardyard_coordinator.serve.origin import KEY, Origins, claim, peer_of


class Context:
    """A call's context with this metadata, over a connection without TLS."""

    def __init__(self, *metadata: tuple[str, str | bytes]) -> None:
        self._metadata = metadata

    def invocation_metadata(self) -> Any:
        return self._metadata

    def auth_context(self) -> Any:
        return {}


def call(peer: str) -> Call:
    return Call("/x", ANONYMOUS, "1", None, peer)


@pytest.mark.parametrize("host", ["10.1.2.3", "::1", "fe80::1%eb0", "2001:db8::7"])
def test_an_address_arrives_as_it_was_said(host: str) -> None:
    origins = Origins()
    found = origins.locate(call("unix:"), Context(claim(origins.secret, peer_of(host, 5), None)))
    assert found.host == host and found.holder is None


def test_the_holder_of_a_certificate_arrives_in_any_language_and_cut_if_it_is_far_too_long() -> None:
    origins = Origins()
    for name, arrives in (("spiffe://example.org/größe", "spiffe://example.org/größe"), ("n" * 50_000, "n" * 1000)):
        metadata = claim(origins.secret, peer_of("::1", 5), Holder(name, 7))
        assert origins.locate(call("unix:"), Context(metadata)).holder == Holder(arrives, 7)
        assert len(metadata[1]) < 4096


def test_over_the_network_nothing_is_claimed_even_with_the_secret() -> None:
    origins = Origins()
    metadata = claim(origins.secret, peer_of("6.6.6.6", 5), Holder("alice", 7))
    found = origins.locate(call("ipv4:127.0.0.1:9"), Context(metadata))
    assert (found.host, found.holder) == ("127.0.0.1", None)


@pytest.mark.parametrize("value", [b"", b"{}", b"null", b"7", b'{"secret": 7, "peer": "x", "holder": null}', "text"])
def test_on_the_doors_socket_only_the_door_is_heard(value: str | bytes) -> None:
    with pytest.raises(Refused, match="HTTP door"):
        Origins().locate(call("unix:"), Context((KEY, value)))
