"""Resource names: making, parsing and checking them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from shardyard_coordinator.serve.validation.text import id_complaint, show

_CHECKPOINT: Final = re.compile(r"e([1-9][0-9]{0,8})-s(0|[1-9][0-9]{0,17})")

PATTERNS: Final = {
    "project": "projects/{project}",
    "job": "projects/{project}/jobs/{job}",
    "model": "projects/{project}/models/{model}",
    "dataset": "projects/{project}/datasets/{dataset}",
    "webhook": "projects/{project}/webhooks/{webhook}",
    "checkpoint": "projects/{project}/jobs/{job}/checkpoints/e{attempt}-s{step}",
    "any_project": "projects/{project}",
    "binding": "projects/{project}/roleBindings/{binding}",
    "token": "tokens/{token}",
}
_ALL_PROJECTS: Final = "-"
_OF_ALL: Final = ("any_project", "binding")
"""Kinds whose project may be `-`: all of them."""

_TOKEN: Final = re.compile(r"[a-z2-7]{12}")
_SHAPES: Final = {
    "project": ("projects",),
    "job": ("projects", "jobs"),
    "model": ("projects", "models"),
    "dataset": ("projects", "datasets"),
    "webhook": ("projects", "webhooks"),
    "checkpoint": ("projects", "jobs", "checkpoints"),
    "any_project": ("projects",),
    "binding": ("projects", "roleBindings"),
    "token": ("tokens",),
}


@dataclass(frozen=True)
class Name:
    """The parts of a resource name; `id` is empty for a project, and `project` for a token."""

    project: str
    id: str = ""
    attempt: int = 0
    step: int = 0


def parse(kind: str, name: str) -> Name:
    """A valid name's parts; ValueError with the complaint if it is not valid."""
    if complaint := name_complaint(kind, name):
        raise ValueError(complaint)
    parts = name.split("/")[1::2]
    if kind == "token":
        return Name("", parts[0])
    if kind == "checkpoint":
        found = _CHECKPOINT.fullmatch(parts[2])
        assert found is not None
        return Name(parts[0], parts[1], int(found[1]), int(found[2]))
    return Name(parts[0], parts[1] if len(parts) > 1 else "")


def name_complaint(kind: str, name: str) -> str | None:
    """What is wrong with a resource name of the kind; None: nothing."""
    pattern, shape = PATTERNS[kind], _SHAPES[kind]
    if not name:
        return f"is missing; give a name `{pattern}`, such as {_example(pattern)}"
    parts = name[:513].split("/")
    if len(name) > 512 or len(parts) != 2 * len(shape) or tuple(parts[::2]) != shape:
        return f"{show(name)} is not of the form `{pattern}`; such as {_example(pattern)}"
    for collection, part in zip(parts[::2], parts[1::2], strict=True):
        if collection == "checkpoints":
            if not _CHECKPOINT.fullmatch(part):
                return f"{show(part)} is not e{{attempt}}-s{{step}}; such as `e1-s100`"
        elif collection == "tokens":
            if not _TOKEN.fullmatch(part):
                return f"{show(part)} is not a token's id of 12 of a-z and 2-7; list them with ListTokens"
        elif kind in _OF_ALL and collection == "projects" and part == _ALL_PROJECTS:
            continue
        elif complaint := id_complaint(part):
            return f"{show(name)}: {complaint}"
    return None


def _example(pattern: str) -> str:
    example = pattern.replace("{attempt}", "1").replace("{step}", "100").replace("{project}", "default")
    return "`" + re.sub(r"\{(\w+)\}", r"my-\1", example) + "`"


def project_of(name: str) -> str | None:
    """The project of a name, `-` for all; None if it is in none."""
    parts = name.split("/")
    return parts[1] if parts[0] == "projects" and len(parts) > 1 else None


def project_name(project: str) -> str:
    """`projects/{project}`."""
    return f"projects/{project}"


def job_name(project: str, job: str) -> str:
    """`projects/{project}/jobs/{job}`."""
    return f"projects/{project}/jobs/{job}"


def model_name(project: str, model: str) -> str:
    """`projects/{project}/models/{model}`."""
    return f"projects/{project}/models/{model}"


def dataset_name(project: str, dataset: str) -> str:
    """`projects/{project}/datasets/{dataset}`."""
    return f"projects/{project}/datasets/{dataset}"


def checkpoint_name(project: str, job: str, attempt: int, step: int) -> str:
    """`projects/{project}/jobs/{job}/checkpoints/e{n}-s{step}`."""
    return f"projects/{project}/jobs/{job}/checkpoints/e{attempt}-s{step}"


def attempt_name(project: str, job: str, attempt: int) -> str:
    """`projects/{project}/jobs/{job}/attempts/{n}`."""
    return f"projects/{project}/jobs/{job}/attempts/{attempt}"
