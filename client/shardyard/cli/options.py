"""Options that many commands have, and the client that they lead to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from shardyard._sync.client import Client

Address = Annotated[
    str | None,
    typer.Option("--address", envvar="SHARDYARD_ADDRESS", help="host:port of the service [127.0.0.1:7400]."),
]
Project = Annotated[str, typer.Option("--project", envvar="SHARDYARD_PROJECT", help="The project.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="A job's id or full name.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A model's id or full name.")]


def open_client(address: str | None, project: str) -> Client:
    """A client; the token comes from SHARDYARD_TOKEN."""
    from shardyard._sync.client import Client  # Here: gRPC takes longer to import than --help may.

    return Client(address, project=project)
