"""Commands about who may do what: `login`, `whoami`, tokens, roles, and the audit log."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from shardyard.cli.options import Address, Json, Project, open_client

if TYPE_CHECKING:
    from shardyard.types import Grant

Limit = Annotated[int, typer.Option("--limit", min=1, help="Maximum number of lines.")]
AllProjects = Annotated[bool, typer.Option("--all-projects", help="In all projects, not only in --project.")]
Member = Annotated[
    str,
    typer.Argument(metavar="MEMBER", help="A principal (alice, oidc:..., cert:...), or a group of JWTs (group:...)."),
]
RoleName = Annotated[str, typer.Argument(metavar="ROLE", help="viewer, submitter, operator or admin.")]


def login(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call this server.")] = "default",
    *,
    ca: Annotated[
        str | None, typer.Option("--ca", metavar="<path>", help="TLS: the service's authority, a PEM file or `system`.")
    ] = None,
    cert: Annotated[str | None, typer.Option("--cert", metavar="<path>", help="A client certificate.")] = None,
    key: Annotated[str | None, typer.Option("--key", metavar="<path>", help="Its key.")] = None,
    server: Annotated[str | None, typer.Option("--address", help="host:port of the service.")] = None,
    project: Annotated[str | None, typer.Option("--project", help="The project of later commands.")] = None,
    json: Json = False,
) -> None:
    """Save a server with its token, for later commands.

    The token is read from the standard input. It is sent to this server only.
    """
    from shardyard._profiles import Profile, save_profile
    from shardyard._reach import absolute
    from shardyard._retry import DEFAULT_ADDRESS
    from shardyard._sync.client import Client
    from shardyard.cli.output import print_json

    profile = Profile(
        name,
        server or DEFAULT_ADDRESS,
        project=project,
        token=None if cert else _read_token(),
        ca=absolute(ca or os.environ.get("SHARDYARD_CA")),
        cert=absolute(cert),
        key=absolute(key),
    )
    with Client(profile.address, profile.token, project, ca=profile.ca, cert=profile.cert, key=profile.key) as client:
        identity = client.access.identity()
    path = save_profile(profile)
    if json:
        print_json({"profile": name, "address": profile.address, "principal": identity.principal, "file": str(path)})
    else:
        print(f"logged in to {profile.address} as {identity.principal}; saved as `{name}` in {path}")


def whoami(address: Address = None, project: Project = "default", json: Json = False) -> None:
    """Say who the service takes you for, and what you may do."""
    from shardyard._lines import moment
    from shardyard.cli.output import print_json, print_pairs
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        identity = client.access.identity()
    if json:
        print_json(to_plain(identity))
        return
    print_pairs(
        [
            ("principal", identity.principal),
            ("by", identity.credential),
            ("groups", ", ".join(identity.groups)),
            ("roles", _grants(identity.roles) or "none yet: ask an admin (`shardyard grant`)"),
            ("narrowed to", _grants(identity.scopes)),
            ("until", moment(identity.expire_time) if identity.expire_time else ""),
        ]
    )


def create_token(
    principal: Annotated[str, typer.Argument(metavar="PRINCIPAL", help="Who will call with it, such as alice.")],
    *,
    scope: Annotated[
        list[str] | None, typer.Option("--scope", help="Narrow it: viewer, or submitter@PROJECT; may be repeated.")
    ] = None,
    ttl: Annotated[str | None, typer.Option("--ttl", help="How long it is valid, such as 30d [90d].")] = None,
    display_name: Annotated[str, typer.Option("--name", help="A note for people.")] = "",
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Make a token. It is printed this once, and nobody can read it again."""
    from shardyard.cli.output import print_json
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        token, secret = client.access.create_token(
            principal, display_name=display_name, scopes=tuple(scope or ()), ttl=ttl
        )
    if json:
        print_json({**to_plain(token), "secret": secret})
        return
    print(secret)
    if sys.stdout.isatty():
        print(f"{token.name} of {principal}; give them a role with `shardyard grant {principal} ROLE`", file=sys.stderr)


def tokens(
    *,
    principal: Annotated[str, typer.Option("--principal", help="Only those of this principal.")] = "",
    ended: Annotated[bool, typer.Option("--ended", help="Also those that are expired or revoked.")] = False,
    limit: Limit = 50,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """List tokens, without their secrets."""
    from shardyard._lines import moment
    from shardyard.cli.output import print_json, print_table
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        listed = client.access.tokens(principal=principal, show_ended=ended, page_size=min(limit, 1000))
        found = list(itertools.islice(listed, limit))
    if json:
        print_json([to_plain(token) for token in found])
        return
    rows = [
        (
            token.name.removeprefix("tokens/"),
            token.principal,
            _grants(token.scopes),
            moment(token.create_time),
            moment(token.expire_time) if token.expire_time else "never",
            moment(token.revoke_time) if token.revoke_time else "",
            token.display_name,
        )
        for token in found
    ]
    print_table(("TOKEN", "PRINCIPAL", "NARROWED TO", "MADE", "EXPIRES", "REVOKED", "NAME"), rows, empty="no tokens")


def revoke_token(
    token: Annotated[str, typer.Argument(metavar="TOKEN", help="Its id, as `shardyard tokens` lists it.")],
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Revoke a token: its calls are refused, its streams end within a second."""
    from shardyard.cli.output import print_json
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        revoked = client.access.revoke_token(token)
    if json:
        print_json(to_plain(revoked))
    else:
        print(f"revoked {revoked.name} of {revoked.principal}")


def roles(
    *,
    member: Annotated[str, typer.Option("--member", help="Only those of this member.")] = "",
    all_projects: AllProjects = False,
    limit: Limit = 50,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """List the roles of a project's members."""
    from shardyard._lines import moment
    from shardyard.cli.output import print_json, print_table
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        listed = client.access.role_bindings(
            project="-" if all_projects else None, member=member, page_size=min(limit, 1000)
        )
        found = list(itertools.islice(listed, limit))
    if json:
        print_json([to_plain(each) for each in found])
        return
    rows = [(each.name.split("/")[1], each.member, each.role, each.creator, moment(each.create_time)) for each in found]
    print_table(("PROJECT", "MEMBER", "ROLE", "GIVEN BY", "GIVEN"), rows, empty="no roles")


def grant(
    member: Member,
    role: RoleName,
    *,
    all_projects: AllProjects = False,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Give a member a role in the project."""
    from shardyard.cli.output import print_json
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        binding = client.access.grant(member, role, project="-" if all_projects else None)
    if json:
        print_json(to_plain(binding))
    else:
        print(f"{member} is {binding.role} in {_where(binding.name.split('/')[1])}")


def withdraw(
    member: Member,
    role: RoleName,
    *,
    all_projects: AllProjects = False,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Take a role back; streams that need it end within a second."""
    from shardyard.cli.output import print_json

    with open_client(address, project) as client:
        client.access.withdraw(member, role, project="-" if all_projects else None)
    if json:
        print_json({"member": member, "role": role})
    else:
        print(f"{member} is not {role} any more in {_where('-' if all_projects else project)}")


def audit(
    *,
    principal: Annotated[str, typer.Option("--principal", help="Only what this principal did.")] = "",
    resource: Annotated[str, typer.Option("--resource", help="Only what was done to this full name.")] = "",
    denied: Annotated[bool, typer.Option("--denied", help="Only what was denied.")] = False,
    since: Annotated[str | None, typer.Option("--since", help="Only the last such time: 30m, 2h, 7d.")] = None,
    all_projects: AllProjects = False,
    limit: Limit = 50,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Show who changed what, and who was denied what, the newest first."""
    from shardyard.cli.output import print_json, print_table
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        listed = client.access.audit(
            project="-" if all_projects else None,
            principal=principal,
            resource=resource,
            denied_only=denied,
            since=_moment_before(since),
            page_size=min(limit, 1000),
        )
        found = list(itertools.islice(listed, limit))
    if json:
        print_json([to_plain(entry) for entry in found])
        return
    rows = [
        (
            f"{entry.time.astimezone():%Y-%m-%d %H:%M:%S}" if entry.time else "",
            entry.principal or f"? ({entry.peer})",
            entry.method.rpartition("/")[2],
            entry.resource,
            entry.outcome + (f" × {entry.count}" if entry.count > 1 else ""),
        )
        for entry in found
    ]
    print_table(("TIME", "WHO", "METHOD", "RESOURCE", "OUTCOME"), rows, empty="no entries")


def _read_token() -> str:
    """The token on the standard input; asked for, without showing it, at a terminal."""
    if sys.stdin.isatty():
        return str(typer.prompt("Token", hide_input=True)).strip()
    token = sys.stdin.readline().strip()
    if not token:
        raise typer.BadParameter("no token is on the standard input; write it there, such as `< admin-token`")
    return token


def _moment_before(span: str | None) -> datetime | None:
    """The time that long ago."""
    from shardyard._parse import duration_s

    if span is None:
        return None
    seconds = duration_s(span)
    if seconds is None or not 0 < seconds < 10**9:
        raise typer.BadParameter(f"`{span}` is not a duration; write 30m, 2h or 7d", param_hint="--since")
    return datetime.now(UTC) - timedelta(seconds=seconds)


def _grants(grants: Iterable[Grant]) -> str:
    return ", ".join(f"{each.role} in {_where(each.project.removeprefix('projects/'))}" for each in grants)


def _where(project: str) -> str:
    return "all projects" if project == "-" else project
