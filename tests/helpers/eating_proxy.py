"""A TCP proxy before a PostgreSQL server that can lose a connection at COMMIT, before or after the server hears it."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterator

_COMMIT = b"COMMIT\0"  # Not the COMMIT of READ COMMITTED.
_WAIT_S = 5.0


class EatingProxy:
    """`eats()` decides for each COMMIT: "" passes it on, "before" drops it unheard, "after" drops its reply."""

    def __init__(self, port: int, eats: Callable[[], str]) -> None:
        self._port = port
        self._eats = eats
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._door.getsockname()[1])
        self.eaten = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._door.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._door.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port)) as server:
            while self._turn(client, server):
                pass

    def _turn(self, client: socket.socket, server: socket.socket) -> bool:
        """Carries what has come; False once the connection is to be lost."""
        ready, _, _ = select.select([client, server], [], [])
        if server in ready:
            data = server.recv(1 << 16)
            client.sendall(data)
            if not data:
                return False
        if client in ready:
            data = client.recv(1 << 16)
            fate = self._eats() if _COMMIT in data else ""
            if fate == "before" or not data:
                self.eaten += bool(data)
                return False
            server.sendall(data)
            if fate == "after":
                self.eaten += 1
                server.settimeout(_WAIT_S)
                server.recv(1 << 16)  # The commit has happened.
                return False
        return True


@contextlib.contextmanager
def eating_proxy(port: int, eats: Callable[[], str]) -> Iterator[EatingProxy]:
    proxy = EatingProxy(port, eats)
    try:
        yield proxy
    finally:
        proxy.close()
