"""Builds the server: all services, each call checked by the guard. The descriptors say which methods are served."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from google.protobuf import message_factory
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2

from shardyard.v1 import (
    audit_service_pb2,
    auth_service_pb2,
    checkpoint_service_pb2,
    dataset_service_pb2,
    event_service_pb2,
    job_service_pb2,
    log_service_pb2,
    metric_service_pb2,
    model_service_pb2,
    server_service_pb2,
    webhook_service_pb2,
)
from shardyard_coordinator.launch.protocols import ClusterView
from shardyard_coordinator.serve import reflection
from shardyard_coordinator.serve.access import Access
from shardyard_coordinator.serve.addresses import Addresses, Resolve, resolve_host
from shardyard_coordinator.serve.audit_service import AuditService
from shardyard_coordinator.serve.auth_service import AuthService
from shardyard_coordinator.serve.call import Method, Service, method_of
from shardyard_coordinator.serve.checkpoints import CheckpointService
from shardyard_coordinator.serve.choosing import Choosing
from shardyard_coordinator.serve.datasets import DatasetService
from shardyard_coordinator.serve.delivering import Deliverer, Patience
from shardyard_coordinator.serve.door import Door, Late
from shardyard_coordinator.serve.events import EventService
from shardyard_coordinator.serve.exports import Exports
from shardyard_coordinator.serve.fanout import Fanout
from shardyard_coordinator.serve.guard import GuardedServer
from shardyard_coordinator.serve.health import Health
from shardyard_coordinator.serve.jobs import JobService
from shardyard_coordinator.serve.limits import Limits
from shardyard_coordinator.serve.logs import LogService
from shardyard_coordinator.serve.metrics import MetricService
from shardyard_coordinator.serve.models import ModelService
from shardyard_coordinator.serve.observed import Observer
from shardyard_coordinator.serve.parts import Cluster, Parts
from shardyard_coordinator.serve.plans import Plans
from shardyard_coordinator.serve.project_log import Cursors, ProjectLog
from shardyard_coordinator.serve.receiver import Timeouts
from shardyard_coordinator.serve.server_info import ServerService
from shardyard_coordinator.serve.submit import Submitter
from shardyard_coordinator.serve.uploads import Uploads
from shardyard_coordinator.serve.validation.requests import validate
from shardyard_coordinator.serve.watch import Intervals, Watcher
from shardyard_coordinator.serve.webhooks import WebhookService

FILES = (
    job_service_pb2.DESCRIPTOR,
    event_service_pb2.DESCRIPTOR,
    webhook_service_pb2.DESCRIPTOR,
    log_service_pb2.DESCRIPTOR,
    metric_service_pb2.DESCRIPTOR,
    checkpoint_service_pb2.DESCRIPTOR,
    model_service_pb2.DESCRIPTOR,
    dataset_service_pb2.DESCRIPTOR,
    server_service_pb2.DESCRIPTOR,
    auth_service_pb2.DESCRIPTOR,
    audit_service_pb2.DESCRIPTOR,
    health_pb2.DESCRIPTOR,
    *reflection.FILES,
)


@dataclass(frozen=True)
class Info:
    """The facts of GetServerInfo that do not come from the parts. `slots` answers (all, free) of a cluster."""

    slots: Callable[[ClusterView], Awaitable[tuple[int, int]]]
    warnings: Sequence[str] = ()
    event_retention_days: int = 0


@dataclass(frozen=True)
class Sending:
    """How webhooks are delivered; tests shorten the times and give names addresses."""

    resolve: Resolve = resolve_host
    timeouts: Timeouts = field(default_factory=Timeouts)
    patience: Patience = field(default_factory=Patience)


def make_door(limits: Limits, access: Access, observer: Observer | None = None) -> Door:
    """The port of an App that is made later; `observer` sees all calls. Must be made inside the loop that serves it."""
    names = [service.full_name for service in descriptors()]
    health, catalogue = Health(names), reflection.Catalogue(FILES)
    own: list[Service] = [health, *(reflection.Reflection(file, catalogue) for file in reflection.FILES)]
    at_once = {each.full_name for each in own}
    late = Late(each for each in descriptors() if each.full_name not in at_once)
    server = GuardedServer(methods([*late.services, *own]), validate, limits, access, observer)
    return Door(server, health, late, access)


class App:
    """The gRPC face of the coordinator behind an open door, made inside the loop that serves it."""

    def __init__(
        self,
        parts: Parts,
        info: Info,
        intervals: Intervals | None = None,
        *,
        door: Door,
        sending: Sending | None = None,
    ) -> None:
        intervals, sending = intervals or Intervals(), sending or Sending()
        cluster = Cluster(parts.launcher)
        uploads = Uploads(parts)
        self._store = parts.store
        self._fanout = Fanout(parts.store)
        watcher = Watcher(parts, self._fanout, intervals)
        submitter = Submitter(parts, Plans(parts, cluster))
        cursors = Cursors(parts.tokens)
        log = ProjectLog(parts.store, self._fanout, cursors)
        addresses = Addresses(parts.webhook_allow, resolve=sending.resolve)
        self._deliverer = Deliverer(
            parts,
            log,
            self._fanout,
            access=door.access,
            addresses=addresses,
            timeouts=sending.timeouts,
            patience=sending.patience,
        )
        self._door = door
        self.health = self._door.health
        self._services: list[Service] = [
            JobService(parts, submitter, watcher, self._fanout),
            EventService(parts, log, self._fanout, intervals),
            WebhookService(parts, cursors, self._deliverer, addresses),
            LogService(parts, self._fanout, intervals),
            MetricService(parts, self._fanout, intervals),
            CheckpointService(parts),
            ModelService(parts, uploads, Exports(parts, submitter), Choosing(parts, cluster)),
            DatasetService(parts, uploads),
            ServerService(
                parts,
                cluster,
                slots=info.slots,
                warnings=info.warnings,
                event_retention_days=info.event_retention_days,
            ),
            AuthService(parts, self._door.access),
            AuditService(parts),
        ]

    async def start(self) -> None:
        """Begins to serve; health says NOT_SERVING until `health.set_serving`."""
        await self._door.access.open(self._store)
        self._door.late.open(self._services)
        await self._deliverer.start()

    async def stop(self, grace_s: float) -> None:
        """NOT_SERVING, streams end with DRAINING, unary calls finish within the grace."""
        self.health.set_serving(False)
        await self._deliverer.close()
        self._fanout.drain()
        await self._door.server.stop(grace_s)
        self._fanout.close()


def descriptors() -> Iterator[ServiceDescriptor]:
    """Every service that is served."""
    for file in FILES:
        yield from file.services_by_name.values()


def methods(services: Iterable[Service]) -> Iterator[Method]:
    """Every method of every descriptor with its behaviour; KeyError if one has none."""
    by_name = {service.full_name: service.behaviours() for service in services}
    for service in descriptors():
        for method in service.methods:
            request_type = message_factory.GetMessageClass(method.input_type)
            yield method_of(method, request_type, by_name[service.full_name][method.name])
