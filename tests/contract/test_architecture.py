"""docs/architecture.md names what is there: every room has a row, and every file and symbol named in it exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.repository import ROOT, python_files, relative

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
COORDINATOR = ROOT / "coordinator" / "shardyard_coordinator"
TRAINER = ROOT / "trainer" / "shardyard_trainer"
SECTIONS = {COORDINATOR: "The coordinator's rooms", TRAINER: "The trainer's rooms"}
WORDS = ("attempt", "epoch", "gang", "supervisor", "agent", "head", "spool", "canary", "directive", "slot")
# `room/file.py`, `file.py`, or one of them with what is defined there: `room/file.py:Class.method`.
NAMED = re.compile(r"`([\w/]+\.py)(?::([\w.]+))?`")


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def rooms(root: Path) -> set[str]:
    return {path.parent.name for path in root.glob("*/__init__.py")}


def ticked(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def imported_rooms(root: Path, room: str) -> set[str]:
    """The other rooms that a room's modules import, inside functions too."""
    nodes = [node for path in (root / room).rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    found = {module.split(".")[1] for module in modules if module.startswith(f"{root.name}.")}
    return (found & rooms(root)) - {room}


def symbols(path: Path) -> set[str]:
    """What a module defines: functions, classes, and `Class.method`."""
    return set(_defined(ast.parse(path.read_text(encoding="utf-8")).body, ""))


def _defined(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield f"{prefix}{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from _defined(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("root", SECTIONS, ids=lambda root: root.name)
def test_every_room_has_one_row_and_every_row_is_a_room(root: Path) -> None:
    assert sorted(name for row in rows(SECTIONS[root]) for name in ticked(row[0])) == sorted(rooms(root))


@pytest.mark.parametrize("root", SECTIONS, ids=lambda root: root.name)
def test_a_row_names_the_rooms_that_its_room_imports_and_files_that_it_has(root: Path) -> None:
    for room, knows, asks, files in rows(SECTIONS[root]):
        folder = root / ticked(room)[0]
        assert knows and ticked(files)
        assert set(ticked(asks)) == imported_rooms(root, folder.name), folder.name
        assert [name for name in ticked(files) if not (folder / name).is_file()] == []


def test_every_file_and_symbol_of_the_page_exists() -> None:
    text = "\n".join(line for line in PAGE.splitlines() if not line.startswith("| `"))
    named = NAMED.findall(text)
    assert len(named) > 60
    missing = []
    for name, symbol in named:
        found = [path for root in (TRAINER, COORDINATOR, ROOT) if (path := root / name).is_file()]
        if not any(not symbol or symbol in symbols(path) for path in found):
            missing.append(f"{name}:{symbol}")
    assert missing == []


def test_the_words_are_explained() -> None:
    assert {row[0] for row in rows("The words")} == set(WORDS)


def test_the_page_is_linked() -> None:
    assert "(docs/architecture.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "(architecture.md)" in (ROOT / "docs" / "README.md").read_text(encoding="utf-8")


def test_only_the_context_and_the_end_of_a_rank_make_events() -> None:
    makers = {
        relative(path).removeprefix("trainer/shardyard_trainer/")
        for path in python_files()
        if relative(path).startswith("trainer/") and "WorkerEvent(" in path.read_text(encoding="utf-8")
    }
    assert makers == {"training/context.py", "entry.py"}
