"""One HTTP exchange with a webhook's receiver, within a time and a size, and nothing of its answer is obeyed.

Redirects are not followed, and proxies of the environment are not used: the connection goes to an address that was
checked. TLS is verified against the URL's host.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass

import h11

from shardyard_coordinator.serve.addresses import Addresses, AddressRefused, Url, parse_url

MAX_HEADER_BYTES = 16 * 1024
MAX_BODY_BYTES = 4 * 1024
_MAX_INFORMATIONAL = 8
_READ_BYTES = 4 * 1024
_REUSED_FOR_S = 30.0
_SECONDS = re.compile(rb"[0-9]{1,6}")


@dataclass(frozen=True)
class Timeouts:
    """Seconds: for one address to accept the connection, for the answer's head, and for its body, which only decides
    whether the connection is kept."""

    connect_s: float = 10.0
    answer_s: float = 20.0
    body_s: float = 1.0


@dataclass(frozen=True)
class Answer:
    """The receiver's answer; `retry_after_s` if it asks for a delay."""

    status: int
    retry_after_s: float | None = None


class NotAnswered(Exception):
    """There was no answer; the text is for the webhook's owner."""


@dataclass
class _Open:
    """A connection that is open, and for which authority."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    http: h11.Connection
    origin: tuple[str, str]
    until_s: float


class Receiver:
    """Posts to one webhook; keeps the connection while requests follow each other."""

    def __init__(self, addresses: Addresses, tls: ssl.SSLContext, timeouts: Timeouts | None = None) -> None:
        self._addresses = addresses
        self._timeouts = timeouts or Timeouts()
        self._tls = tls
        self._open: _Open | None = None

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Sends one request. Raises: NotAnswered."""
        try:
            async with asyncio.timeout(self._timeouts.answer_s):
                answer = await self._post(parse_url(url), headers, body)
        except TimeoutError:
            self.close()
            raise NotAnswered(f"no answer within {self._timeouts.answer_s:g} s") from None
        except (OSError, h11.RemoteProtocolError, AddressRefused, ValueError) as error:
            self.close()
            raise NotAnswered(_words(error)) from None
        except BaseException:
            self.close()
            raise
        await self._read_body()
        return answer

    def close(self) -> None:
        """Closes the connection, if one is open. Idempotent."""
        if self._open is not None:
            self._open.writer.transport.abort()
            self._open = None

    async def _post(self, url: Url, headers: Mapping[str, str], body: bytes) -> Answer:
        kept = self._kept(url)
        if kept is not None:
            with contextlib.suppress(OSError, h11.RemoteProtocolError):  # Its server has closed it meanwhile.
                return await self._exchange(kept, url, headers, body)
            self.close()
        return await self._exchange(await self._connect(url), url, headers, body)

    def _kept(self, url: Url) -> _Open | None:
        kept = self._open
        if kept is None:
            return None
        if kept.origin == (url.scheme, url.authority) and time.monotonic() < kept.until_s:
            return kept
        self.close()
        return None

    async def _connect(self, url: Url) -> _Open:
        """Connects to the first address that accepts; the addresses were checked, and no name is resolved again."""
        error: OSError = OSError("no address")
        for address in await self._addresses.of(url):
            try:
                async with asyncio.timeout(self._timeouts.connect_s):
                    reader, writer = await self._stream(url, address)
            except ssl.SSLError:
                raise
            except OSError as failed:
                error = failed
                continue
            http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEADER_BYTES)
            origin = (url.scheme, url.authority)
            self._open = _Open(reader, writer, http, origin, time.monotonic() + _REUSED_FOR_S)
            return self._open
        raise error

    async def _stream(self, url: Url, address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if url.scheme == "http":
            return await asyncio.open_connection(address, url.port, limit=MAX_HEADER_BYTES)
        return await asyncio.open_connection(
            address, url.port, limit=MAX_HEADER_BYTES, ssl=self._tls, server_hostname=url.host
        )

    async def _exchange(self, kept: _Open, url: Url, headers: Mapping[str, str], body: bytes) -> Answer:
        request = h11.Request(
            method="POST",
            target=url.target,
            headers=[("host", url.authority), ("content-length", str(len(body))), *headers.items()],
        )
        http = kept.http
        sent = [http.send(each) for each in (request, h11.Data(data=body), h11.EndOfMessage())]
        kept.writer.write(b"".join(each or b"" for each in sent))
        await kept.writer.drain()
        for _ in range(_MAX_INFORMATIONAL):
            event = await _next(kept)
            if isinstance(event, h11.Response):
                return Answer(event.status_code, _retry_after_s(event))
            if not isinstance(event, h11.InformationalResponse):
                break
        raise h11.RemoteProtocolError("no response")

    async def _read_body(self) -> None:
        """Reads the rest of a short answer, so that the connection can be used again; else closes it."""
        kept, size = self._open, 0
        if kept is None:
            return
        with contextlib.suppress(TimeoutError, OSError, h11.RemoteProtocolError):
            async with asyncio.timeout(self._timeouts.body_s):
                while size <= MAX_BODY_BYTES:
                    event = await _next(kept)
                    if isinstance(event, h11.Data):
                        size += len(event.data)
                    elif isinstance(event, h11.EndOfMessage) and kept.http.our_state is h11.DONE:
                        kept.http.start_next_cycle()
                        return
                    else:
                        break
        self.close()


async def _next(kept: _Open) -> object:
    while True:
        event = kept.http.next_event()
        if event is not h11.NEED_DATA:
            return event
        data = await kept.reader.read(_READ_BYTES)
        if not data and kept.http.their_state is h11.SEND_RESPONSE:
            raise ConnectionResetError("the connection was closed without an answer")
        kept.http.receive_data(data)


def _retry_after_s(response: h11.Response) -> float | None:
    """The delay that a receiver asks for, if it is a number of seconds."""
    for name, value in response.headers:
        if name == b"retry-after" and _SECONDS.fullmatch(value):
            return float(value)
    return None


def _words(error: Exception) -> str:
    """The failure, without addresses: a caller must not learn by it what is in the service's own networks."""
    match error:
        case AddressRefused():
            return str(error)
        case ssl.SSLCertVerificationError():
            return f"the certificate was not accepted: {error.verify_message}"
        case ssl.SSLError():
            return "no TLS connection: the receiver does not speak TLS as it should"
        case socket.gaierror():
            return "the host has no address; check its name"
        case h11.RemoteProtocolError():
            return "the answer is not HTTP/1.1"
        case ConnectionRefusedError():
            return "the connection was refused: nothing listens on that port"
        case ConnectionError():
            return "the connection was closed before an answer"
        case ValueError():
            return f"the URL cannot be used: {error}"
    return "the host cannot be reached"
