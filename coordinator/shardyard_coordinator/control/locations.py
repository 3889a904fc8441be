"""The folders on the storage of the models and data sets that a spec names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import Connection

from shardyard.remote_uris import copy_of, parse
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.store import encode, resources


def locations(
    conn: Connection,
    names: Iterable[str],
    *,
    data_roots: Sequence[str],
    torch_hub: Mapping[str, str],
    cache_dir: str,
    claim: worker_pb2.StorageClaim,
    remotes: Iterable[str] = (),
    objects_dir: str = "",
) -> worker_pb2.Locations:
    """The folder of every model and data set that a spec names, and its files as they were uploaded or made; and the
    place of the copy of each pinned URI in `remotes`, whether it is there or not.

    The names must have been validated: `projects/{project}/models/{model}` or `.../datasets/{dataset}`.
    Raises: Refused MODEL_NOT_FOUND, DATASET_NOT_FOUND, MODEL_NOT_READY, DATASET_NOT_READY.
    """
    found = worker_pb2.Locations(data_roots=data_roots, torch_hub=torch_hub, cache_dir=cache_dir, claim=claim)
    for name in names:
        record = resources.ready_resource(conn, name)
        found.folders[name] = record.path
        found.known_files[record.path].files.extend(encode.files_to_proto(resources.list_files(conn, record.uid)))
    for uri in remotes:
        found.folders[uri] = f"{objects_dir}/{copy_of(parse(uri))}"
    return found


def folder_of(conn: Connection, name: str) -> str:
    """The folder of a model or data set. Raises: Refused as `locations`."""
    return resources.ready_resource(conn, name).path
