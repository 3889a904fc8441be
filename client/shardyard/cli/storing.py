"""`store backup`, `store restore`, `store migrate`: the service's store as a file, and from SQLite to PostgreSQL."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from shardyard.cli.options import Json, a_path
from shardyard.cli.service import StateDir, Store, load_settings, server

BackupFile = Annotated[Path, typer.Argument(metavar="FILE", parser=a_path, help="The backup.", show_default=False)]


def backup(file: BackupFile, state_dir: StateDir = None, store: Store = None, json: Json = False) -> None:
    """Write the store into a new file; the service may run meanwhile.

    Not the storage: checkpoints, models and data sets are files of their own.
    """
    settings = _settings(state_dir, store)
    _run("backed up", lambda backups: backups.back_up(settings.store or settings.database, file.absolute()), json)


def restore(file: BackupFile, state_dir: StateDir = None, store: Store = None, json: Json = False) -> None:
    """Make the store from a backup, in an empty database or a state directory without a store."""
    settings = _settings(state_dir, store)
    _run("restored", lambda backups: backups.restore(file.absolute(), settings.store or settings.database), json)


def migrate(
    state: Annotated[
        Path,
        typer.Argument(metavar="STATE", parser=a_path, help="The state directory with SQLite.", show_default=False),
    ],
    store: Annotated[
        str | None,
        typer.Argument(
            metavar="URL", help="postgresql://USER@HOST:PORT/DATABASE [$SHARDYARD_STORE].", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Move the store of a state directory from SQLite to an empty PostgreSQL database, which continues it."""
    settings = _settings(state, store)
    if not settings.store:
        raise typer.BadParameter("URL is missing; give postgresql://USER@HOST:PORT/DATABASE, or set SHARDYARD_STORE")
    _run("moved", lambda backups: backups.move(settings.state_dir, settings.store), json)


HELP = "Back up, restore or move the service's store."

COMMANDS: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("backup", backup),
    ("restore", restore),
    ("migrate", migrate),
)


def _settings(state_dir: Path | None, store: str | None) -> Any:
    given = {"state_dir": state_dir, "store": store}
    return load_settings({name: value for name, value in given.items() if value is not None})


def _run(done: str, work: Callable[[Any], Any], json: bool) -> None:
    """Does the work and prints what was copied; exits with the code of the store's failure."""
    from shardyard.cli.output import print_json

    backups, failures = server("store.backups"), server("store.failures")
    # A backup has the key that signs page tokens: for this account only.
    before = os.umask(0o077)
    try:
        report = work(backups)
    except failures.StoreFailure as failure:
        print(f"error: {failure}", file=sys.stderr)
        raise typer.Exit(failure.exit_code) from None
    finally:
        os.umask(before)
    copied = report.copied
    if json:
        sums = {name: {"rows": each.rows, "checksum": f"{each.digest:032x}"} for name, each in copied.sums.items()}
        found = {"store_id": report.store_id, "source": report.source, "target": report.target}
        print_json({**found, "replaced_texts": copied.replaced, "tables": sums})
        return
    jobs, events = copied.sums["job"].rows, copied.sums["event"].rows
    print(f"{done} the store {report.store_id}: {report.source} → {report.target}")
    print(f"{jobs} jobs, {events} events, {copied.rows} rows in {len(copied.sums)} tables; every row was compared")
    if copied.replaced:
        print(f"{copied.replaced} rows had a NUL in a text, which is now U+FFFD")
