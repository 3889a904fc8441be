"""Free ports of this machine."""

from __future__ import annotations

import contextlib
import secrets
import socket


def free_port() -> int:
    """A port of the loopback interface without a listener, for a service that is started on it again later.

    Not one that the kernel gives to outgoing connections, nor one of Ray's workers: it has to stay free meanwhile.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
