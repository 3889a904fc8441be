"""Databases of other people: languages, rights, schemas, versions and poolers; a clear error, or no difference."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from urllib.parse import quote

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text, update
from sqlalchemy.exc import DBAPIError

from helpers.core import ACTOR, new_job
from helpers.lost_commits import opened
from helpers.ports import free_port
from helpers.postgres import Server, postgres_server, wait_until
from shardyard.v1 import job_pb2
from shardyard_coordinator.domain.records import Condition, FileRecord, NewUpload, ResourceKind
from shardyard_coordinator.seams import NullTrace, SystemClock
from shardyard_coordinator.store import listing, migrate, resources, submissions, tables
from shardyard_coordinator.store.failures import StoreAway, StoreTooNew, StoreUnfit
from shardyard_coordinator.store.postgres import Postgres
from shardyard_coordinator.store.store import Store, open_store

_numbers = count()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with postgres_server() as server:
        server.execute("CREATE ROLE guest LOGIN PASSWORD 'guest-secret'")
        yield server


@pytest.fixture
def name() -> str:
    return f"database{next(_numbers)}"


async def create(store: Store, job_id: str, **fields: object) -> None:
    new = new_job(job_id, **fields)
    await store.write(lambda conn: submissions.create_job(conn, new, ACTOR, 1), ACTOR)


UNFIT = {
    "a password that is wrong": ("", "shardyard", "wrong-secret", StoreUnfit, "PGPASSWORD"),
    "no such database": (None, "shardyard", None, StoreUnfit, "createdb --encoding UTF8"),
    "no such account": ("", "nobody", None, StoreUnfit, "PGPASSWORD"),
    "another encoding": ("ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0", "shardyard", None, StoreUnfit, "is LATIN1"),
    "an account without rights": ("", "guest", "guest-secret", StoreUnfit, "give this account the rights"),
}


@pytest.mark.parametrize("case", UNFIT)
async def test_a_database_that_cannot_hold_a_store_is_named_with_the_next_step(
    server: Server, name: str, case: str
) -> None:
    options, user, password, kind, words = UNFIT[case]
    if options is not None:
        server.execute(f"CREATE DATABASE {name} {options}")
    url = server.url(name, user=user, password=password)
    with pytest.raises(kind) as failure:
        await open_store(url, SystemClock(), NullTrace())
    said = str(failure.value)
    assert words in said and said.startswith(f"postgresql://{user}@127.0.0.1:{server.port}/{name}")
    assert server.password not in said and "secret" not in said


async def test_a_password_may_have_any_signs(server: Server, name: str) -> None:
    odd = "p%40s@:/?#!ü '"
    server.execute(f"CREATE ROLE odd LOGIN PASSWORD '{odd.replace(chr(39), chr(39) * 2)}'")
    server.execute(f"CREATE DATABASE {name} OWNER odd")
    async with opened(server.url(name, user="odd", password=quote(odd, safe=""))) as store:
        await create(store, "job")
        assert odd not in store.name


async def test_a_standby_of_the_server_is_refused_in_its_own_words(server: Server, name: str) -> None:
    url = server.database(name)
    server.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    with pytest.raises(StoreAway, match="read-only"):
        await open_store(url, SystemClock(), NullTrace(), patience_s=0.0)


@pytest.mark.parametrize("foreign", ["job", "alembic_version"])
async def test_tables_of_another_program_are_left_alone(server: Server, name: str, foreign: str) -> None:
    url = server.database(name)
    server.execute(f"CREATE TABLE {foreign} (version_num text)", database=name)
    server.execute(f"INSERT INTO {foreign} VALUES ('of another program')", database=name)
    with pytest.raises(StoreUnfit, match=f"another program.*{foreign}"):
        await open_store(url, SystemClock(), NullTrace())
    listed = server.execute("SELECT relname FROM pg_class WHERE relkind = 'r' AND relname = 'lease'", database=name)
    assert listed == [] and len(server.execute(f"SELECT * FROM {foreign}", database=name)) == 1


async def test_a_store_of_a_newer_version_is_refused(server: Server, name: str) -> None:
    url = server.database(name)
    async with opened(url):
        pass
    server.execute("UPDATE alembic_version SET version_num = '9999'", database=name)
    with pytest.raises(StoreTooNew, match="9999"):
        await open_store(url, SystemClock(), NullTrace())


async def test_the_migrations_make_the_tables_that_the_code_knows(server: Server, name: str) -> None:
    async with opened(server.database(name)) as store:
        await store.read(_same_tables)


@pytest.mark.parametrize("revision", ["0001", "0004"])
async def test_a_store_of_an_earlier_version_gets_the_tables_and_rows_of_this_one(
    server: Server, name: str, revision: str
) -> None:
    icu = "LOCALE_PROVIDER icu ICU_LOCALE 'en-US'"
    server.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C.UTF-8' {icu}")
    url, long = server.url(name), random.Random(1).randbytes(6000).hex()
    described = job_pb2.Job(annotations={"Ö" * 256: "b", "ticket": "B", long: "no filter names it"})
    database = Postgres(url)
    with contextlib.closing(database.write_engine().connect()) as conn, conn.begin():
        database.check_free(conn)
        config = Config()
        config.set_main_option("script_location", str(Path(migrate.__file__).parent / "migrations"))
        config.attributes["connection"] = conn
        command.upgrade(config, revision)
        added = "INSERT INTO job (uid, project, job_id, state, description) VALUES (%s, 'default', 'old', 'FAILED', %s)"
        conn.exec_driver_sql(added, ("1" * 32, described.SerializeToString()))
    async with opened(url) as store:
        await store.read(_same_tables)
        if revision < "0004":
            for key, bound in (("Ö" * 256, "a"), ("ticket", "A")):
                after = [Condition(f"annotations.{key}", ">", bound)]
                found = await store.read(lambda conn, after=after: listing.list_jobs(conn, "default", conditions=after))
                assert [job.job_id for job in found] == ["old"]
    by_language = (
        "SELECT relname, attname FROM pg_attribute JOIN pg_class c ON c.oid = attrelid "
        "JOIN pg_collation l ON l.oid = attcollation WHERE relnamespace = 'public'::regnamespace "
        "AND relkind = 'r' AND relname <> 'alembic_version' AND collname <> 'C'"
    )
    assert server.execute(by_language, database=name) == []


def _same_tables(conn: Connection) -> None:
    assert compare_metadata(MigrationContext.configure(conn), tables.metadata) == []


async def test_texts_are_ordered_and_found_as_sqlite_does_whatever_the_databases_language(
    server: Server, name: str, tmp_path: Path
) -> None:
    icu = "LOCALE_PROVIDER icu ICU_LOCALE 'en-US'"
    server.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C.UTF-8' {icu}")
    names = ["b", "B", "a", "Ä", "ä", "_", "100%", "a b", "É", "z", "ß"]
    found = []
    for url in (server.url(name), tmp_path / "store.db"):
        async with opened(url) as store:
            for at, each in enumerate(names):
                await create(store, f"job-{at}", display_name=each, labels={"team": each} if each.isascii() else {})
            found.append(await store.read(_looked_up))
    assert found[0] == found[1]
    assert found[0][0] == sorted(names, key=str.encode)


def _looked_up(conn: Connection) -> list[list[str]]:
    def names(*conditions: Condition) -> list[str]:
        listed = listing.list_jobs(conn, "default", conditions=conditions, order_by="display_name", desc=False)
        return [job.display_name for job in listed]

    asked = [Condition("display_name", ":", each) for each in ("A", "ä", "é", "%", "_", "SS")]
    asked += [Condition("labels.team", ":", each) for each in ("B", "%")] + [Condition("display_name", ">", "a")]
    return [names(), *(names(each) for each in asked)]


async def test_a_value_that_postgresql_does_not_take_concerns_its_own_caller_only(server: Server, name: str) -> None:
    def nul(conn: Connection) -> None:
        conn.execute(update(tables.job).values(display_name="a\0b"))

    def half(conn: Connection) -> None:
        conn.execute(update(tables.job).values(display_name="\ud800"))

    def large(conn: Connection) -> None:
        conn.execute(text("UPDATE job SET priority = 9223372036854775807 + 1"))

    def long(conn: Connection) -> None:
        path = "/".join(f"{at:x}" * 40 for at in range(1000, 1100))
        files = (FileRecord(path, 1, "0" * 64),)
        upload = NewUpload(ResourceKind.DATASET, "default", "long", "1" * 32, "/d", "", "", files)
        resources.begin_upload(conn, upload, ACTOR, 1)

    async with opened(server.database(name)) as store:
        bad = [asyncio.ensure_future(store.write(each, ACTOR)) for each in (nul, half, large, long)]
        good = asyncio.ensure_future(create(store, "good", display_name="kept"))
        outcomes = await asyncio.gather(*bad, return_exceptions=True)
        await good
        kept = await store.read(lambda conn: listing.list_jobs(conn, "default")[0].display_name)
    assert [isinstance(each, Exception) for each in outcomes[:3]] == [True] * 3, outcomes
    assert kept == "kept"


async def test_a_reader_cannot_write(server: Server, name: str) -> None:
    async with opened(server.database(name)) as store:
        with pytest.raises(DBAPIError, match="read-only"):
            await store.read(lambda conn: conn.execute(update(tables.lease).values(term=5)))


async def test_a_schema_that_is_made_later_hides_no_store(server: Server, name: str) -> None:
    url = server.database(name)
    async with opened(url) as store:
        await create(store, "before")
    server.execute('CREATE SCHEMA "shardyard"', database=name)  # `"$user"` comes first in search_path.
    async with opened(url) as store:
        assert [job.job_id for job in await store.read(lambda conn: listing.list_jobs(conn, "default"))] == ["before"]
    server.execute('DROP SCHEMA "shardyard"', database=name)


async def test_the_store_can_have_a_schema_of_its_own(server: Server, name: str) -> None:
    url = server.database(name)
    server.execute("CREATE SCHEMA training", database=name)
    async with opened(f"{url}?options=-c%20search_path%3Dtraining") as store:
        await create(store, "there")
    assert server.execute("SELECT job_id FROM training.job", database=name) == [("there",)]
    assert server.execute("SELECT to_regclass('public.job')", database=name) == [(None,)]


async def test_a_server_set_to_lose_commits_is_told_otherwise(server: Server, name: str) -> None:
    url = server.database(name)
    server.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
    async with opened(url) as store:
        found = await store.write(lambda conn: conn.exec_driver_sql("SHOW synchronous_commit").scalar_one(), ACTOR)
    assert found == "on"


@contextlib.contextmanager
def pooler(server: Server, folder: Path) -> Iterator[int]:
    """pgbouncer in transaction mode, with fewer connections to the server than the store has; answers its port."""
    program = shutil.which("pgbouncer") or shutil.which("/usr/sbin/pgbouncer")
    if program is None:
        pytest.skip("pgbouncer is not installed: apt-get install pgbouncer")
    port, config = free_port(), server.folder / "pgbouncer.ini"
    (server.folder / "users.txt").write_text(f'"shardyard" "{server.password}"\n')
    config.write_text(
        f"[databases]\n* = host=127.0.0.1 port={server.port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
        f"listen_port = {port}\nunix_socket_dir =\nauth_type = plain\nauth_file = {server.folder}/users.txt\n"
        f"pool_mode = transaction\ndefault_pool_size = 4\nmax_client_conn = 50\nlogfile = {server.folder}/pooler.log\n"
    )
    account = ["-u", "postgres"] if os.geteuid() == 0 else []
    process = subprocess.Popen([program, *account, str(config)], cwd=server.folder)
    try:
        wait_until(lambda: _answers(server, port))
        yield port
    finally:
        process.terminate()
        process.wait(20)


def _answers(server: Server, port: int) -> bool:
    import psycopg

    with contextlib.suppress(psycopg.OperationalError):
        psycopg.connect(server.url("postgres").replace(f":{server.port}/", f":{port}/")).close()
        return True
    return False


async def test_a_pooler_in_transaction_mode_makes_no_difference(server: Server, name: str, tmp_path: Path) -> None:
    url = server.database(name)
    with pooler(server, tmp_path) as port:
        async with opened(url.replace(f":{server.port}/", f":{port}/")) as store:
            for at in range(20):
                await asyncio.gather(*(create(store, f"job-{at}-{each}") for each in range(4)))
                assert len(await store.read(lambda conn: listing.list_jobs(conn, "default", limit=200))) == 4 * (at + 1)
