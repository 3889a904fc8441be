"""Today's service starts on what each earlier version left, loses nothing, and continues with what was unfinished."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardyard
from helpers.old_states import STATES, restore, states
from helpers.processes import running
from helpers.served import attempts_told
from shardyard_coordinator.store import migrate

MIGRATIONS = Path(migrate.__file__).parent / "migrations" / "versions"


@pytest.fixture(params=states())
def left(request: pytest.FixtureRequest) -> Iterator[Path]:
    folder = restore(request.param)
    yield folder
    shutil.rmtree(folder)


def test_what_an_earlier_version_left_is_taken_up(left: Path) -> None:
    with running(left / "state", SHARDYARD_CPUS="1") as (_, address), shardyard.Client(address) as client:
        found = {job.id: job for job in client.jobs()}
        assert sorted(found) == ["finished", "unfinished", "waiting"]
        assert found["finished"].state == "succeeded"
        told = [event.sequence for event in found["finished"].watch()]
        assert told == [*range(1, found["finished"].info.last_event_sequence + 1)]
        (model,) = client.models()
        (answer,) = model.predict(["line 1"], max_new_tokens=3)
        assert answer.text is not None
        resumed = next(told for told in attempts_told(found["unfinished"]) if told.resumed_from_step)
        assert resumed.resumed_from_step >= 2
        for job in (found["waiting"], found["unfinished"]):
            job.cancel()
            assert job.wait(timeout=60, check=False).state == "cancelled"
    assert (left / "state" / "storage" / "store-id").is_file()


def test_a_migration_is_never_changed_once_it_has_been_released() -> None:
    released = dict(line.split()[::-1] for line in (STATES / "MIGRATIONS").read_text().splitlines())
    now = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in MIGRATIONS.glob("[0-9]*.py")}
    assert now == released, "add a new migration, and a line with its sha256 and name to tests/states/MIGRATIONS"
