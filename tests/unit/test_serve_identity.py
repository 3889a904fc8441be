"""Whatever changes about a file that a spec names, its plan is known by something else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.loopback_hub import COMMIT
from shardyard.v1 import spec_pb2
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.serve.identity import Named, are_pinned, hub_folders, identify
from shardyard_trainer.models.hub import snapshot_folder


def rewrite(path: Path) -> None:
    """Other bytes of the same number, and the old time of change."""
    found = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "other bytes": lambda folder: rewrite(folder / "deep/data.txt"),
    "a longer file": lambda folder: (folder / "deep/data.txt").write_text("longer than it was"),
    "a file removed": lambda folder: (folder / "deep/data.txt").unlink(),
    "a file added": lambda folder: (folder / "other.txt").touch(),
    "what a link leads to": lambda folder: (folder.parent / "blob").write_text("another blob"),
    "all of it gone": lambda folder: folder.rename(folder.with_name("elsewhere")),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("kind", ["folder", "uri"])
def test_an_identity_changes_with_its_files(tmp_path: Path, kind: str, how: str) -> None:
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/data.txt").write_text("some text")
    (tmp_path / "blob").write_text("a blob")
    (folder / "link").symlink_to(tmp_path / "blob")
    named = Named(folders=(str(folder),)) if kind == "folder" else Named((("job.spec.train_data.uri", str(folder)),))
    before = identify(named, [str(tmp_path)])
    assert before and identify(named, [str(tmp_path)]) == before
    CHANGES[how](folder)
    if kind == "uri" and how == "all of it gone":
        with pytest.raises(Refused):
            identify(named, [str(tmp_path)])
    else:
        assert identify(named, [str(tmp_path)]) != before


CHECKPOINT = ("model.ckpt.index", "model.ckpt.data-00000-of-00001", "vocab.txt")


@pytest.mark.parametrize("name", ["model.ckpt", "model.ckpt.index"])
@pytest.mark.parametrize("changed", CHECKPOINT)
def test_a_checkpoint_is_all_files_beside_its_index(tmp_path: Path, name: str, changed: str) -> None:
    (tmp_path / "bert/deep").mkdir(parents=True)
    for each in CHECKPOINT:
        (tmp_path / "bert" / each).write_text("content")
    named = Named((("job.spec.model.checkpoint.uri", str(tmp_path / "bert" / name)),))
    before = identify(named, [str(tmp_path)])
    (tmp_path / "bert/deep/other").touch()
    assert identify(named, [str(tmp_path)]) == before
    (tmp_path / "bert" / changed).write_text("changed")
    assert identify(named, [str(tmp_path)]) != before
    with pytest.raises(Refused):
        identify(Named((("job.spec.model.checkpoint.uri", str(tmp_path / "bert/other.ckpt")),)), [str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.ckpt", "is not there; there are `model.ckpt-1000`: name one of them"),
        ("model.ckpt-1000.meta", "is not there; there are `model.ckpt-1000`: name one of them"),
        ("quite-another", "is not there; check its spelling"),
        ("gone/model.ckpt", "is not there; check its spelling"),
        ("../outside", "under an allowed data root"),
        ("pipe", "is not a regular file or folder"),
    ],
)
def test_a_wrong_name_is_told_from_a_place_that_is_not_allowed(tmp_path: Path, name: str, said: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    os.mkfifo(root / "pipe")
    for ending in ("index", "data-00000-of-00001"):
        (root / f"model.ckpt-1000.{ending}").touch()
    with pytest.raises(Refused) as refused:
        identify(Named((("job.spec.model.checkpoint.uri", str(root / name)),)), [str(root)])
    assert said in refused.value.violations[0].message


def test_only_a_pinned_model_of_the_hub_has_a_place_in_the_cache() -> None:
    model, tokenizer = spec_pb2.HubModel(id="me/bert"), spec_pb2.HubModel(id="gpt2")
    assert hub_folders([model, tokenizer], "/cache") == () and not are_pinned([model, tokenizer])
    model.revision = COMMIT
    assert hub_folders([model, tokenizer], "/cache") == (str(snapshot_folder(model, Path("/cache"))),)
    assert not are_pinned([model, tokenizer])
    tokenizer.revision = COMMIT
    assert are_pinned([model, tokenizer])
