"""Options shared by many commands, and the client made from them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import shlex
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

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
_Ca = Annotated[
    str | None,
    typer.Option("--ca", metavar="<path>", help="TLS: the service's authority, a PEM file or `system`."),
]
_ProfileName = Annotated[
    str | None, typer.Option("--profile", metavar="<name>", help="A server of `shardyard login` [the last one].")
]


class _Asked(NamedTuple):
    """How the command that runs is to reach the service, beside its address."""

    ca: str | None = None
    profile: str | None = None


_ASKED: ContextVar[_Asked] = ContextVar("asked", default=_Asked())  # noqa: B039 - It is immutable.


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
        _, *others = own.parameters.values()
        given = get_type_hints(kind, include_extras=True)
        names = [field.name for field in dataclasses.fields(kind)]

        @functools.wraps(command)
        def called(**values: Any) -> None:
            command(kind(**{name: values.pop(name) for name in names}), **values)

        _describe(called, command, others, {name: given[name] for name in names})
        return called

    return decorate


def reaching(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that calls a service the options `--ca` and `--profile`."""
    own = inspect.signature(command)
    if "address" not in own.parameters:
        return command

    @functools.wraps(command)
    def called(**values: Any) -> None:
        before = _ASKED.set(_Asked(values.pop("ca"), values.pop("profile")))
        try:
            command(**values)
        finally:
            _ASKED.reset(before)

    _describe(called, command, list(own.parameters.values()), {"ca": _Ca, "profile": _ProfileName})
    return called


def _describe(
    called: Callable[..., None], command: Callable[..., None], kept: list[inspect.Parameter], more: dict[str, Any]
) -> None:
    """Tells typer the parameters of a wrapped command: those that it keeps, and further options."""
    hints = get_type_hints(command, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [each.replace(annotation=hints[each.name]) for each in kept]
    parameters += [inspect.Parameter(name, keyword, default=None, annotation=hint) for name, hint in more.items()]
    described: Any = called
    described.__signature__ = inspect.signature(command).replace(parameters=parameters)
    described.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def take_from_profile(ctx: Any) -> None:
    """Lets the profile say what neither the command line nor the environment says: address and project.

    Raises: InvalidArgument, FailedPrecondition.
    """
    if "profile" not in ctx.params:
        return
    from shardyard._reach import profile_of

    source = {name: getattr(ctx.get_parameter_source(name), "name", "") for name in ("address", "project")}
    if ctx.params["profile"] and source["address"] == "ENVIRONMENT":
        ctx.params["address"] = None
    entry = profile_of(ctx.params["address"], ctx.params["profile"])
    if entry is not None and entry.project and source["project"] == "DEFAULT":
        ctx.params["project"] = entry.project


def open_client(address: str | None, project: str) -> Client:
    """A client; the token comes from the profile, or from SHARDYARD_TOKEN."""
    from shardyard._sync.client import Client  # Imported here: gRPC takes longer to import than --help may take.

    asked = _ASKED.get()
    return Client(address, project=project, ca=asked.ca, profile=asked.profile)


def open_probe(address: str | None, timeout: float) -> Client:
    """A client that asks once and waits no longer than `timeout` seconds."""
    from shardyard._sync.client import Client  # Imported here: gRPC takes longer to import than --help may take.

    asked = _ASKED.get()
    return Client(address, ca=asked.ca, profile=asked.profile, timeout=timeout, reconnect_for=0.0)


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
    asked = _ASKED.get()
    known = address in (None, os.environ.get("SHARDYARD_ADDRESS"))
    reach = [] if known else ["--address", str(address)]
    reach += [part for flag, value in asked._asdict().items() if value for part in (f"--{flag}", value)]
    return shlex.join(["shardyard", verb, name, *arguments, *reach])
