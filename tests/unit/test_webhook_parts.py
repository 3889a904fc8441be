"""Addresses that webhooks may lead to, signatures, and URLs taken apart."""

from __future__ import annotations

import base64
import ipaddress

import pytest

from shardyard_coordinator.serve.addresses import Addresses, AddressRefused, is_public, parse_url
from shardyard_coordinator.serve.signing import Post, headers_of, shown_secret, signature

PRIVATE = [
    "0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.255.255", "169.254.169.254", "169.254.170.2",
    "172.16.0.1",
    "192.0.0.1", "192.168.1.1", "198.18.0.1", "203.0.113.7", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:7f00:1", "64:ff9b::7f00:1",
    "64:ff9b::a00:1", "2002:7f00:1::", "2002:a00:1::1", "2001:0:0:0:0:0:80ff:fffe", "fe80::1", "fec0::1", "fc00::1",
    "fd00:ec2::254", "ff02::1", "2001:db8::1",
]  # fmt: skip
PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "93.184.215.14",
    "2606:4700::1111",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
    "2002:808:808::1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_of_a_private_network_is_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "2130706433", "0x7f000001", "127.1", "017700000001", "localhost", "[::1]"]
)
async def test_this_machine_is_refused_however_it_is_written(host: str) -> None:
    addresses = Addresses()
    with pytest.raises((AddressRefused, OSError)):
        await addresses.of(parse_url(f"https://{host}/"))
    addresses.close()


async def test_what_the_operator_allows_is_allowed_and_no_more() -> None:
    found = {
        "inside": ["10.1.0.5"],
        "mapped": ["::ffff:10.1.0.5"],
        "beside": ["10.2.0.5"],
        "both": ["10.1.0.5", "10.2.0.5"],
    }
    addresses = Addresses(["10.1.0.0/16"], resolve=lambda host, _: found[host])
    for host in ("inside", "mapped"):
        assert await addresses.of(parse_url(f"http://{host}/")) == found[host]
    for host in ("beside", "both"):
        with pytest.raises(AddressRefused, match="not public"):
            await addresses.of(parse_url(f"https://{host}/"))
    addresses.close()


def test_a_url_is_taken_apart() -> None:
    url = parse_url("https://[2606:4700::1]:8443/a/b?c=d%20e")
    assert (url.host, url.port, url.authority, url.target) == (
        "2606:4700::1",
        8443,
        "[2606:4700::1]:8443",
        "/a/b?c=d%20e",
    )
    assert parse_url("https://example.org").target == "/" and parse_url("https://example.org?x=1").target == "/?x=1"


def test_the_signature_is_that_of_the_specification() -> None:
    """The example of the reference implementations of Standard Webhooks."""
    published = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    assert shown_secret(published) == "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    made = signature(published, "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", b'{"test": 2432232314}')
    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_every_key_signs() -> None:
    post = Post("id", "job.state", b"{}")
    headers = headers_of(post, [b"a" * 32, b"b" * 32], 1_700_000_000_999_999, agent="x")
    assert headers["webhook-timestamp"] == "1700000000"
    assert headers["webhook-signature"].split(" ") == [
        signature(key, "id", "1700000000", b"{}") for key in (b"a" * 32, b"b" * 32)
    ]
