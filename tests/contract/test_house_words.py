"""What the repository must not contain: unfinished work, dangerous calls, mocks, catching all but at the edges."""

from __future__ import annotations

import ast
import re

from helpers.repository import python_files, relative, text_files

# This file has to name what it looks for.
HERE = "tests/contract/test_house_words.py"

UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b|raise NotImplemented\b")
DANGEROUS = re.compile(
    r"trust_remote_code\s*=\s*True|\bpickle\.loads?\(|\byaml\.(load|unsafe_load)\(|shell\s*=\s*True"
    r"|weights_only\s*=\s*False|\bos\.system\(|\beval\(\s*input|--no-verify"
)
MOCKS = re.compile(r"\bunittest\.mock\b|\bMagicMock\b|\bmonkeypatch\.setattr\b")
PLACES = re.compile(r"/(work|home|root|farm|Users)/[a-z.]")
# Three edges only: what a caller sends, what a loop meets, what a worker raises (and the process that answers for it).
CATCHES_ALL = re.compile(r"^\s*except\s*(\(?\s*(Base)?Exception\b[^:]*)?:", re.MULTILINE)
EDGES = re.compile(r"#.*\bedge\b")


def found(pattern: re.Pattern[str], names: list[tuple[str, str]]) -> list[str]:
    return [
        f"{name}:{text[: match.start()].count(chr(10)) + 1} {match.group(0).strip()}"
        for name, text in names
        for match in pattern.finditer(text)
    ]


def sources() -> list[tuple[str, str]]:
    return [(relative(path), path.read_text(encoding="utf-8")) for path in python_files() if relative(path) != HERE]


def products() -> list[tuple[str, str]]:
    return [(name, text) for name, text in sources() if not name.startswith("tests/")]


def test_nothing_is_left_unfinished() -> None:
    assert found(UNFINISHED, products()) == []


def test_nothing_runs_code_from_data() -> None:
    assert found(DANGEROUS, sources()) == []


def test_tests_use_fakes_at_seams_and_no_mocks() -> None:
    assert found(MOCKS, sources()) == []


def test_the_repository_names_no_path_of_a_machine() -> None:
    files = [(relative(path), path.read_text(encoding="utf-8", errors="replace")) for path in text_files()]
    assert found(PLACES, [(name, text) for name, text in files if name != HERE]) == []


def test_catch_all_handlers_are_marked_as_edges() -> None:
    unnamed = [
        f"{name}:{number}"
        for name, text in products()
        for number, line in enumerate(text.splitlines(), start=1)
        if CATCHES_ALL.match(line) and not EDGES.search(line) and not handler_raises(text, number)
    ]
    assert unnamed == []


def handler_raises(text: str, line: int) -> bool:
    """Whether the handler that begins in the line ends by raising again: it only adds something or cleans up."""
    handlers = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ExceptHandler) and node.lineno == line
    ]
    return any(isinstance(handler.body[-1], ast.Raise) for handler in handlers)


# Plain English, as engineers of all countries read it: "is not a", "continues", "again", "reports", "the first one".
DIALECT = re.compile(
    r"(?<!here )\b(is|are) no (?!longer\b|more\b)[a-z]+|\bstands twice\b|\b[Ww]hoever\b|\banew\b|\bfor ever\b"
    r"|\b([Gg]o|[Gg]oes|going|went) on\b|\b(am|is|are|was|were|be|been|unless) told\b"
    r"|\bsee to the storage\b|\b[Mm]end the (file|line)\b"
    r"|\bparted\b|\bat hand\b|\bwithout end\b|\blets? go of\b|\bhere to stay\b|\bthere (is|are) not\b"
    r"|\bleaves? (numbers|off)\b|\ball the same\b|\bunder way\b|\bseldom\b|\bperhaps\b|\bstrangers' files\b"
)


def test_code_protos_and_pages_are_in_plain_english() -> None:
    prose = [
        (relative(path), path.read_text(encoding="utf-8", errors="replace"))
        for path in text_files()
        if path.suffix in (".md", ".proto") and path.name != "CHANGELOG.md"
    ]
    code = [each for each in products() if "_pb2" not in each[0]]
    assert found(DIALECT, [*code, *prose]) == []
