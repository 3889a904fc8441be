"""Whether the data is still what was inspected at submission: a job trains on that, or not at all.

An attempt that finds the data unchanged leaves a list of its files in the job's folder, so that a later one can say
which of them are not the same any more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from shardyard.v1 import plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.digests import CHANGED, file_sha256
from shardyard_trainer.data.errors import DataError, SpecError, shorten
from shardyard_trainer.data.sources import named_sources, open_regular, resolve_source
from shardyard_trainer.data.store import files_fingerprint, fingerprint_of
from shardyard_trainer.failures import RunFailed

FILES = "data-files.json"
MOST_FILES = 10_000
"""Of more files no list is kept: one of many pictures would be large."""
MOST_NAMED = 5

_Files: TypeAlias = dict[str, dict[str, list[Any]]]
"""By field and name: the size in bytes, and the sha256."""


def data_fingerprint(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations) -> str:
    """Of the bytes and the order of all data files that a spec names. Raises SpecError if one is not there."""
    return fingerprint_of(
        {
            field: files_fingerprint(resolve_source(source, locations, field=field), field=field)
            for field, source in named_sources(spec)
            if isinstance(source, spec_pb2.DataSource)
        }
    )


def check_same_data(
    spec: spec_pb2.JobSpec, locations: worker_pb2.Locations, plan: plan_pb2.JobPlan, *, job_dir: str = ""
) -> None:
    """Raises RunFailed DATA_NOT_FOUND or DATA_CHANGED; a plan without a fingerprint is compared with nothing.

    `job_dir`, if there is one, keeps the list of files.
    """
    if not plan.data_fingerprint:
        return
    try:
        found = data_fingerprint(spec, locations)
    except (SpecError, FileNotFoundError) as error:
        if isinstance(error, SpecError) and error.reason == CHANGED:
            raise RunFailed(CHANGED, error.message, "restore the file that is named", error.metadata) from error
        message = error.message if isinstance(error, SpecError) else f"{error.filename} is not there"
        raise RunFailed(
            "DATA_NOT_FOUND",
            f"the data that the job was submitted with cannot be read any more: {message}",
            "restore it, or submit the job with its new path",
            error.metadata if isinstance(error, DataError) else None,
        ) from error
    kept = Path(job_dir, FILES) if job_dir else None
    if found != plan.data_fingerprint:
        changes = list(_changes(_read(kept), _files(spec, locations))) if kept else []
        more = f"; and {len(changes) - MOST_NAMED} more" if len(changes) > MOST_NAMED else ""
        named = f": {'; '.join(changes[:MOST_NAMED])}{more}" if changes else ""
        raise RunFailed(
            CHANGED,
            f"the data files are not those that were inspected when the job was submitted{named}",
            "submit the job again with the data as it is, or bring back what was there",
            {"fingerprint": found, "planned_fingerprint": plan.data_fingerprint},
        )
    # The list is only for messages: a job can do without.
    with suppress(OSError):
        if kept and not kept.exists():
            _write(kept, _files(spec, locations))


def _files(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations) -> _Files:
    """The data files as they are now; their hashes are known already."""
    return {
        field: {
            file.name: [file.path.stat().st_size, file_sha256(file.path, file.name, open_regular)]
            for file in resolve_source(source, locations, field=field)
        }
        for field, source in named_sources(spec)
        if isinstance(source, spec_pb2.DataSource)
    }


def _changes(before: _Files, now: _Files) -> Iterator[str]:
    """What is another file than before, in words."""
    for field, files in before.items():
        found = now.get(field, {})
        for name, (size, digest) in files.items():
            if name not in found:
                yield f"{shorten(name)} ({field}) is gone"
            elif found[name][1] != digest:
                yield f"{shorten(name)} ({field}) has other content ({found[name][0]:,} bytes; it had {size:,})"
        yield from (f"{shorten(name)} ({field}) is new" for name in found if name not in files)


def _read(path: Path) -> _Files:
    """The list that an earlier attempt has left; empty if there is none."""
    with suppress(OSError, ValueError):
        found: _Files = json.loads(path.read_bytes())
        return found
    return {}


def _write(path: Path, files: _Files) -> None:
    """Renamed into place: the ranks of a job all write it."""
    if sum(map(len, files.values())) > MOST_FILES:
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(files), encoding="utf-8")
    partial.replace(path)
