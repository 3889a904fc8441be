"""What the service keeps is private to its account, whatever the owner and rights of the folders were."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

import shardyard
from helpers.processes import ends, running


def open_to_others(*folders: Path) -> dict[str, str]:
    """Everything in the folders that another account could read, with its mode; links apart."""
    found = [*folders, *(path for folder in folders for path in folder.rglob("*"))]
    modes = {path: path.lstat().st_mode for path in found if not path.is_symlink()}
    return {str(path): oct(mode) for path, mode in modes.items() if mode & 0o077 and not stat.S_ISSOCK(mode)}


def test_folders_and_files_that_others_could_read_are_taken_from_them(tmp_path: Path) -> None:
    state, storage = tmp_path / "state", tmp_path / "storage"
    for made in (state, storage, storage / "jobs" / "old", storage / "cache"):
        made.mkdir(parents=True)
        made.chmod(0o777)
    for left in (state / "compute.log", storage / "cache" / "spec.json"):
        left.write_text("private")
        left.chmod(0o644)
    outside = tmp_path / "outside"
    outside.write_text("somebody's")
    outside.chmod(0o644)
    (storage / "cache" / "link").symlink_to(outside)
    (storage / "jobs" / "old").rmdir()
    before = os.umask(0o000)
    try:
        with running(state, SHARDYARD_STORAGE_ROOT=str(storage)) as (_, address):
            (tmp_path / "corpus.txt").write_text("one")
            with shardyard.Client(address) as client:
                client.upload_dataset(tmp_path / "corpus.txt")
            deadline = time.monotonic() + 20
            while open_to_others(state, storage) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert open_to_others(state, storage) == {}
    finally:
        os.umask(before)
    assert stat.S_IMODE(outside.stat().st_mode) == 0o644


@pytest.mark.parametrize("which", ["state", "storage"])
@pytest.mark.parametrize(("mode", "owner"), [(0o755, 12_345), (0o1777, None)])
def test_a_folder_that_belongs_to_others_is_refused_with_the_next_step(
    tmp_path: Path, which: str, mode: int, owner: int | None
) -> None:
    if owner is not None and os.geteuid() != 0:
        pytest.skip("only root can give a folder to another account")
    folder = tmp_path / which
    folder.mkdir()
    folder.chmod(mode)
    if owner is not None:
        os.chown(folder, owner, -1)
    said = ends(tmp_path / "state", SHARDYARD_STORAGE_ROOT=str(tmp_path / "storage"))
    assert said.returncode == 78 and f"chmod 700 {folder}" in said.stderr and f"{mode:04o}" in said.stderr
    assert not list(folder.iterdir()) and stat.S_IMODE(folder.stat().st_mode) == mode
