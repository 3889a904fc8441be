"""Everything `make check` looks at, one line each; all of it runs, and the exit code says whether all of it passed.

`python tools/check.py NAME...` runs only the named checks.
"""

from __future__ import annotations

import filecmp
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

MOST_LINES = 60
ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
RELEASED = ROOT / "protos" / "released.binpb"
GENERATED = ("shardyard/v1", "shardyard/worker")


def main(names: list[str]) -> int:
    """Run the checks of these names (none: all); the number of those that failed."""
    if unknown := set(names) - set(CHECKS):
        print(f"no such check: {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    failed = 0
    for name in names or CHECKS:
        started = time.monotonic()
        output = CHECKS[name]()
        passed = output is None
        failed += not passed
        print(f"{'ok    ' if passed else 'FAILED'} {name:18} {time.monotonic() - started:5.1f} s", flush=True)
        if output:
            lines = output.rstrip().splitlines()
            print("\n".join(lines[-MOST_LINES:]), flush=True)
    return failed


def command(*arguments: str) -> Callable[[], str | None]:
    """A check that is a command run in the repository's root: what it printed when it failed, else None."""

    def run() -> str | None:
        done = subprocess.run(
            arguments,
            cwd=ROOT,
            env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return None if done.returncode == 0 else done.stdout or f"exit code {done.returncode}"

    return run


def breaking() -> str | None:
    """Whether a user of the released protos would be broken. Before the first release there is nothing to compare."""
    if not RELEASED.exists():
        print("       protos/released.binpb is written at the first release: nothing to compare with yet")
        return None
    return command("buf", "breaking", "protos", "--against", str(RELEASED))()


def generated() -> str | None:
    """Whether the committed generated code is what the protos give."""
    with tempfile.TemporaryDirectory() as folder:
        if output := command(sys.executable, "protos/generate.py", folder)():
            return output
        differing = [
            name for package in GENERATED for name in different_files(Path(folder) / package, ROOT / "client" / package)
        ]
    if not differing:
        return None
    return "not what the protos give; run `make protos`:\n" + "\n".join(differing)


def different_files(fresh: Path, committed: Path) -> list[str]:
    """The files that are in one folder only, or differ."""
    names = {
        path.relative_to(root)
        for root in (fresh, committed)
        for path in root.rglob("*.*")
        if path.suffix in {".py", ".pyi", ".json"}
    }
    return [
        str((committed / name).relative_to(ROOT))
        for name in sorted(names)
        if not ((fresh / name).exists() and (committed / name).exists())
        or not filecmp.cmp(fresh / name, committed / name, shallow=False)
    ]


CHECKS: dict[str, Callable[[], str | None]] = {
    "format": command("ruff", "format", "--check", "--no-cache"),
    "lint": command("ruff", "check", "--no-cache"),
    "types": command("mypy"),
    "types-of-users": command("pyright"),
    "imports": command("lint-imports", "--no-cache"),
    "proto-lint": command("buf", "lint"),
    "proto-breaking": breaking,
    "generated-code": generated,
    "sync-twin": command(sys.executable, "client/generate_sync.py", "--check"),
    "reference": command(sys.executable, "tools/reference.py", "--check"),
    "house": command(
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "tests/contract/test_house_sizes.py",
        "tests/contract/test_house_words.py",
    ),
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
