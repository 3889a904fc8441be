"""Options shared by many commands, and the client made from them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

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


def a_path(text: str) -> Path:
    """A path, as typer reads it; an empty one, of a variable that is not set, would mean the current folder.

    Raises: BadParameter.
    """
    if not str(text).strip():
        raise typer.BadParameter(f"`{text}` is empty; give a path, `.` for the current folder")
    return Path(text)


def an_option(*names: str, help: str) -> Any:
    """An option without a default of its own: None if it is not given."""
    return typer.Option(*names, help=help, show_default=False)


def with_options(kind: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command whose first parameter is a dataclass of this kind one option for each of its fields."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command)
        hints = get_type_hints(command, include_extras=True)
        _, *others = own.parameters.values()
        parameters = [each.replace(annotation=hints[each.name]) for each in others]
        given = get_type_hints(kind, include_extras=True)
        names = [field.name for field in dataclasses.fields(kind)]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters += [inspect.Parameter(name, keyword, default=None, annotation=given[name]) for name in names]

        @functools.wraps(command)
        def called(**values: Any) -> None:
            command(kind(**{name: values.pop(name) for name in names}), **values)

        called.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return decorate


def open_client(address: str | None, project: str) -> Client:
    """A client; the token comes from SHARDYARD_TOKEN."""
    from shardyard._sync.client import Client  # Imported here: gRPC takes longer to import than --help may take.

    return Client(address, project=project)


def command_line(verb: str, name: str, *arguments: str, address: str | None) -> str:
    """A command about the resource of that full name, as it is to be typed in this shell.

    The name is short if the project is the one that a command takes here; `address` is what this command was given.
    """
    from shardyard._lines import printable

    name = printable(name)
    parts = name.split("/")
    if len(parts) == 4:
        _, project, collection, resource_id = parts
        if project == (os.environ.get("SHARDYARD_PROJECT") or "default"):
            name = f"dataset:{resource_id}" if collection == "datasets" else resource_id
    known = address in (None, os.environ.get("SHARDYARD_ADDRESS"))
    return shlex.join(["shardyard", verb, name, *arguments, *([] if known else ["--address", str(address)])])
