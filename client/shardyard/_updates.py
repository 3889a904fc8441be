"""Changes of jobs and webhooks as requests: which fields, and their new values."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypedDict

from shardyard._parse import Reader
from shardyard._text import shown
from shardyard.errors import invalid, invalid_fields
from shardyard.v1 import job_service_pb2

_MAPS = ("labels", "annotations")
_PATHS = {
    "retry_max": ("spec", "retry", "max"),
    "max_run_time": ("spec", "max_run_time"),
    "keep_last": ("spec", "checkpoints", "keep_last"),
}


class UpdateFields(TypedDict, total=False):
    """What may change of a job; None is the default.

    Of `labels` and `annotations` only the given keys change; a key that is None is removed.
    """

    display_name: str
    labels: Mapping[str, str | None]
    annotations: Mapping[str, str | None]
    external_uri: str
    queue: str
    priority: str | None
    retry_max: int | None
    max_run_time: timedelta | str | None
    keep_last: int | None


def update_request(name: str, etag: str, project: str, fields: UpdateFields) -> job_service_pb2.UpdateJobRequest:
    """The request that changes these fields of a job.

    Raises: InvalidArgument with every value that cannot be one; TypeError for an unknown name.
    """
    request = job_service_pb2.UpdateJobRequest()
    given: dict[str, Any] = {}
    for field, value in fields.items():
        if field not in UpdateFields.__annotations__:
            known = ", ".join(UpdateFields.__annotations__)
            raise TypeError(f"update() has no field `{field}`; there are {known}")
        if field in _MAPS:
            if not isinstance(value, Mapping):
                raise invalid(f"job.{field}", f"{shown(value)} is given, but keys and values are needed")
            request.update_mask.paths.extend(f"{field}.{key}" for key in value)
            given[field] = {key: each for key, each in value.items() if each is not None}
            continue
        path = _PATHS.get(field, (field,))
        request.update_mask.paths.append(".".join(path))
        place = given
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = value
    reader = Reader(Path.cwd(), project)
    reader.fill(request.job, given, "job")
    if reader.violations:
        raise invalid_fields(reader.violations)
    request.job.name, request.job.etag = name, etag
    return request
