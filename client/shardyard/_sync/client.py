# Made from the async source by client/generate_sync.py: change that, never this.
"""The client: one object for one service and one project."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from shardyard._choosing import ChoosingFields, recommend_request
from shardyard._convert import read
from shardyard._messages import build
from shardyard._names import full_name
from shardyard._parse import Draft
from shardyard._requests import JobOptions, Spec, SpecFields, make_draft
from shardyard._sources import local_path
from shardyard._sync.connection import Connection
from shardyard._sync.job import Job
from shardyard._sync.resources import Dataset, Model, pages
from shardyard._sync.transfer import upload, upload_all
from shardyard.types import Plan, RecommendedModels, ServerInfo
from shardyard.v1 import (
    dataset_service_pb2,
    job_service_pb2,
    model_service_pb2,
    server_service_pb2,
)

_INSPECT_S = 120.0  # Model and data are inspected before the answer.


class Client:
    """A connection to a Shardyard service, and a context manager.

    `address` is `host:port`; unset it is SHARDYARD_ADDRESS, else 127.0.0.1:7400. A call that the service
    defers and a stream that breaks are retried until `reconnect_for` seconds have passed without progress.
    """

    def __init__(
        self,
        address: str | None = None,
        token: str | None = None,
        project: str = "default",
        *,
        timeout: float = 30.0,
        reconnect_for: float = 300.0,
    ) -> None:
        self._connection = Connection(address, token, project, timeout=timeout, reconnect_for=reconnect_for)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        """The service's address as `host:port`."""
        return self._connection.address

    @property
    def project(self) -> str:
        """The default project of names without one."""
        return self._connection.project

    def close(self) -> None:
        """Close the connection; jobs are not touched."""
        self._connection.close()

    def server_info(self) -> ServerInfo:
        """About the service and its cluster."""
        request = server_service_pb2.GetServerInfoRequest()
        return read(ServerInfo, self._connection.call(self._connection.server.GetServerInfo, request))

    def submit(
        self,
        spec: Spec,
        *,
        job_id: str | None = None,
        display_name: str = "",
        labels: Mapping[str, str] | None = None,
        queue: str = "",
        priority: str | None = None,
        plan: Plan | str = "",
        **fields: Unpack[SpecFields],
    ) -> Job:
        """Submit a job, exactly once; local files and folders that it names are uploaded first, each once.

        `spec` is a `JobSpec`, or a task with the other fields of `JobSpec` as keywords, or the content of a spec file.
        With a `plan` of it, or its etag, the job runs as planned or not at all.
        Raises: InvalidArgument with every broken rule; Aborted PLAN_STALE; RequestError.
        """
        options = JobOptions(job_id, display_name, labels or {}, queue, priority, plan)
        return self.create_job(make_draft(spec, fields, options, project=self.project))

    def create_job(self, draft: Draft, *, validate_only: bool = False) -> Job:
        """Submit a job that was read from a spec file; with `validate_only` run every check and change nothing."""
        request = build(
            job_service_pb2.CreateJobRequest,
            parent=self._connection.parent,
            job_id=draft.job_id,
            request_id=str(uuid.uuid4()),
            validate_only=validate_only,
            plan_etag=draft.plan_etag,
        )
        upload_all(self._connection, draft.uploads)
        request.job.CopyFrom(draft.job)
        message = self._connection.call(self._connection.jobs.CreateJob, request, timeout=_INSPECT_S)
        return Job(self._connection, message)

    def plan(self, spec: Spec, **fields: Unpack[SpecFields]) -> Plan:
        """What the job would need; nothing runs. Local files and folders are uploaded for inspection."""
        return read(Plan, self.plan_message(make_draft(spec, fields, JobOptions(), project=self.project)))

    def plan_message(self, draft: Draft) -> Any:
        """The plan as its message."""
        upload_all(self._connection, draft.uploads)
        request = job_service_pb2.PlanJobRequest(parent=self._connection.parent, job=draft.job)
        return self._connection.call(self._connection.jobs.PlanJob, request, timeout=_INSPECT_S)

    def recommend_models(self, task: str, **fields: Unpack[ChoosingFields]) -> RecommendedModels:
        """Which models to train for a task, such as `text-classification`, ranked, with what each needs.

        `memory` is what one worker has, such as `4GiB`; `max_latency` and `max_time` are such as `50ms` and `2h`.
        Raises: InvalidArgument with every broken rule.
        """
        return read(RecommendedModels, self.recommend_models_message(task, fields))

    def recommend_models_message(self, task: str, fields: ChoosingFields) -> Any:
        """The recommendations as their message."""
        request = recommend_request(self._connection.parent, task, fields)
        return self._connection.call(self._connection.models.RecommendModels, request, timeout=_INSPECT_S)

    def jobs(self, *, filter: str = "", order_by: str = "", page_size: int = 0, full: bool = False) -> Iterator[Job]:
        """The project's jobs, such as `filter="state = running AND labels.team = nlp"`; without specs unless `full`."""
        request = build(
            job_service_pb2.ListJobsRequest,
            parent=self._connection.parent,
            filter=filter,
            order_by=order_by,
            page_size=page_size,
            view=job_service_pb2.JOB_VIEW_FULL if full else job_service_pb2.JOB_VIEW_BASIC,
        )
        for message in pages(self._connection, self._connection.jobs.ListJobs, request, "jobs"):
            yield Job(self._connection, message)

    def job(self, name: str) -> Job:
        """The job of that id or full name.

        Raises: NotFound.
        """
        full = full_name(self.project, "jobs", name)
        message = self._connection.call(self._connection.jobs.GetJob, job_service_pb2.GetJobRequest(name=full))
        return Job(self._connection, message)

    def upload_dataset(self, path: str | Path) -> Dataset:
        """Upload a file or folder; files that the service already has are not sent again."""
        return Dataset(self._connection, upload(self._connection, local_path("path", path), "datasets"))

    def upload_model(self, path: str | Path) -> Model:
        """Upload a Hugging Face folder; files that the service already has are not sent again."""
        return Model(self._connection, upload(self._connection, local_path("path", path), "models"))

    def models(self, *, page_size: int = 0, show_uploading: bool = False) -> Iterator[Model]:
        """The project's models, the newest first; `show_uploading` adds unfinished uploads."""
        request = build(
            model_service_pb2.ListModelsRequest,
            parent=self._connection.parent,
            page_size=page_size,
            show_uploading=show_uploading,
        )
        for message in pages(self._connection, self._connection.models.ListModels, request, "models"):
            yield Model(self._connection, message)

    def model(self, name: str) -> Model:
        """The model of that id or full name.

        Raises: NotFound.
        """
        full = full_name(self.project, "models", name)
        request = model_service_pb2.GetModelRequest(name=full)
        return Model(self._connection, self._connection.call(self._connection.models.GetModel, request))

    def datasets(self, *, page_size: int = 0, show_uploading: bool = False) -> Iterator[Dataset]:
        """The project's data sets, the newest first; `show_uploading` adds unfinished uploads."""
        request = build(
            dataset_service_pb2.ListDatasetsRequest,
            parent=self._connection.parent,
            page_size=page_size,
            show_uploading=show_uploading,
        )
        for message in pages(self._connection, self._connection.datasets.ListDatasets, request, "datasets"):
            yield Dataset(self._connection, message)

    def dataset(self, name: str) -> Dataset:
        """The data set of that id or full name.

        Raises: NotFound.
        """
        full = full_name(self.project, "datasets", name)
        request = dataset_service_pb2.GetDatasetRequest(name=full)
        message = self._connection.call(self._connection.datasets.GetDataset, request)
        return Dataset(self._connection, message)
