"""Servers by name, with what is needed to reach them: `~/.config/shardyard/config.toml`, for this account alone.

default = "lab"

[servers.lab]
address = "train.example.org:7400"
ca = "/etc/ssl/lab.pem"
project = "nlp"
token = "sy_..."
"""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardyard._text import shown
from shardyard.errors import FailedPrecondition, invalid, local_file

_OTHERS = 0o077


@dataclass(frozen=True)
class Profile:
    """One server by name. What is unset is not needed for it."""

    name: str
    address: str
    project: str | None = None
    token: str | None = None
    ca: str | None = None
    cert: str | None = None
    key: str | None = None


_KEYS = tuple(field.name for field in dataclasses.fields(Profile) if field.name != "name")


def config_path() -> Path:
    """`$SHARDYARD_CONFIG`, else `shardyard/config.toml` in `$XDG_CONFIG_HOME`, else in `~/.config`."""
    if given := os.environ.get("SHARDYARD_CONFIG"):
        return Path(given)
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "shardyard" / "config.toml"


def read_profile(name: str) -> Profile:
    """The profile of that name. Raises: InvalidArgument if there is none; FailedPrecondition for an unusable file."""
    profiles, _ = read_profiles()
    if name not in profiles:
        there = ", ".join(sorted(profiles)) or "none"
        text = f"{shown(name)} is not in {config_path()}, which has: {there}; add it with `shardyard login {name}`"
        raise invalid("profile", text)
    return profiles[name]


def default_profile() -> Profile | None:
    """The profile to use if nothing is said; None: there is none."""
    profiles, default = read_profiles()
    return profiles.get(default)


def read_profiles() -> tuple[dict[str, Profile], str]:
    """All profiles by name, and the name of the default one, which may be empty.

    Raises: FailedPrecondition if the file cannot be read, is not what it should be, or others may read its tokens.
    """
    path = config_path()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}, ""
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(path, error) from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FailedPrecondition(f"{path} is not TOML: {error}; correct it", reason="LOCAL_FILE") from None
    profiles = {name: _profile(path, name, entry) for name, entry in _table(path, data, "servers").items()}
    if any(each.token for each in profiles.values()) and path.stat().st_mode & _OTHERS:
        text = f"{path} has tokens and can be read by other accounts; make it private: chmod 600 {path}"
        raise FailedPrecondition(text, reason="LOCAL_FILE")
    return profiles, str(data.get("default", ""))


def save_profile(profile: Profile) -> Path:
    """Adds or replaces a profile, and makes it the default one; returns the file. Raises: FailedPrecondition."""
    profiles, _ = read_profiles()
    profiles[profile.name] = profile
    return _write(profiles, profile.name)


def remove_profile(name: str) -> Path:
    """Removes a profile with its token. Raises: InvalidArgument if there is none; FailedPrecondition."""
    read_profile(name)
    profiles, default = read_profiles()
    del profiles[name]
    return _write(profiles, "" if default == name else default)


def _write(profiles: dict[str, Profile], default: str) -> Path:
    path = config_path()
    lines = [f"default = {json.dumps(default)}"] if default else []
    for name, profile in sorted(profiles.items()):
        lines += ["", f"[servers.{json.dumps(name)}]"]
        given = {key: getattr(profile, key) for key in _KEYS}
        lines += [f"{key} = {json.dumps(value)}" for key, value in given.items() if value is not None]
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary.unlink(missing_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("\n".join([*lines, ""]))
        temporary.replace(path)
    except OSError as error:
        raise _unusable(path, error) from None
    return path


def _table(path: Path, data: dict[str, Any], key: str) -> dict[str, Any]:
    found = data.get(key, {})
    if not isinstance(found, dict):
        raise FailedPrecondition(f"{path}: `{key}` is not a table; write [{key}.NAME]", reason="LOCAL_FILE")
    return found


def _profile(path: Path, name: str, entry: Any) -> Profile:
    values = entry if isinstance(entry, dict) else {}
    unknown = sorted(set(values) - set(_KEYS))
    wrong = [key for key, value in values.items() if not isinstance(value, str)]
    if unknown or wrong or not values.get("address"):
        text = f"{path}: [servers.{name}] needs an `address`, and texts under {', '.join(_KEYS)}; "
        text += f"correct {', '.join(unknown or wrong or ['address'])}"
        raise FailedPrecondition(text, reason="LOCAL_FILE")
    return Profile(name, **values)


def _unusable(path: Path, error: OSError | UnicodeDecodeError) -> FailedPrecondition:
    if isinstance(error, OSError):
        return local_file(error, f"the file {path}")
    return FailedPrecondition(f"{path} is not UTF-8; correct it", reason="LOCAL_FILE")
