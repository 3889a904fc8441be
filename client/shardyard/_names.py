"""Resource names: `projects/{project}/{collection}/{id}`, written short or in full."""

from __future__ import annotations

from shardyard._text import is_utf8, not_utf8, shown
from shardyard.errors import invalid


def parent_name(project: str) -> str:
    """`projects/{project}` of a project's id or name.

    Raises: InvalidArgument if it is not a text.
    """
    _check_text("project", project)
    return project if project.startswith("projects/") else f"projects/{project}"


def full_name(project: str, collection: str, name: str) -> str:
    """The full name of `my-job` or of `projects/p/jobs/my-job`.

    Raises: InvalidArgument for the full name of another kind of resource, or what is not a text.
    """
    _check_text("name", name)
    if "/" not in name:
        return f"{parent_name(project)}/{collection}/{name}"
    parts = name.split("/")
    if len(parts) == 4 and parts[0] == "projects" and parts[2] == collection:
        return name
    raise invalid("name", f"`{name}` is neither an id nor `projects/{{project}}/{collection}/{{id}}`")


def _check_text(field: str, value: object) -> None:
    if not isinstance(value, str):
        raise invalid(field, f"{shown(value)} is given, but text is needed; give an id or a full name")
    if not is_utf8(value):
        raise invalid(field, not_utf8(value))


def last_part(name: str) -> str:
    """The id at the end of a name."""
    return name.rsplit("/", 1)[-1]
