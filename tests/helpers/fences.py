"""The fenced examples of a Markdown page, and a place in which they can be run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)``` *$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"\A# (?:file: )?(?P<name>[\w.-]+\.(?:yaml|yml|csv|jsonl|txt|py))\n")


@dataclass(frozen=True)
class Fence:
    """One example: its language, the words after it, its text, and its place in the page."""

    page: str
    line: int
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def file(self) -> str:
        """The name in a first line such as `# review.yaml`, or after the language; empty: it has none."""
        found = FILE.match(self.text)
        return found["name"] if found else next((word for word in self.words if word.endswith(".json")), "")

    def commands(self) -> list[str]:
        """The lines after `$ `, those that a backslash continues in one."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line[2:].strip() for line in lines if line.startswith("$ ")]


def fences(path: Path, root: Path) -> list[Fence]:
    """Every fenced example of a page, in their order."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        language, *words = match["info"].split() or [""]
        line = text[: match.start()].count("\n") + 1
        found.append(Fence(path.relative_to(root).as_posix(), line, language, tuple(words), match["body"]))
    return found


def parse_yaml(fence: Fence) -> object:
    """The content of a YAML example."""
    return yaml.safe_load(fence.text)
