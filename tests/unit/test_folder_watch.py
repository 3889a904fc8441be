"""Which changes of a folder make it another one than a process was confined to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shardyard_coordinator.launch.allowed import FolderWatch
from shardyard_coordinator.launch.confine import identities


def another(root: Path) -> None:
    root.rename(root.with_name("away"))
    root.mkdir()


def another_behind_a_link(root: Path) -> None:
    root.with_name("target").mkdir()
    root.rename(root.with_name("away"))
    root.symlink_to(root.with_name("target"))


def a_file_in_its_place(root: Path) -> None:
    root.rename(root.with_name("away"))
    root.touch()


def gone(root: Path) -> None:
    root.rename(root.with_name("away"))


def away_and_back(root: Path) -> None:
    gone(root)
    root.with_name("away").rename(root)


def filled(root: Path) -> None:
    (root / "rows.csv").write_text("text")
    (root / "more").mkdir()


CHANGES: list[tuple[Callable[[Path], None], bool]] = [
    (another, True),
    (another_behind_a_link, True),
    (a_file_in_its_place, True),
    (gone, False),
    (away_and_back, False),
    (filled, False),
]


@pytest.mark.parametrize(("change", "exchanged"), CHANGES, ids=[row[0].__name__ for row in CHANGES])
async def test_a_folder_is_exchanged_if_another_one_lies_at_its_path(
    tmp_path: Path, change: Callable[[Path], None], exchanged: bool
) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    for folder in (root, other):
        folder.mkdir()
    paths = (str(other), str(root))
    then, watch = identities(paths), FolderWatch(paths)
    assert not await watch.exchanged(then)
    change(root)
    assert await watch.exchanged(then) is exchanged


async def test_a_folder_that_comes_later_was_not_there(tmp_path: Path) -> None:
    root = tmp_path / "root"
    then, watch = identities([str(root)]), FolderWatch([str(root)])
    assert not await watch.exchanged(then)
    root.mkdir()
    assert await watch.exchanged(then)


async def test_without_rules_nothing_is_looked_at(tmp_path: Path) -> None:
    assert not await FolderWatch([str(tmp_path)]).exchanged(())
