"""A way to a service on which the first answer takes its time, as over a tunnel to another continent."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def slow_link(address: str, *, first_answer_s: float) -> Iterator[str]:
    """An address that leads to `address`; on each connection, the service's first bytes arrive so much later."""
    host, _, port = address.rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as entrance:

        def lead() -> None:
            with contextlib.suppress(OSError):  # The entrance was closed.
                while True:
                    near, _ = entrance.accept()
                    far = socket.create_connection((host, int(port)))
                    for source, target, wait_s in ((near, far, 0.0), (far, near, first_answer_s)):
                        threading.Thread(target=_carry, args=(source, target, wait_s), daemon=True).start()

        threading.Thread(target=lead, daemon=True).start()
        yield f"127.0.0.1:{entrance.getsockname()[1]}"


def _carry(source: socket.socket, target: socket.socket, wait_s: float) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            time.sleep(wait_s)
            wait_s = 0.0
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
