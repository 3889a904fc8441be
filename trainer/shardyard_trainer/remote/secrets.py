"""The values of secrets, in the one process that needs them: checked before they are used, and never part of a text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from shardyard_trainer.data.errors import SpecError

UNUSABLE = "SECRET_UNUSABLE"

_NAMES = {
    "aws_access_key_id": "key",
    "aws_secret_access_key": "secret",
    "aws_session_token": "token",
}
_PRINTABLE = re.compile(r"[\x21-\x7e]+")


class Keys(NamedTuple):
    """The keys of an object store. Their representation shows none of them."""

    key: str
    secret: str
    token: str | None = None

    def __repr__(self) -> str:
        return "Keys(…)"


def token_of(name: str, secrets: Mapping[str, str | None], *, field: str) -> str:
    """A token of the Hub: all of the secret. Raises SpecError SECRET_UNUSABLE."""
    value = _value(name, secrets, field)
    # An HTTP library repeats a header that it cannot send in its error.
    if not _PRINTABLE.fullmatch(value):
        raise _unusable(name, "is not one line of printable characters without spaces", field)
    return value


def keys_of(name: str, secrets: Mapping[str, str | None], *, field: str) -> Keys:
    """Keys as a credentials file of AWS has them, with or without a `[profile]`. Raises SpecError SECRET_UNUSABLE."""
    found: dict[str, str] = {}
    for line in _value(name, secrets, field).splitlines():
        left, equals, right = (part.strip() for part in line.partition("="))
        if equals and left.lower() in _NAMES:
            found[_NAMES[left.lower()]] = right
    if not {"key", "secret"} <= found.keys():
        raise _unusable(name, "has no lines aws_access_key_id = … and aws_secret_access_key = …", field)
    if not all(map(_PRINTABLE.fullmatch, found.values())):
        raise _unusable(name, "has a key with spaces, or with characters that do not print", field)
    return Keys(**found)


def _value(name: str, secrets: Mapping[str, str | None], field: str) -> str:
    value = secrets.get(name)
    if value is None:
        raise _unusable(name, "cannot be read where jobs are planned", field)
    if not value:
        raise _unusable(name, "is empty", field)
    return value


def _unusable(name: str, what: str, field: str) -> SpecError:
    return SpecError(field, UNUSABLE, f"the secret {name} {what}; have the operator correct its file")
