"""Tokenised data in the cache: the budget, and what is never given up."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shardyard_trainer.data.budget import BUDGET_VARIABLE, evict, in_use, tokenised
from shardyard_trainer.data.store import build_once


def made(cache: Path, name: str, *, age_s: int, size: int = 1000) -> Path:
    """A folder that no process reads."""
    folder = cache / "corpora" / name
    folder.mkdir(parents=True)
    (folder / "tokens.bin").write_bytes(b"x" * size)
    at = 1_700_000_000 - age_s
    os.utime(folder, (at, at))
    return folder


def test_what_was_used_longest_ago_is_given_up_until_the_rest_fits(tmp_path: Path) -> None:
    old, older, new = (made(tmp_path, name, age_s=age) for name, age in (("old", 5), ("older", 9), ("new", 1)))
    assert evict(tmp_path, most_bytes=2500) == [older]
    assert evict(tmp_path, most_bytes=1500) == [old]
    assert new.exists() and evict(tmp_path, most_bytes=1500) == []


def test_what_a_process_reads_is_never_given_up_and_when_it_ends_may_be(tmp_path: Path) -> None:
    folder = tmp_path / "corpora" / "live"
    reader = "import sys,pathlib; from shardyard_trainer.data.budget import tokenised; "
    reader += "tokenised(pathlib.Path(sys.argv[1]), lambda t: (t / 'tokens.bin').write_bytes(b'x' * 1000)); "
    reader += "print('reads', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", reader, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "reads\n"
        assert evict(tmp_path, most_bytes=0) == [] and folder.exists()
        process.communicate()
    assert evict(tmp_path, most_bytes=0) == [folder] and not folder.exists()


def test_a_folder_that_is_built_again_makes_room_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BUDGET_VARIABLE, "1500")
    old = made(tmp_path, "old", age_s=5)
    new = tokenised(tmp_path / "examples" / "new", lambda target: (target / "tokens.bin").write_bytes(b"x" * 1000))
    assert new.exists() and not old.exists()


def test_what_killed_processes_left_is_removed_and_what_is_being_built_is_not(tmp_path: Path) -> None:
    left = [tmp_path / place for place in ("corpora/.a.building", "examples/.b.gone", "tokenizers/.c.building")]
    building = tmp_path / "corpora/.d.building"
    for folder in (*left, building):
        folder.mkdir(parents=True)
        (folder / "tokens.bin").write_bytes(b"x")
    with (tmp_path / "corpora/.d.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        evict(tmp_path, most_bytes=2**30)
        assert building.exists() and not any(folder.exists() for folder in left)
    evict(tmp_path, most_bytes=2**30)
    assert not building.exists()


def test_tokens_that_a_plan_left_are_held_by_the_job_that_finds_them(tmp_path: Path) -> None:
    reader = "import sys,pathlib; from shardyard_trainer.data.budget import in_use; "
    reader += "print(in_use(pathlib.Path(sys.argv[1])), flush=True); sys.stdin.read()"
    folder = tmp_path / "examples" / "found"
    build_once(folder, lambda target: (target / "tokens.bin").write_bytes(b"x" * 1000))
    with subprocess.Popen(
        [sys.executable, "-c", reader, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        assert evict(tmp_path, most_bytes=0) == [] and folder.exists()
        process.communicate()
    assert evict(tmp_path, most_bytes=0) == [folder]
    assert not in_use(folder)


def test_locks_go_with_what_they_are_for(tmp_path: Path) -> None:
    writer = "import sys,pathlib; from shardyard_trainer.data.budget import tokenised; "
    writer += "tokenised(pathlib.Path(sys.argv[1]), lambda t: (t / 'tokens.bin').write_bytes(b'x' * 1000))"
    for kind in ("examples", "corpora"):
        subprocess.run([sys.executable, "-c", writer, tmp_path / kind / "once"], check=True)
    (tmp_path / "corpora" / ".lost.use").touch()
    (tmp_path / "corpora" / ".lost.lock").touch()
    evict(tmp_path, most_bytes=2**30)
    assert sorted(path.name for path in (tmp_path / "corpora").iterdir()) == [".once.use", "once"]
    evict(tmp_path, most_bytes=0)
    assert not any(path.name for kind in ("examples", "corpora") for path in (tmp_path / kind).iterdir())


def test_who_comes_while_another_one_builds_never_builds_beside_it_though_locks_are_removed(tmp_path: Path) -> None:
    built: list[str] = []

    def build(target: Path) -> None:
        assert list(target.iterdir()) == []
        built.append(target.name)
        time.sleep(0.001)
        (target / "tokens.bin").write_bytes(b"x")

    with ThreadPoolExecutor(12) as many:
        for number in range(30):
            found = list(many.map(lambda _, name=f"n{number}": build_once(tmp_path / name, build), range(12)))
            assert all((folder / "tokens.bin").read_bytes() == b"x" for folder in found)
    assert len(built) == 30 and not list(tmp_path.glob(".*"))
