"""The database of the tests' stores: a module with `ON_BOTH_STORES = True` runs on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from helpers import stores
from helpers.postgres import close_shared_server, why_not


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if getattr(metafunc.module, "ON_BOTH_STORES", False):
        metafunc.parametrize("store_kind", stores.KINDS, indirect=True)


@pytest.fixture(autouse=True)
def store_kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """The database of this test's stores; skips the test with the reason if it cannot be had."""
    kind = getattr(request, "param", None) or stores.kind()
    if kind == stores.POSTGRESQL and (reason := why_not()):
        pytest.skip(reason)
    with stores.using(kind):
        yield kind


def pytest_sessionfinish() -> None:
    close_shared_server()
