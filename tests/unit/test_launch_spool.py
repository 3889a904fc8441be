"""The spool: dense, read by path, cut at the first damage."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.full_disk import no_room_for
from shardyard_coordinator.launch.spool import MAX_READ_BYTES, Spool, read_spool


async def test_what_was_appended_is_read_by_number_and_by_path(tmp_path: Path) -> None:
    path = tmp_path / "spool.bin"
    spool = Spool(path)
    spool.append([b"one", b"two"])
    spool.append([b"three"])
    await spool.sync()
    assert spool.last == 3
    assert spool.read(0, 10) == [b"one", b"two", b"three"]
    assert spool.read(1, 1) == [b"two"]
    assert spool.read(3, 10) == spool.read(9, 10) == []
    assert read_spool(path, after=1) == [b"two", b"three"]
    assert read_spool(path, after=0, limit=2) == [b"one", b"two"]
    spool.close()


def test_a_spool_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_spool(tmp_path / "spool.bin", after=0) == []


DAMAGE = [
    ("torn in the head", lambda blob: blob[:-8]),
    ("torn in the payload", lambda blob: blob[:-1]),
    ("another byte", lambda blob: blob[:-1] + b"!"),
    ("zeros after the end", lambda blob: blob[: -len(b"three") - 8] + bytes(4096)),
]


@pytest.mark.parametrize("damage", [row[1] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
def test_a_damaged_end_is_cut_off_and_numbering_continues_before_it(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "spool.bin"
    spool = Spool(path)
    spool.append([b"one", b"two", b"three"])
    spool.close()
    assert callable(damage)
    path.write_bytes(damage(path.read_bytes()))
    assert read_spool(path, after=0) == [b"one", b"two"]
    again = Spool(path)
    assert again.last == 2
    again.append([b"new"])
    assert again.read(0, 10) == read_spool(path, after=0) == [b"one", b"two", b"new"]
    again.close()


def test_a_read_is_bounded_in_bytes_but_never_empty(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.bin")
    large = bytes(MAX_READ_BYTES // 4 + 1)
    spool.append([large] * 10)
    assert 1 <= len(spool.read(0, 10)) < 4
    spool.append([bytes(MAX_READ_BYTES + 1)])
    assert len(spool.read(10, 10)) == 1
    spool.close()


async def test_what_has_no_room_is_not_added_and_what_is_held_is_written_when_there_is_some(tmp_path: Path) -> None:
    path = tmp_path / "spool.bin"
    spool = Spool(path)
    spool.append([b"one"])
    with no_room_for(path):
        with pytest.raises(OSError, match="No space"):
            spool.append([b"lost"])
        spool.hold([b"two"])
        assert (spool.last, spool.read(0, 10)) == (2, [b"one", b"two"])
        with pytest.raises(OSError, match="No space"):
            await spool.sync()
    assert read_spool(path, after=0) == [b"one"]
    spool.append([b"three"])
    await spool.sync()
    assert read_spool(path, after=0) == spool.read(0, 10) == [b"one", b"two", b"three"]
    spool.close()


async def test_what_an_fsync_could_not_make_durable_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "spool.bin"
    spool = Spool(path)
    spool.append([b"one"])
    await spool.sync()
    reading, writing = os.pipe()  # It takes no fsync.
    spool.append([b"two"])
    with no_room_for(path, f"/proc/self/fd/{writing}"), pytest.raises(OSError):
        await spool.sync()
    path.write_bytes(path.read_bytes()[:-5] + bytes(5))  # As a server that dropped its pages.
    await spool.sync()
    assert read_spool(path, after=0) == [b"one", b"two"]
    spool.close()
    os.close(reading)
    os.close(writing)


async def test_an_append_leaves_the_wait_for_the_disk_to_sync(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.bin")
    many = [bytes(1024)] * 6 * 1024
    spool.append(many)
    assert spool.unsynced_bytes > sum(map(len, many))
    await spool.sync()
    assert spool.unsynced_bytes == 0 and spool.read(len(many) - 1, 10) == many[-1:]
    spool.close()
