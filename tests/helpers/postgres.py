"""A private PostgreSQL server: made in a folder of its own, reached by this machine only, gone at the end."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.ports import free_port

START_S = 300.0  # A busy machine may take minutes; nobody waits that long for a server that fails.
_ACCOUNT = "postgres"


@functools.cache
def binaries() -> Path | None:
    """The folder of Debian's newest PostgreSQL, or of the one in PATH; None without either."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


@functools.cache
def why_not() -> str:
    """Why no server can be started here; empty if one can."""
    if binaries() is None:
        return "PostgreSQL is not installed: apt-get install postgresql"
    try:
        import psycopg  # noqa: F401 - only whether it is there.
    except ImportError:
        return "psycopg is not installed: pip install 'shardyard[postgres]'"
    if os.geteuid() == 0:
        try:
            pwd.getpwnam(_ACCOUNT)
        except KeyError:
            return f"initdb refuses root, and there is no account `{_ACCOUNT}` to run it as"
    return ""


@dataclass
class Server:
    """A server with one account, which owns everything."""

    folder: Path
    port: int = field(default_factory=free_port)
    password: str = field(default_factory=lambda: secrets.token_hex(8))

    def url(self, database: str, *, user: str = "shardyard", password: str | None = None) -> str:
        return f"postgresql://{user}:{password or self.password}@127.0.0.1:{self.port}/{database}"

    def make(self) -> None:
        """Makes the folder of the server's files."""
        self._own(self.folder)
        secret = self.folder / "password"
        secret.write_text(self.password)
        self._own(secret)
        self._run(
            "initdb", "--pgdata", self.data, "--username", "shardyard", "--auth", "scram-sha-256", "--no-sync",
            "--pwfile", secret, "--encoding", "UTF8", "--locale", "C.UTF-8", "--no-instructions",
        )  # fmt: skip

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def start(self, *settings: str) -> None:
        """Returns when it answers."""
        options = [f"port={self.port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={self.folder}"]
        options += ["shared_buffers=32MB", "max_connections=60", *settings]
        flags = " ".join(f"-c {option}" for option in options)
        log = self.folder / "server.log"
        self._run("pg_ctl", "start", "--wait", "--pgdata", self.data, "--log", log, "--options", flags)

    def stop(self, mode: str = "fast") -> None:
        """`immediate` is as a crash."""
        with contextlib.suppress(subprocess.CalledProcessError):  # It is down already.
            self._run("pg_ctl", "stop", "--wait", "--pgdata", self.data, "--mode", mode)

    def signal(self, number: signal.Signals) -> None:
        """To the server's first process."""
        os.kill(int((self.data / "postmaster.pid").read_text().splitlines()[0]), number)

    def execute(self, statement: str, *, database: str = "postgres", values: Sequence[Any] = ()) -> list[Any]:
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as conn:
            cursor = conn.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    def database(self, name: str, *, template: str = "template1") -> str:
        """The URL of a database, which is made if it is not there."""
        if not self.execute("SELECT 1 FROM pg_database WHERE datname = %s", values=[name]):
            self.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return self.url(name)

    def with_tables(self) -> str:
        """The name of a database with the store's tables, to make others from: migrations take longer than a copy."""
        from shardyard_coordinator.seams import NullTrace
        from shardyard_coordinator.store.migrate import migrate
        from shardyard_coordinator.store.postgres import Postgres

        name = "with-tables"
        database = Postgres(self.database(name))
        with contextlib.closing(database.write_engine().connect()) as conn, conn.begin():
            database.check_free(conn)  # It lets a transaction of migrations take its time.
            migrate(conn, NullTrace())
        return name

    def _own(self, path: Path) -> None:
        if os.geteuid() == 0:
            shutil.chown(path, _ACCOUNT, pwd.getpwnam(_ACCOUNT).pw_gid)

    def _run(self, program: str, *arguments: object) -> None:
        folder = binaries()
        assert folder is not None
        account: dict[str, Any] = {}
        if os.geteuid() == 0:
            entry = pwd.getpwnam(_ACCOUNT)
            account = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        command = [str(folder / program), *map(str, arguments)]
        with (self.folder / "commands.log").open("ab") as log:
            # In a file, not a pipe: the server would keep the pipe open.
            subprocess.run(command, cwd=self.folder, stdout=log, stderr=log, check=True, timeout=START_S, **account)


@contextlib.contextmanager
def postgres_server(*settings: str) -> Iterator[Server]:
    """A server that runs, and is gone at the end; skips the test with the reason if that cannot be."""
    if reason := why_not():
        import pytest  # Here: child processes of tests do not need it.

        pytest.skip(reason)
    # Not in pytest's folders: those are for this account only.
    folder = Path(tempfile.mkdtemp(prefix="sy-pg-", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")))
    folder.chmod(0o755)
    server = Server(folder)
    try:
        server.make()
        server.start(*settings)
        yield server
    finally:
        server.stop("immediate")
        shutil.rmtree(folder, ignore_errors=True)


_shared: list[tuple[Server, contextlib.ExitStack]] = []


def shared_server() -> Server:
    """One server for the whole test run, which `close_shared_server` ends."""
    if not _shared:
        stack = contextlib.ExitStack()
        _shared.append((stack.enter_context(postgres_server()), stack))
    return _shared[0][0]


def close_shared_server() -> None:
    while _shared:
        _shared.pop()[1].close()


def database_of(folder: Path, *, template: str = "") -> str:
    """The URL of the database that belongs to a folder, the same each time; without a template it has tables."""
    name = f"{folder.name[:30]}-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}".lower()
    return shared_server().database(name, template=template or _template())


@functools.cache
def _template() -> str:
    return shared_server().with_tables()


def wait_until(test: Any, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not test():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
