"""Every fenced example of the README and of docs/ is run, page by page, against a real service.

`python` is executed, the examples of one page in one namespace; `console` lines after `$ ` are typed in (those that
install, start or stop something are only looked at); `yaml` is parsed, and written as the file that its first line
names; `text` is for what cannot be run, `mermaid` for pictures.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.fences import Fence, fences, parse_yaml
from helpers.repository import ROOT
from helpers.workplace import Workplace, workplace

LANGUAGES = {"python", "console", "yaml", "json", "proto", "text", "mermaid"}
# Installing, and what would start or stop the service that the examples run against.
LOOKED_AT_ONLY = ("make", "git", "pip", "python3", "cd", ".", "ln", "shardyard serve", "shardyard stop")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
EXAMPLES = {path: fences(path, ROOT) for path in PAGES}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with workplace(tmp_path_factory.mktemp("docs")) as made:
        yield made


def is_looked_at_only(command: str) -> bool:
    return any(command == start or command.startswith(f"{start} ") for start in LOOKED_AT_ONLY)


def is_run(fence: Fence) -> bool:
    typed = fence.commands() if fence.language == "console" else []
    return fence.language == "python" or not all(is_looked_at_only(command) for command in typed)


def run_fence(fence: Fence, place: Workplace, namespace: dict[str, object]) -> str | None:
    """What went wrong; None when nothing did."""
    if fence.file:
        (place.folder / fence.file).write_text(place.here(fence.text), encoding="utf-8")
    elif fence.language == "python":
        exec(compile("\n" * fence.line + fence.text, str(ROOT / fence.page), "exec"), namespace)
    for command in fence.commands() if fence.language == "console" else ():
        if is_looked_at_only(command):
            continue
        done = place.run(command)
        if done.returncode:
            return f"{fence.page}:{fence.line} $ {command}\n{done.stdout}{done.stderr}"
    return None


PAGES_TO_RUN = [path for path in PAGES if any(is_run(fence) for fence in EXAMPLES[path])]


def test_every_example_says_what_it_is() -> None:
    every = [fence for each in EXAMPLES.values() for fence in each]
    assert [f"{fence.page}:{fence.line}" for fence in every if fence.language not in LANGUAGES] == []


def test_every_yaml_example_parses() -> None:
    parsed = [parse_yaml(fence) for each in EXAMPLES.values() for fence in each if fence.language == "yaml"]
    assert all(isinstance(content, dict) for content in parsed)


def test_every_make_target_that_the_pages_name_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = [command for each in EXAMPLES.values() for fence in each for command in fence.commands()]
    named = {
        word
        for command in commands
        if command.startswith("make ")
        for word in shlex.split(command, comments=True)[1:]
        if "=" not in word
    }
    assert named <= targets


def test_every_link_between_pages_leads_somewhere() -> None:
    links = [
        (path, link)
        for path in PAGES
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", path.read_text(encoding="utf-8"))
    ]
    assert [f"{path.name}: {link}" for path, link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES_TO_RUN, ids=lambda page: page.name)
def test_every_example_of_the_page_runs(page: Path, place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    for name in ("SHARDYARD_ADDRESS", "SHARDYARD_STATE_DIR", "HF_HUB_OFFLINE"):
        monkeypatch.setitem(os.environ, name, place.environment[name])
    namespace: dict[str, object] = {"__name__": "example"}
    for fence in EXAMPLES[page]:
        assert run_fence(fence, place, namespace) is None
