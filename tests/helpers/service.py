"""A real coordinator's face for tests: a real server on port 0, a real SQLite file, a scripted launcher and compute."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from helpers.clock import ManualClock
from helpers.scripted_compute import ScriptedCompute
from helpers.scripted_launcher import ScriptedLauncher
from helpers.stores import store_at
from shardyard.v1 import (
    audit_service_pb2_grpc,
    auth_service_pb2_grpc,
    checkpoint_service_pb2_grpc,
    dataset_service_pb2_grpc,
    event_service_pb2_grpc,
    explanation_pb2,
    job_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    log_service_pb2_grpc,
    metric_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    server_service_pb2_grpc,
    webhook_service_pb2,
    webhook_service_pb2_grpc,
)
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.control.storage_claim import claim_storage
from shardyard_coordinator.launch.protocols import ClusterView, Launcher
from shardyard_coordinator.seams import NullTrace
from shardyard_coordinator.serve.access import Access
from shardyard_coordinator.serve.app import App, Info, Sending, make_door
from shardyard_coordinator.serve.door import Door
from shardyard_coordinator.serve.limits import Limits
from shardyard_coordinator.serve.observed import NullSpans
from shardyard_coordinator.serve.parts import Parts
from shardyard_coordinator.serve.protection import Authentication
from shardyard_coordinator.serve.tokens import Tokens
from shardyard_coordinator.serve.watch import Intervals
from shardyard_coordinator.store.store import Store, open_store

QUICK = Intervals(heartbeat_s=0.2, least_s=0.001, most_s=0.05, poll_s=0.01)
PARENT = "projects/default"


def plan(request: bytes) -> bytes:
    """A plan that takes every spec as it is: at least 1 worker of 1 core."""
    asked = worker_pb2.PlanRequest.FromString(request)
    result = worker_pb2.PlanResult()
    resolved = result.plan.resolved_spec
    resolved.CopyFrom(asked.spec)
    resolved.resources.workers = asked.spec.resources.workers or 1
    resolved.resources.gpus_per_worker = asked.spec.resources.gpus_per_worker
    resolved.resources.cpus_per_worker = asked.spec.resources.cpus_per_worker or 1
    result.plan.total_steps = asked.spec.optimization.max_steps
    return result.SerializeToString()


def inspect_model(_request: bytes) -> bytes:
    """Every folder is a BERT."""
    return worker_pb2.InspectModelResult(
        model=model_service_pb2.Model(model_type="bert", num_parameters=10)
    ).SerializeToString()


def predict(request: bytes) -> bytes:
    """The text itself is the continuation."""
    call = worker_pb2.PredictCall.FromString(request)
    found = [model_service_pb2.Prediction(generated_text=each.text) for each in call.request.instances]
    return worker_pb2.PredictReply(response=model_service_pb2.PredictResponse(predictions=found)).SerializeToString()


def embed(request: bytes) -> bytes:
    """A vector of one number: the length of the text."""
    call = worker_pb2.EmbedCall.FromString(request)
    found = [model_service_pb2.Embedding(shape=[1], values=[len(each.text)]) for each in call.request.instances]
    return worker_pb2.EmbedReply(response=model_service_pb2.EmbedResponse(embeddings=found)).SerializeToString()


def explain(request: bytes) -> bytes:
    """All of the answer comes from the text."""
    call = worker_pb2.ExplainCall.FromString(request)
    text = call.request.instance.text
    share = explanation_pb2.Attribution(part="text", text=text, end=len(text), score=1.0)
    found = model_service_pb2.Explanation(output=1.0, is_complete=True, attributions=[share])
    return worker_pb2.ExplainReply(response=found).SerializeToString()


ANSWERS: Mapping[str, Callable[[bytes], bytes]] = {
    "shardyard_trainer.planning.plan:plan": plan,
    "shardyard_trainer.answering.inspect:inspect_model": inspect_model,
    "shardyard_trainer.answering.infer:predict": predict,
    "shardyard_trainer.answering.infer:embed": embed,
    "shardyard_trainer.answering.explain:explain": explain,
}


@dataclasses.dataclass
class Service:
    """A service that runs, and stubs to call it."""

    parts: Parts
    app: App
    port: int
    channel: grpc.aio.Channel
    launcher: ScriptedLauncher
    compute: ScriptedCompute
    clock: ManualClock
    access: Access

    def __post_init__(self) -> None:
        self.jobs = job_service_pb2_grpc.JobServiceStub(self.channel)
        self.logs = log_service_pb2_grpc.LogServiceStub(self.channel)
        self.metrics = metric_service_pb2_grpc.MetricServiceStub(self.channel)
        self.checkpoints = checkpoint_service_pb2_grpc.CheckpointServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)
        self.datasets = dataset_service_pb2_grpc.DatasetServiceStub(self.channel)
        self.server = server_service_pb2_grpc.ServerServiceStub(self.channel)
        self.events = event_service_pb2_grpc.EventServiceStub(self.channel)
        self.webhooks = webhook_service_pb2_grpc.WebhookServiceStub(self.channel)
        self.auth = auth_service_pb2_grpc.AuthServiceStub(self.channel)
        self.audit = audit_service_pb2_grpc.AuditServiceStub(self.channel)

    @property
    def store(self) -> Store:
        return self.parts.store


async def _slots(_view: ClusterView) -> tuple[int, int]:
    return 8, 8


@contextlib.asynccontextmanager
async def serving(
    folder: Path,
    *,
    limits: Limits | None = None,
    intervals: Intervals = QUICK,
    answers: Mapping[str, Callable[[bytes], bytes]] = ANSWERS,
    data_roots: tuple[str, ...] = (),
    trace: Any = None,
    compute: ScriptedCompute | None = None,
    launcher: Launcher | None = None,
    webhook_allow: tuple[str, ...] = (),
    sending: Sending | None = None,
    access: Callable[[Any], Access] | None = None,
    tls: tuple[grpc.ServerCredentials, grpc.ChannelCredentials] | None = None,
) -> AsyncIterator[Service]:
    """A service with its store and storage under `folder`; `access` makes who is let in, of the clock; `tls` are the
    credentials of the server, and of the client of the stubs.
    """
    clock, trace = ManualClock(), trace or NullTrace()
    store = await open_store(store_at(folder), clock, trace)
    try:
        async with serving_store(
            store,
            folder,
            clock=clock,
            trace=trace,
            launcher=launcher,
            limits=limits,
            intervals=intervals,
            compute=compute or ScriptedCompute(answers),
            data_roots=data_roots,
            webhook_allow=webhook_allow,
            sending=sending,
            access=access and access(clock),
            tls=tls,
        ) as service:
            yield service
    finally:
        await store.close()


@contextlib.asynccontextmanager
async def serving_store(
    store: Store,
    folder: Path,
    *,
    clock: Any,
    trace: Any = None,
    launcher: ScriptedLauncher | None = None,
    compute: ScriptedCompute | None = None,
    limits: Limits | None = None,
    intervals: Intervals = QUICK,
    data_roots: tuple[str, ...] = (),
    webhook_allow: tuple[str, ...] = (),
    sending: Sending | None = None,
    door: tuple[Door, int] | None = None,
    access: Access | None = None,
    tls: tuple[grpc.ServerCredentials, grpc.ChannelCredentials] | None = None,
    spans: Any = None,
) -> AsyncIterator[Service]:
    """A service over a store that is open, with its storage under `folder`; behind a door with its port, if given."""
    launcher, compute = launcher or ScriptedLauncher(), compute or ScriptedCompute(ANSWERS)
    await claim_storage(folder / "storage", store)
    parts = Parts(
        store=store,
        launcher=launcher,
        compute=compute,
        clock=clock,
        trace=trace or NullTrace(),
        tokens=Tokens(store.secret),
        limits=limits or Limits(),
        storage=folder / "storage",
        projects=frozenset({"default", "other"}),
        data_roots=data_roots,
        webhook_allow=webhook_allow,
        spans=spans or NullSpans(),
    )
    if door is None:
        made = make_door(parts.limits, access or Access(Authentication(), clock))
        door = made, await made.start("127.0.0.1:0", tls and tls[0])
    app = App(parts, Info(slots=_slots), intervals, door=door[0], sending=sending)
    port = door[1]
    await app.start()
    app.health.set_serving(True)
    address = f"127.0.0.1:{port}"
    channel = grpc.aio.secure_channel(address, tls[1]) if tls else grpc.aio.insecure_channel(address)
    try:
        yield Service(parts, app, port, channel, launcher, compute, clock, door[0].access)
    finally:
        await channel.close()
        await app.stop(0)


def a_spec(**changes: Any) -> job_pb2.Job:
    """A job that is accepted: causal language modelling from scratch on an uploaded data set, unless changed."""
    job = job_pb2.Job()
    spec = job.spec
    spec.pretraining.causal_lm.SetInParent()
    spec.model.architecture.model_type = "gpt2"
    spec.tokenizer.train.SetInParent()
    spec.train_data.uri = "/nowhere"
    spec.optimization.max_steps = 4
    for path, value in changes.items():
        owner: Any = job
        *above, last = path.split("__")
        for name in above:
            owner = getattr(owner, name)
        if hasattr(value, "DESCRIPTOR"):
            getattr(owner, last).CopyFrom(value)
        else:
            setattr(owner, last, value)
    return job


def create(
    job_id: str | None = None, job: job_pb2.Job | None = None, **fields: Any
) -> job_service_pb2.CreateJobRequest:
    """A CreateJobRequest in the default project."""
    request = job_service_pb2.CreateJobRequest(parent=PARENT, job=job or a_spec(), **fields)
    if job_id is not None:
        request.job_id = job_id
    return request


def create_webhook(webhook_id: str, parent: str = PARENT) -> webhook_service_pb2.CreateWebhookRequest:
    """A CreateWebhookRequest of a webhook that sends nothing: it is disabled."""
    webhook = webhook_service_pb2.Webhook(url="https://93.184.216.34/hook", disabled=True)
    return webhook_service_pb2.CreateWebhookRequest(parent=parent, webhook_id=webhook_id, webhook=webhook)


@dataclasses.dataclass(frozen=True)
class Failure:
    """What a call failed with, taken apart; exactly one ErrorInfo is asserted."""

    code: grpc.StatusCode
    message: str
    reason: str
    metadata: dict[str, str]
    violations: dict[str, str]
    reasons: dict[str, str]
    retry_after_s: float | None


def failure_of(error: grpc.RpcError) -> Failure:
    """Reads the google.rpc.Status of an error."""
    details = next((value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"), None)
    assert details is not None, f"{error.code()} without details: {error.details()}"
    status = status_pb2.Status.FromString(details)
    infos, violations, reasons, retry = [], {}, {}, None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            infos.append(error_details_pb2.ErrorInfo.FromString(detail.value))
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            for each in error_details_pb2.BadRequest.FromString(detail.value).field_violations:
                violations[each.field], reasons[each.field] = each.description, each.reason
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay.ToTimedelta().total_seconds()
    (info,) = infos
    assert info.domain == "shardyard.dev"
    # The rule of google.rpc.ErrorInfo.
    assert all(re.fullmatch(r"[a-z][a-zA-Z0-9_-]{0,63}", key) for key in info.metadata), info.metadata
    assert status.code == error.code().value[0]
    return Failure(error.code(), status.message, info.reason, dict(info.metadata), violations, reasons, retry)


async def refused(call: Any) -> Failure:
    """Awaits a call that must fail."""
    try:
        answer = await call
    except grpc.RpcError as error:
        return failure_of(error)
    raise AssertionError(f"was accepted: {answer}")
