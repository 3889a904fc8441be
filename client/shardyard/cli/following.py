"""`events`: what happens to all jobs of a project; Ctrl-C says how to continue."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardyard.cli.options import Address, Json, Project, command_line, open_client

if TYPE_CHECKING:
    from shardyard._sync.client import Client
    from shardyard.types import ProjectEvent

EXIT_INTERRUPTED = 130


def events(
    *,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Continue with what happens from now on.")] = False,
    after: Annotated[str, typer.Option("--after", metavar="CURSOR", help="All events after this cursor.")] = "",
    kinds: Annotated[
        list[str] | None, typer.Option("--kind", help="Only this kind, such as state; may be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Maximum number of past events.")] = 50,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Show the newest events of all jobs of a project, and with --follow those that come.

    With --json each event has the cursor that continues after it.
    """
    last = after
    elsewhere = project != (os.environ.get("SHARDYARD_PROJECT") or "default")
    with open_client(address, project) as client:
        try:
            for event in _found(client, after, kinds or [], limit, follow=follow):
                _show(event, as_json=json)
                last = event.cursor
        except KeyboardInterrupt:
            if not json:
                more = [*(["--after", last] if last else []), *(["--project", project] if elsewhere else [])]
                again = command_line("events", "--follow", *more, address=address)
                print(f"\nThe jobs continue. To follow them again from here:\n  {again}")
            raise typer.Exit(EXIT_INTERRUPTED) from None


def _found(client: Client, after: str, kinds: list[str], limit: int, *, follow: bool) -> Any:
    """The events to show: those after a cursor, or the newest, in the order in which they were recorded."""
    import itertools

    cursor = after
    if not after:
        past = client.events(kinds=kinds, newest_first=True, page_size=min(limit, 1000))
        for event in reversed(list(itertools.islice(past, limit))):
            yield event
            cursor = event.cursor
    if follow:
        yield from client.watch_events(after=cursor, from_now=not cursor, kinds=kinds, min_interval=0.25)
    elif after:
        yield from client.events(after=after, kinds=kinds, page_size=1000)


def _show(event: ProjectEvent, *, as_json: bool) -> None:
    from shardyard._lines import printable
    from shardyard.cli.output import print_json_line
    from shardyard.cli.plain import event_to_plain, to_plain

    if as_json:
        print_json_line({**to_plain(event), "event": event_to_plain(event.event)})
    else:
        print(printable(str(event)), flush=True)
