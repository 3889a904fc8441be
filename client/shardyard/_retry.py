"""When a call is retried, and how a channel is configured: one place for both clients.

Unary calls are repeated by gRPC itself (service config). A stream that broke after its first message is not: there the
iterator reconnects, with a `Patience` that starts again whenever something arrived.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import random
import time
from typing import Any

from shardyard._text import is_utf8, not_utf8
from shardyard.errors import Internal, RequestError, Unavailable, from_rpc, invalid

DEFAULT_ADDRESS = "127.0.0.1:7400"
# Name schemes of gRPC that have no port of their own, or may leave it out.
_NAMED = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "xds:")
RECONNECT_REASONS = frozenset({"SLOW_CONSUMER", "TOO_MANY_WATCHERS", "OVERLOADED", "DRAINING"})
TRANSPORT_CODES = frozenset({"INTERNAL", "UNKNOWN", "CANCELLED"})
RETRY_AFTER_REASONS = frozenset({"INSPECTION_UNAVAILABLE", "OVERLOADED", "RATE_LIMITED"})
# Outages this short are not reported: a coordinator restarts within this time.
_QUIET_S = 2.0
# A unary call that the service keeps deferring is reported to its caller.
_PUT_OFF_S = 60.0
# No message of a request or an answer is larger.
_MESSAGE_BYTES = 16 * 2**20

_log = logging.getLogger("shardyard")


class Patience:
    """How long a broken stream is reopened: full jitter between tries, a time limit that counts from the last progress.

    With `limit_s` 0 the first failure is final.
    """

    def __init__(self, limit_s: float, address: str, *, base_s: float = 0.05, longest_s: float = 10.0) -> None:
        self._limit_s = limit_s
        self._address = address
        self._base_s = base_s
        self._longest_s = longest_s
        self._failures = 0
        self._since = 0.0
        self._has_logged = False

    def progressed(self) -> None:
        """Something arrived: the next failure counts as the first again."""
        self._failures = 0
        self._has_logged = False

    def after(self, error: Any) -> float:
        """Seconds to wait before the next try.

        Raises: the error, as one of ours, if trying again would not help, or the patience is over, or would be
        before the time that the service asks to wait.
        """
        ours = error if isinstance(error, RequestError) else from_rpc(error, address=self._address)
        if not self._worth_a_try(ours):
            raise ours from None
        now = time.monotonic()
        if self._failures == 0:
            self._since = now
        left_s, asked_s = self._since + self._limit_s - now, ours.retry_after or 0.0
        if self._limit_s <= 0 or left_s < asked_s or left_s < 0:
            raise ours from None
        if max(now - self._since, asked_s) > _QUIET_S and not self._has_logged:
            self._has_logged = True
            log_retry(ours, left_s)
        self._failures += 1
        delay = random.uniform(0, min(self._longest_s, self._base_s * 2 ** min(self._failures, 10)))
        return max(delay, asked_s)

    @staticmethod
    def _worth_a_try(error: RequestError) -> bool:
        if error.reason:
            return isinstance(error, Unavailable) or error.reason in RECONNECT_REASONS
        # An error without a reason comes from the transport, not from the service.
        return isinstance(error, Unavailable | Internal) or error.code in TRANSPORT_CODES


def retry_delay(error: RequestError, waited_s: float, limit_s: float) -> float | None:
    """Seconds until a unary call may be repeated as the service asked; None: it is not to be repeated."""
    if error.reason not in RETRY_AFTER_REASONS or error.retry_after is None:
        return None
    delay = error.retry_after * random.uniform(1.0, 1.25)
    return delay if waited_s + delay <= put_off_s(limit_s) else None


def put_off_s(limit_s: float) -> float:
    """For how long a client that reopens streams for `limit_s` seconds repeats a unary call."""
    return min(limit_s, _PUT_OFF_S)


def log_retry(error: RequestError, left_s: float) -> None:
    """Logs why there is no answer yet, as a warning of the logger `shardyard`: Python prints it without a handler."""
    reason = f"{error.reason}: " if error.reason and error.reason not in error.message else ""
    _log.warning("%s%s (trying again for up to %.0f s)", reason, error.message, max(left_s, 0.0))


def channel_options(address: str, methods: list[tuple[str, str]]) -> list[tuple[str, Any]]:
    """Keep-alive, message sizes and the retry policy of the (service, method) pairs that may be repeated.

    An address on this machine is reached directly: a proxy of the environment (`http_proxy`) leads elsewhere.
    """
    config = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{"service": service, "method": method} for service, method in methods],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
        # Five failures of an outage must not take the retries of the calls that follow.
        "retryThrottling": {"maxTokens": 100, "tokenRatio": 1},
    }
    return [
        ("grpc.service_config", json.dumps(config)),
        ("grpc.enable_retries", 1),
        ("grpc.enable_http_proxy", 0 if is_loopback(address) else 1),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", _MESSAGE_BYTES),
        # gRPC's own 256 KiB would let no larger request be repeated: a picture, or many texts.
        ("grpc.per_rpc_retry_buffer_size", _MESSAGE_BYTES),
        # However long the service was away, the channel tries to connect at least once while gRPC repeats a call
        # (1.2 s or more, as above): the first call after a restart has an answer.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 500),
        # Not a pause, whatever its name: how long one try may take. Over a tunnel it takes two round trips.
        ("grpc.min_reconnect_backoff_ms", 2_000),
    ]


def check_address(address: str) -> None:
    """HOST:PORT, or one of the schemes of gRPC's names. Raises: InvalidArgument."""
    if not is_utf8(address):
        raise invalid("address", not_utf8(address))
    scheme, colon, rest = address.partition("://")
    if colon and scheme in ("http", "https", "grpc"):
        raise invalid("address", f"`{address}` begins with a scheme; give HOST:PORT alone: `{rest.rstrip('/')}`")
    if not address.startswith(_NAMED) and not address.rpartition(":")[2].isdigit():
        raise invalid("address", f"`{address}` has no port; give HOST:PORT, such as `{DEFAULT_ADDRESS}`")


def check_token(token: str | None) -> None:
    """A token is a header. Raises: InvalidArgument for one that no header can hold; it is not shown."""
    if token and not (token.isascii() and token.isprintable()):
        raise invalid("token", "has a line end, or a character that is not ASCII; copy the token again")


def is_loopback(address: str) -> bool:
    """Whether `host:port`, `[v6]:port` or `unix:path` cannot leave this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    target = address.removeprefix("ipv4:").removeprefix("ipv6:").removeprefix("dns:///").removeprefix("dns:")
    host = target[1 : target.index("]")] if target.startswith("[") and "]" in target else target.rsplit(":", 1)[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
