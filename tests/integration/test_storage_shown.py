"""How the storage is, as `GetServerInfo` and `doctor` say it: there, full, not mounted, or hanging."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import shardyard
from helpers.full_disk import fill, small_disk
from helpers.served import Served, served


def doctor(service: Served) -> tuple[int, dict[str, str]]:
    """Its exit status, and its finding about the storage."""
    done = service.run("shardyard", "doctor", "--json")
    [found] = [each for each in json.loads(done.stdout) if each["subject"] == "storage"]
    return done.returncode, found


def test_the_storage_is_shown_as_it_is_and_a_hanging_mount_delays_no_other_call(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    storage.mkdir(mode=0o700)
    claim, kept = storage / "store-id", tmp_path / "kept"
    with (
        served(tmp_path, "local", "--storage-root", str(storage)) as service,
        shardyard.Client(service.address) as client,
    ):
        there = client.server_info().storage
        assert there is not None and there.state == "available" and there.free_bytes > 0 and not there.message
        status, found = doctor(service)
        assert (status, found["verdict"]) == (0, "works") and "free" in found["message"]

        claim.rename(kept)
        away = client.server_info().storage
        assert away is not None and away.state == "unavailable" and "not mounted" in away.message
        assert str(tmp_path) not in away.message
        status, found = doctor(service)
        assert status != 0 and (found["verdict"], found["next_step"]) == ("broken", away.message)

        os.mkfifo(claim)  # Opening it blocks until a writer comes: like a file server that does not answer.
        for _ in range(3):
            began_s = time.monotonic()
            hanging = client.server_info().storage
            assert hanging is not None and hanging.state == "unavailable" and "does not answer" in hanging.message
            assert time.monotonic() - began_s < 10
        os.close(os.open(claim, os.O_WRONLY))
        kept.rename(claim)
        until_s = time.monotonic() + 30
        while (back := client.server_info().storage) is not None and back.state != "available":
            assert time.monotonic() < until_s, back


def test_a_full_storage_is_shown_as_full(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", 96) as disk,
        served(tmp_path, "local", "--storage-root", str(disk / "storage")) as service,
        shardyard.Client(service.address) as client,
    ):
        there = client.server_info().storage  # Answered when the service has started whole.
        assert there is not None and there.state == "available"
        fill(disk)
        full = client.server_info().storage
        assert full is not None and (full.state, full.free_bytes) == ("full", 0) and "make space" in full.message
        status, found = doctor(service)
        assert status != 0 and found["verdict"] == "broken" and found["message"].startswith("full")
