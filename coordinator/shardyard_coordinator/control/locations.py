"""Where the models and data sets that a spec names lie on the storage."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.control.spec_walk import find_names
from shardyard_coordinator.store import encode, resources


def locations(
    conn: Connection,
    spec: spec_pb2.JobSpec,
    *,
    data_roots: Sequence[str],
    cache_dir: str,
    claim: worker_pb2.StorageClaim,
) -> worker_pb2.Locations:
    """The folder of every named thing that the spec reads, and its files as they were uploaded or made.

    Raises: Refused MODEL_NOT_FOUND, DATASET_NOT_FOUND, MODEL_NOT_READY, DATASET_NOT_READY.
    """
    found = worker_pb2.Locations(data_roots=data_roots, cache_dir=cache_dir, claim=claim)
    for name in referenced(spec):
        record = resources.ready_resource(conn, name)
        found.folders[name] = record.path
        found.known_files[record.path].files.extend(encode.files_to_proto(resources.list_files(conn, record.uid)))
    return found


def folder_of(conn: Connection, name: str) -> str:
    """The folder of a model or data set. Raises: Refused as `locations`."""
    return resources.ready_resource(conn, name).path


def referenced(spec: spec_pb2.JobSpec) -> tuple[str, ...]:
    """The names of the models and data sets that the spec reads, sorted, once each.

    The names must have been validated: `projects/{project}/models/{model}` or `.../datasets/{dataset}`.
    """
    return tuple(sorted({name for _, name in find_names(spec, "spec")}))
