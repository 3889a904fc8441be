"""Make the sync client of the async one: `python client/generate_sync.py [--check]`.

The async source is rewritten token by token into `_sync/`, which is committed; `--check` changes nothing and fails
where it differs. Only `runtime.py`, which holds what waiting and blocking do not share, is written by hand in both.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent / "shardyard"
BY_HAND = {"runtime.py", "__init__.py"}
NAMES = {
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "__aiter__": "__iter__",
    "__anext__": "__next__",
    "AsyncIterator": "Iterator",
    "aclosing": "closing",
    "aclose": "close",
    "_async": "_sync",
}
HEADER = "# Made from the async source by client/generate_sync.py: change that, never this.\n"


def main() -> int:
    """Write or check every generated file; the exit code."""
    check = "--check" in sys.argv[1:]
    wanted = {source.name: rewrite(source.read_text()) for source in sorted((PACKAGE / "_async").glob("*.py"))}
    wanted = {name: text for name, text in wanted.items() if name not in BY_HAND}
    wanted["__init__.py"] = '"""The sync client, made from the async one by `generate_sync.py`."""\n'
    differing = [name for name, text in wanted.items() if _text(PACKAGE / "_sync" / name) != text]
    stray = [path for path in (PACKAGE / "_sync").glob("*.py") if path.name not in {*wanted, "runtime.py"}]
    if check:
        for name in [*differing, *(path.name for path in stray)]:
            print(f"client/shardyard/_sync/{name} is not what the async source gives: run client/generate_sync.py")
        return 1 if differing or stray else 0
    for name in differing:
        (PACKAGE / "_sync" / name).write_text(wanted[name])
    for path in stray:
        path.unlink()
    return 0


def rewrite(source: str) -> str:
    """The sync twin of an async module, formatted."""
    out: list[tuple[int, str]] = []
    drop_space = False
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.string in ("async", "await"):
            out.append((token.type, ""))
            drop_space = True
            continue
        out.append((token.type, _rewritten(token)))
        out[-1] = (token.type, ("\0" if drop_space else "") + out[-1][1])
        drop_space = False
    return _formatted(HEADER + _joined(source, [text for _, text in out]))


def _rewritten(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.NAME:
        return _name(token.string)
    if token.type == tokenize.STRING:
        return re.sub(r"\b(await|async) ", "", re.sub(r"\bAsync(?=[A-Z])", "", token.string))
    return token.string


def _name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    return name.removeprefix("Async") if re.match(r"Async[A-Z]", name) else name


def _joined(source: str, texts: list[str]) -> str:
    """The tokens' new texts with the white space between them, except after a dropped word."""
    lines = source.splitlines(keepends=True)
    made, row, column = "", 1, 0
    for token, text in zip(tokenize.generate_tokens(io.StringIO(source).readline), texts, strict=True):
        if token.type in (tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
            continue
        between = ""
        while (row, column) < token.start:
            if row < token.start[0]:
                between += lines[row - 1][column:]
                row, column = row + 1, 0
            else:
                between += lines[row - 1][column : token.start[1]]
                column = token.start[1]
        made += text[1:] if text.startswith("\0") else between + text
        row, column = token.end
    return made


def _formatted(source: str) -> str:
    """As `ruff` writes it: shorter lines may want other breaks, other names another order of imports."""
    for arguments in (["check", "--select", "I", "--fix-only", "--quiet"], ["format"]):
        command = [sys.executable, "-m", "ruff", *arguments, "--stdin-filename", str(PACKAGE / "_sync" / "x.py"), "-"]
        source = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    return source


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
