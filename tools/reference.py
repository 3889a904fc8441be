"""The tables of docs/ that are generated from the code: `python tools/reference.py` writes them, `--check` compares.

A table is written between `<!-- NAME begin -->` and `<!-- NAME end -->`; the text around it is written by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from shardyard_coordinator.domain.access import GRANTS, Permission, Role
from shardyard_coordinator.domain.causes import VERDICTS, Cause
from shardyard_coordinator.domain.reasons import MEANINGS, Reason
from shardyard_coordinator.domain.states import TRANSITIONS, JobState
from shardyard_coordinator.monitoring.families import FAMILIES
from shardyard_coordinator.serve.permissions import PERMISSIONS, Needs, Where

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main(arguments: list[str]) -> int:
    """Write the tables, or with `--check` say which are not what the code says."""
    stale = []
    for page, tables in TABLES.items():
        path = DOCS / page
        text = path.read_text(encoding="utf-8")
        fresh = with_tables(text, tables)
        if fresh != text:
            stale.append(f"docs/{page}")
            if "--check" not in arguments:
                path.write_text(fresh, encoding="utf-8")
    if stale and "--check" in arguments:
        print(f"not what the code says; run `make reference`: {', '.join(stale)}")
        return 1
    return 0


def with_tables(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """The page with its tables regenerated. Raises ValueError if the place of a table is missing."""
    for name, table in tables.items():
        begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
        place = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if not place.search(text):
            raise ValueError(f"no place for the table {name}: {begin} … {end}")
        body = f"{begin}\n{table()}\n{end}"
        text = place.sub(lambda _, body=body: body, text)
    return text


def rows(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """The rows of a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ("---",) * len(header), *lines))


def states_table() -> str:
    """Which state may follow which."""
    return rows(
        ("State", "May go to"),
        [
            (
                f"`{state}`",
                ", ".join(f"`{target}`" for target in TRANSITIONS if target in targets) or "nothing: terminal",
            )
            for state, targets in TRANSITIONS.items()
        ],
    )


def causes_table() -> str:
    """Every cause with whose failure it is and what follows."""
    return rows(
        ("Cause", "Whose", "Tried again", "Longest first back-off", "Then"),
        [
            (
                f"`{cause}`",
                str(VERDICTS[cause].blame),
                retries(cause),
                f"{VERDICTS[cause].backoff_s:g} s",
                f"`{JobState.PAUSED if VERDICTS[cause].needs_person else JobState.FAILED}`",
            )
            for cause in Cause
        ],
    )


def retries(cause: Cause) -> str:
    """In words, how often a cause is tried again."""
    verdict = VERDICTS[cause]
    if verdict.retries == 0:
        return "never"
    if verdict.retries is not None:
        return f"{verdict.retries} × in a row"
    if verdict.retries_without_progress >= 1000:
        return "always; it is not a failure"
    return f"while checkpoints are made in between, else {verdict.retries_without_progress} × in a row"


def reasons_table() -> str:
    """Every reason with its code and sentence."""
    return rows(
        ("Reason", "Code", "What it means"),
        [(f"`{reason}`", f"`{MEANINGS[reason].code}`", MEANINGS[reason].sentence) for reason in Reason],
    )


def methods_table() -> str:
    """Every method with who may call it, and where."""
    return rows(
        ("Method", *(str(role) for role in Role), "Where"),
        [
            (
                f"`{path.rpartition('.')[2].replace('/', '.')}`",
                *(mark(needs, role) for role in Role),
                PLACES[needs.where],
            )
            for path, needs in PERMISSIONS.items()
            if needs.permission not in (Permission.OPEN, Permission.KNOWN)
        ],
    )


def short(path: str) -> str:
    """`JobService.GetJob` of a method's path."""
    return path.rpartition(".")[2].replace("/", ".")


def mark(needs: Needs, role: Role) -> str:
    """Whether a role allows a method: `yes`, `own` (what the caller made itself), or nothing."""
    if needs.permission not in GRANTS[role]:
        return ""
    return "own" if needs.only_own and Permission.ADMIN not in GRANTS[role] else "yes"


PLACES: dict[Where, str] = {
    Where.PROJECT: "the project of the request",
    Where.VISIBLE: "the project of the request; `projects/-` shows what may be seen",
    Where.SOMEWHERE: "any project",
    Where.EVERYWHERE: "all projects",
}


def metrics_table() -> str:
    """Every metric with its labels and meaning."""
    return rows(
        ("Metric", "Kind", "Labels", "What it says"),
        [
            (
                f"`{family.name}`",
                str(family.kind),
                ", ".join(f"`{label}`" for label in family.labels),
                family.meaning.replace("|", "\\|"),
            )
            for family in FAMILIES
        ],
    )


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "states.md": {"transitions": states_table, "causes": causes_table},
    "errors.md": {"reasons": reasons_table},
    "security.md": {"methods": methods_table},
    "monitoring.md": {"metrics": metrics_table},
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
