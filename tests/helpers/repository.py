"""The repository's own files, for the tests of the house."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = ("client", "coordinator", "trainer", "tests", "bench", "examples", "tools", "protos")
GENERATED = ("client/shardyard/v1/", "client/shardyard/worker/")
SKIPPED = {".venv", ".git", "__pycache__", "node_modules", "dist", "build"}


def python_files() -> list[Path]:
    """Every Python file that people write: generated protobuf code is left out."""
    found = [path for root in SOURCE_ROOTS for path in (ROOT / root).rglob("*.py")]
    return sorted(path for path in found if not is_skipped(path) and not is_generated(path))


def text_files() -> list[Path]:
    """Every text file of the repository but vendored ones and caches, without asking git, which may be absent."""
    endings = {".py", ".pyi", ".md", ".toml", ".yaml", ".yml", ".proto", ".txt", ".sh", ".csv", ".jsonl", ""}
    found = [path for path in ROOT.rglob("*") if path.suffix in endings and path.is_file()]
    return sorted(path for path in found if not is_skipped(path) and relative(path).split("/")[0] != "third_party")


def relative(path: Path) -> str:
    """The path from the repository's root on, with `/`."""
    return path.relative_to(ROOT).as_posix()


def is_generated(path: Path) -> bool:
    """Whether a generator of protobuf code wrote it."""
    return relative(path).startswith(GENERATED)


def is_skipped(path: Path) -> bool:
    """Whether it is in an environment, a cache or a build folder."""
    parts = path.relative_to(ROOT).parts
    return any(part in SKIPPED or (part.startswith(".") and part != ".ci") for part in parts)
