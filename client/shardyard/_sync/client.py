# Made from the async source by client/generate_sync.py: change that, never this.
"""The client: one object for one service and one project."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from shardyard._choosing import ChoosingFields, recommend_request
from shardyard._convert import read, read_project_event
from shardyard._messages import build
from shardyard._names import full_name
from shardyard._parse import Draft
from shardyard._reach import reach_of
from shardyard._requests import JobOptions, Spec, SpecFields, event_kinds, make_draft
from shardyard._sources import local_path
from shardyard._sync import runtime
from shardyard._sync.access import Access
from shardyard._sync.connection import Connection
from shardyard._sync.job import Job
from shardyard._sync.resources import Dataset, Model, pages
from shardyard._sync.transfer import upload, upload_all
from shardyard._sync.webhooks import Webhook, follow_project
from shardyard.types import JobInfo, Plan, ProjectEvent, RecommendedModels, ServerInfo
from shardyard.v1 import (
    dataset_service_pb2,
    event_service_pb2,
    job_service_pb2,
    model_service_pb2,
    server_service_pb2,
    webhook_service_pb2,
)

_INSPECT_S = 120.0  # Model and data are inspected before the answer.
_BATCH_S = 600.0
_SERVING = b"\x08\x01"  # A HealthCheckResponse with the status SERVING.


class Client:
    """A connection to a Shardyard service, and a context manager.

    `address` is `host:port`; unset it is that of the `profile`, or SHARDYARD_ADDRESS, else 127.0.0.1:7400. The token is
    sent by TLS only, except on this machine: `ca` is a file with the service's authority, or `system`. `cert` and `key`
    are files of a client certificate. What is unset comes from the profile (`shardyard login`), or from
    SHARDYARD_TOKEN, SHARDYARD_TOKEN_FILE, SHARDYARD_CA, SHARDYARD_CERT and SHARDYARD_KEY. A call that the service
    defers and a stream that breaks are retried until `reconnect_for` seconds have passed without progress.
    Raises: InvalidArgument, FailedPrecondition for a file that cannot be used.
    """

    def __init__(
        self,
        address: str | None = None,
        token: str | None = None,
        project: str | None = None,
        *,
        ca: str | Path | None = None,
        cert: str | Path | None = None,
        key: str | Path | None = None,
        profile: str | None = None,
        timeout: float = 30.0,
        reconnect_for: float = 300.0,
    ) -> None:
        reach = reach_of(address, token, project, ca=ca, cert=cert, key=key, profile=profile)
        self._connection = Connection(reach, timeout=timeout, reconnect_for=reconnect_for)

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

    @property
    def access(self) -> Access:
        """Who may do what: tokens, roles, and the audit log."""
        return Access(self._connection)

    def close(self) -> None:
        """Close the connection; jobs are not touched."""
        self._connection.close()

    def server_info(self) -> ServerInfo:
        """About the service and its cluster."""
        request = server_service_pb2.GetServerInfoRequest()
        return read(ServerInfo, self._connection.call(self._connection.server.GetServerInfo, request))

    def is_serving(self) -> bool:
        """Whether the service says that it serves calls (`grpc.health.v1`): not while it starts or stops.

        Raises: Unavailable if nothing answers.
        """
        return bool(self._connection.call(self._connection.check_health, b"") == _SERVING)

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
        annotations: Mapping[str, str] | None = None,
        external_uri: str = "",
        **fields: Unpack[SpecFields],
    ) -> Job:
        """Submit a job, exactly once; local files and folders that it names are uploaded first, each once.

        `spec` is a `JobSpec`, or a task with the other fields of `JobSpec` as keywords, or the content of a spec file.
        `labels`, `annotations` and `external_uri`, a link back to a page of yours, are what filters find it by.
        With a `plan` of it, or its etag, the job runs as planned or not at all.
        Raises: InvalidArgument with every broken rule; Aborted PLAN_STALE; RequestError.
        """
        options = JobOptions(job_id, display_name, labels or {}, queue, priority, plan, annotations or {}, external_uri)
        return self.create_job(make_draft(spec, fields, options, project=self.project))

    def submit_all(self, specs: Sequence[Spec], *, validate_only: bool = False) -> list[Job]:
        """Submit up to 100 jobs, all of them or none, each as `submit` takes it; the jobs in the same order.

        Raises: InvalidArgument with every broken rule, under `requests[INDEX]`; RequestError.
        """
        drafts = [make_draft(spec, {}, JobOptions(), project=self.project) for spec in specs]
        request = job_service_pb2.BatchCreateJobsRequest(parent=self._connection.parent)
        for draft in drafts:
            upload_all(self._connection, draft.uploads)
            each = build(
                job_service_pb2.CreateJobRequest,
                job_id=draft.job_id,
                request_id=str(uuid.uuid4()),
                validate_only=validate_only,
                plan_etag=draft.plan_etag,
            )
            each.job.CopyFrom(draft.job)
            request.requests.append(each)
        answer = self._connection.call(self._connection.jobs.BatchCreateJobs, request, timeout=_BATCH_S)
        return [Job(self._connection, message) for message in answer.jobs]

    def cancel_all(self, jobs: Sequence[Job | str]) -> list[JobInfo]:
        """Ask up to 1,000 jobs to end, all of them or none; their new states. One that has ended stays as it is.

        Raises: NotFound with every job that is not there, under `names[INDEX]`.
        """
        names = [full_name(self.project, "jobs", job.name if isinstance(job, Job) else job) for job in jobs]
        request = build(job_service_pb2.BatchCancelJobsRequest, parent=self._connection.parent, names=names)
        answer = self._connection.call(self._connection.jobs.BatchCancelJobs, request)
        return [read(JobInfo, message) for message in answer.jobs]

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

    def events(
        self, *, after: str = "", kinds: Sequence[str] = (), newest_first: bool = False, page_size: int = 0
    ) -> Iterator[ProjectEvent]:
        """The events of all jobs of the project that are recorded now, the oldest first; `after` is a cursor.

        Raises: OutOfRange CURSOR_EXPIRED if events after the cursor are gone.
        """
        request = build(
            event_service_pb2.ListEventsRequest,
            parent=self._connection.parent,
            after_cursor=after,
            kinds=event_kinds(kinds),
            order_by="time desc" if newest_first else "time",
            page_size=page_size,
        )
        for message in pages(self._connection, self._connection.events.ListEvents, request, "events"):
            yield read_project_event(message)

    def watch_events(
        self,
        *,
        after: str = "",
        from_now: bool = False,
        kinds: Sequence[str] = (),
        min_interval: float | None = None,
    ) -> Iterator[ProjectEvent]:
        """Every event of all jobs of the project after a cursor, each exactly once, for as long as it is read.

        Each event has the `cursor` that continues after it, in another process too. Without `after` all that are kept
        come first, unless `from_now`. A broken connection is reopened, and the stream continues at the same event.
        Raises: RequestError; OutOfRange CURSOR_EXPIRED if events after the cursor are gone; DataLoss EVENT_GAP.
        """
        stream = follow_project(
            self._connection, after=after, from_now=from_now, kinds=kinds, min_interval=min_interval
        )
        with runtime.closing(stream) as found:
            for event in found:
                yield event

    def create_webhook(
        self, webhook_id: str, url: str, *, kinds: Sequence[str] = (), after: str = "", disabled: bool = False
    ) -> Webhook:
        """Have each event of the project, or those of these kinds, sent to a URL from now on, or after a cursor.

        `secret` of the webhook is the key of the signatures; it is not shown again.
        Raises: AlreadyExists; InvalidArgument ADDRESS_NOT_ALLOWED for an address that is not public.
        """
        request = build(
            webhook_service_pb2.CreateWebhookRequest,
            parent=self._connection.parent,
            webhook_id=webhook_id,
            request_id=str(uuid.uuid4()),
        )
        fields = {"url": url, "kinds": event_kinds(kinds), "cursor": after, "disabled": disabled}
        request.webhook.CopyFrom(build(webhook_service_pb2.Webhook, "webhook", **fields))
        message = self._connection.call(self._connection.webhooks.CreateWebhook, request)
        return Webhook(self._connection, message)

    def webhooks(self) -> Iterator[Webhook]:
        """The project's webhooks, the oldest first."""
        request = webhook_service_pb2.ListWebhooksRequest(parent=self._connection.parent)
        for message in pages(self._connection, self._connection.webhooks.ListWebhooks, request, "webhooks"):
            yield Webhook(self._connection, message)

    def webhook(self, name: str) -> Webhook:
        """The webhook of that id or full name.

        Raises: NotFound.
        """
        request = webhook_service_pb2.GetWebhookRequest(name=full_name(self.project, "webhooks", name))
        return Webhook(self._connection, self._connection.call(self._connection.webhooks.GetWebhook, request))

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
