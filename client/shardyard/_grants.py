"""Roles, scopes and times to live as callers write them, and as messages hold them."""

from __future__ import annotations

from datetime import timedelta

from google.protobuf.duration_pb2 import Duration

from shardyard._messages import build_duration
from shardyard._parse import duration_s
from shardyard._text import shown
from shardyard.errors import invalid
from shardyard.v1 import auth_service_pb2

_ROLES = {name.removeprefix("ROLE_").lower(): number for name, number in auth_service_pb2.Role.items() if number}


def role_number(role: str, field: str = "role") -> auth_service_pb2.Role.ValueType:
    """The number of a role. Raises: InvalidArgument."""
    number = _ROLES.get(str(role).lower())
    if number is None:
        raise invalid(field, f"{shown(role)} is not a role; give one of {', '.join(_ROLES)}")
    return number


def scope_of(text: str) -> auth_service_pb2.Grant:
    """The grant of `viewer`, or of `viewer@project`. Raises: InvalidArgument."""
    role, _, project = str(text).partition("@")
    number = role_number(role, "scopes")
    return auth_service_pb2.Grant(role=number, project=f"projects/{project}" if project else "")


def ttl_of(ttl: str | timedelta | None) -> Duration | None:
    """A time to live as a message. Raises: InvalidArgument."""
    if ttl is None:
        return None
    seconds = duration_s(ttl)
    if seconds is None:
        raise invalid("ttl", f"{shown(ttl)} is not a duration; write `90s`, `12h` or `30d`")
    return build_duration("ttl", seconds)
