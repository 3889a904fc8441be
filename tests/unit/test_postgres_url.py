"""URLs of PostgreSQL: what is wrong with them, and that nobody reads their passwords."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from helpers.postgres import why_not
from shardyard_coordinator.launch.inherited import without_secrets as inherited
from shardyard_coordinator.settings import Settings
from shardyard_coordinator.store.postgres_url import has_password, url_complaint, without_secrets

pytestmark = pytest.mark.skipif("psycopg" in why_not(), reason=why_not())

BAD = [
    ("mysql://me:hush@host/db", "is not postgresql://"),
    ("postgresql://me:hush%zz@host/db", "cannot be read"),
    ("postgresql://me:hush@host:port/db", "port that is not a number"),
    ("postgresql://me:hush@host/db?colour=hush", "cannot be read"),
    ("postgresql://me:hush@host", "names no database"),
]


@pytest.mark.parametrize(("url", "words"), BAD)
def test_a_url_that_is_wrong_is_explained_without_its_password(url: str, words: str) -> None:
    assert words in url_complaint(url)
    with pytest.raises(ValidationError) as refused:
        Settings(store=url)  # type: ignore[arg-type]
    assert words in str(refused.value) and "hush" not in str(refused.value)


SHOWN = [
    ("postgresql://me:hush@host:5432/db", "postgresql://me@host:5432/db", True),
    ("postgres://host/db?password=hush&user=me", "postgresql://me@host/db", True),
    ("postgresql://me@a:1,b:2/db?target_session_attrs=any", "postgresql://me@a:1,b:2/db", False),
    ("postgresql:///db?host=/run/postgresql", "postgresql://%2Frun%2Fpostgresql/db", False),
]


@pytest.mark.parametrize(("url", "shown", "secret"), SHOWN)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str, secret: bool) -> None:
    assert url_complaint(url) == "" and without_secrets(url) == shown and has_password(url) is secret
    settings = Settings(store=url)  # type: ignore[arg-type]
    assert "hush" not in repr(settings)


def test_ranks_do_not_inherit_where_the_store_is() -> None:
    given = {"SHARDYARD_STORE": "postgresql://me@host/db?password=hush", "PGPASSWORD": "hush", "PATH": "/bin"}
    assert inherited(given) == {"PATH": "/bin"}


def test_a_standby_without_a_common_store_is_refused() -> None:
    with pytest.raises(ValidationError, match="--standby waits"):
        Settings(standby=True)  # type: ignore[arg-type]
