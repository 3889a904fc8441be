"""Whatever happened to a file of a checkpoint, trainer and service say what is wrong with it, and neither waits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from shardyard_coordinator.control.manifests import find_checkpoints
from shardyard_trainer.training.checkpoint import MANIFEST, read_manifest, write_manifest
from shardyard_trainer.training.shards import ShardFile, damage

SHARD = "mp_rank_00_model_states.pt"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_a_link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def replace_by_a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


WAYS: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": Path.unlink,
    "folder": replace_by_a_folder,
    "pipe": replace_by_a_pipe,
    "link to nothing": replace_by_a_link_to_nothing,
    "link to itself": replace_by_a_link_to_itself,
}
OF_MANIFESTS: dict[str, Callable[[Path], object]] = {
    **WAYS,
    "nested too deep": lambda path: path.write_bytes(b"[" * 100_000),
    "another object": lambda path: path.write_text("{}"),
    "a list": lambda path: path.write_text("[]"),
    "not UTF-8": lambda path: path.write_bytes(b'{"step": "\xff"}'),
}


def committed(tmp_path: Path) -> tuple[Path, ShardFile]:
    """The folder of a whole checkpoint, and its shard."""
    folder = tmp_path / "job" / "e000001" / "step-000000010"
    folder.mkdir(parents=True)
    content = bytes(range(256)) * 100
    (folder / SHARD).write_bytes(content)
    shard = ShardFile(path=SHARD, bytes=len(content), xxh3=xxhash.xxh3_128(content).hexdigest())
    manifest = {
        "format": 1, "job_uid": "j", "epoch": 1, "step": 10, "world_size": 1, "zero_stage": 0, "created_us": 1,
        "size_bytes": len(content), "files": [], "cursor": {}, "metrics": {}, "versions": {},
    }  # fmt: skip
    write_manifest(folder, manifest, lambda _: None)
    return folder, shard


@pytest.mark.parametrize("way", OF_MANIFESTS)
def test_a_damaged_manifest_is_not_a_checkpoint_for_either_side(tmp_path: Path, way: str) -> None:
    folder, _ = committed(tmp_path)
    assert read_manifest(folder)[0] is not None and len(find_checkpoints(tmp_path / "job", "j", 2)) == 1
    OF_MANIFESTS[way](folder / MANIFEST)
    manifest, problem = read_manifest(folder)
    assert manifest is None and problem.startswith(MANIFEST) and "Errno" not in problem
    assert find_checkpoints(tmp_path / "job", "j", 2) == []


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_shard_is_named_with_what_is_wrong(tmp_path: Path, way: str) -> None:
    folder, shard = committed(tmp_path)
    assert damage(folder, shard) is None
    WAYS[way](folder / SHARD)
    problem = damage(folder, shard)
    assert problem is not None and problem.startswith(SHARD) and "Errno" not in problem


def test_a_shard_that_was_moved_and_linked_is_whole_all_the_same(tmp_path: Path) -> None:
    folder, shard = committed(tmp_path)
    shutil.move(folder / SHARD, tmp_path / "moved.pt")
    (folder / SHARD).symlink_to(tmp_path / "moved.pt")
    assert damage(folder, shard) is None
