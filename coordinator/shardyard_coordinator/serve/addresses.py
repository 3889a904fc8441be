"""Where webhooks may lead: public addresses, and those that the operator allows.

A host is resolved once for each connection, every address that it has is checked, and the connection is made to one of
these addresses: a name that leads elsewhere a moment later changes nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Sequence[str]]
"""The addresses of a host; raises OSError if it has none."""
_MAX_ADDRESSES = 8
# An own pool: a name server that does not answer must not hold the threads of others.
_RESOLVERS = 32
# IPv6 addresses that contain one of IPv4, and the bits by which it is shifted.
_WITHIN = (
    (ipaddress.IPv6Network("::ffff:0:0/96"), 0),
    (ipaddress.IPv6Network("::/96"), 0),
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),
    (ipaddress.IPv6Network("64:ff9b:1::/48"), 0),
    (ipaddress.IPv6Network("2002::/16"), 80),
)


class AddressRefused(Exception):
    """A URL that leads where it may not; the text is for its owner and names no address."""


@dataclass(frozen=True)
class Url:
    """A URL taken apart: `host` without brackets, `authority` for the Host header, `target` for the request line."""

    scheme: str
    host: str
    port: int
    authority: str
    target: str


def parse_url(text: str) -> Url:
    """Raises: ValueError with the rule that the URL breaks."""
    parts = urlsplit(text)
    if not text.isascii() or not text.isprintable() or " " in text or "\\" in text:
        raise ValueError("it has characters that a URL cannot have; write them as %XX, and a host name in ASCII (xn--)")
    if parts.scheme not in ("https", "http"):
        raise ValueError("it does not begin with https://")
    if parts.username is not None or parts.password is not None:
        raise ValueError("it has a user or password; requests are signed, so that none is needed")
    if parts.fragment or text.endswith("#"):
        raise ValueError("it has a fragment (#), which is never sent")
    return _taken_apart(parts)


def _taken_apart(parts: SplitResult) -> Url:
    host = parts.hostname
    if not host or len(host) > 253 or "%" in host:
        raise ValueError("it has no host, or none that a URL can have")
    try:
        given = parts.port
    except ValueError:
        given = 0
    if given == 0:
        raise ValueError("its port is not one of 1 to 65535")
    port = given or (443 if parts.scheme == "https" else 80)
    shown = f"[{host}]" if ":" in host else host
    authority = shown if given is None else f"{shown}:{port}"
    return Url(parts.scheme, host, port, authority, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))


def resolve_host(host: str, port: int) -> Sequence[str]:
    """Asks the system."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class Addresses:
    """Looks hosts up, and refuses what is not allowed."""

    def __init__(self, allowed: Sequence[str] = (), *, resolve: Resolve = resolve_host) -> None:
        self._allowed = [ipaddress.ip_network(each, strict=False) for each in allowed]
        self._resolve = resolve
        self._threads = ThreadPoolExecutor(_RESOLVERS, thread_name_prefix="webhook-names")

    def close(self) -> None:
        """Asks no more. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def of(self, url: Url) -> list[str]:
        """The addresses to connect to, in the system's order. Raises: AddressRefused; OSError if there is none."""
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._threads, self._resolve, url.host, url.port)
        addresses = list(dict.fromkeys(found))[:_MAX_ADDRESSES]
        if not addresses:
            raise OSError("no address")
        for text in addresses:
            self._check(url, text)
        return addresses

    def _check(self, url: Url, text: str) -> None:
        address = ipaddress.ip_address(text.partition("%")[0])
        if self._is_allowed(address):
            return
        if not is_public(address):
            raise AddressRefused(
                f"`{url.host}` leads to an address that is not public; use another host, or ask the operator to "
                "allow it (`shardyard serve --webhook-allow`)"
            )
        if url.scheme != "https":
            raise AddressRefused("http sends events in clear; use https")

    def _is_allowed(self, address: Address) -> bool:
        inner = within(address) or address
        return any(inner.version == network.version and inner in network for network in self._allowed)


def is_public(address: Address) -> bool:
    """Whether an address is reachable from the whole internet, and so is not one of this machine or its networks."""
    inner = within(address)
    if inner is not None:
        return is_public(inner)
    site_local = isinstance(address, ipaddress.IPv6Address) and address.is_site_local
    return address.is_global and not (address.is_multicast or address.is_reserved or site_local)


def within(address: Address) -> Address | None:
    """The IPv4 address that an IPv6 address leads to, as in `::ffff:127.0.0.1`; None if it has none."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address.teredo is not None:
        return address.teredo[1]
    for network, shift in _WITHIN:
        if address in network and int(address) > 1:
            return ipaddress.IPv4Address(int(address) >> shift & 0xFFFFFFFF)
    return None
