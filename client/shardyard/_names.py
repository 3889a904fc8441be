"""Resource names: `projects/{project}/{collection}/{id}`, written short or in full."""

from __future__ import annotations

from shardyard.errors import invalid


def parent_name(project: str) -> str:
    """`projects/{project}` of a project's id or name."""
    return project if project.startswith("projects/") else f"projects/{project}"


def full_name(project: str, collection: str, name: str) -> str:
    """The full name of `my-job` or of `projects/p/jobs/my-job`.

    Raises: InvalidArgument for the full name of another kind of resource.
    """
    if "/" not in name:
        return f"{parent_name(project)}/{collection}/{name}"
    parts = name.split("/")
    if len(parts) == 4 and parts[0] == "projects" and parts[2] == collection:
        return name
    raise invalid("name", f"`{name}` is neither an id nor `projects/{{project}}/{collection}/{{id}}`")


def last_part(name: str) -> str:
    """The id at the end of a name."""
    return name.rsplit("/", 1)[-1]
