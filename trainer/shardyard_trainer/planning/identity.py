"""Whether the data is still what was inspected at submission: a job trains on that, or not at all."""

from __future__ import annotations

from shardyard.v1 import plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.digests import CHANGED
from shardyard_trainer.data.errors import DataError, SpecError
from shardyard_trainer.data.sources import named_sources, resolve_source
from shardyard_trainer.data.store import files_fingerprint, fingerprint_of
from shardyard_trainer.failures import RunFailed


def data_fingerprint(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations) -> str:
    """Of the bytes and the order of all data files that a spec names. Raises SpecError if one is not there."""
    return fingerprint_of(
        {
            field: files_fingerprint(resolve_source(source, locations, field=field), field=field)
            for field, source in named_sources(spec)
            if isinstance(source, spec_pb2.DataSource)
        }
    )


def check_same_data(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations, plan: plan_pb2.JobPlan) -> None:
    """Raises RunFailed DATA_NOT_FOUND or DATA_CHANGED; a plan without a fingerprint is compared with nothing."""
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
    if found != plan.data_fingerprint:
        raise RunFailed(
            CHANGED,
            "the data files are not those that were inspected when the job was submitted",
            "submit the job again with the data as it is, or bring back what was there",
            {"fingerprint": found, "planned_fingerprint": plan.data_fingerprint},
        )
