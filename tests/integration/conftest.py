"""One workplace for tests that leave each other's files and jobs alone: its service takes seconds to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from helpers.workplace import Workplace, workplace


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with workplace(tmp_path_factory.mktemp("place")) as place:
        yield place
