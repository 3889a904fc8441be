"""One call on its way through the guard, and the parts of a method."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import unquote

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from shardyard_coordinator.domain.access import Caller, Permission
from shardyard_coordinator.seams import Actor
from shardyard_coordinator.serve.certificates import Holder
from shardyard_coordinator.serve.permissions import no_right
from shardyard_coordinator.serve.rights import Rights
from shardyard_coordinator.serve.wire import Shape, shape_of


@dataclass(frozen=True)
class Call:
    """Who calls what, over which connection, and until when: `deadline_s` is on the loop's clock; None: no limit.

    `peer` is the caller's address in gRPC's form, `holder` whom its client certificate names; None: it has none.
    `project` and `resource` are those that the request names, once it is read. `only_own`: what others made in the
    project may not be changed. `traceparent` is the span of the call in W3C's form; empty: the call is not traced.
    """

    method: str
    caller: Caller
    request_id: str
    deadline_s: float | None
    peer: str = ""
    holder: Holder | None = None
    rights: Rights = field(default_factory=Rights, repr=False)
    project: str | None = None
    resource: str = ""
    only_own: bool = True
    traceparent: str = ""

    @property
    def principal(self) -> str:
        """Who calls."""
        return self.caller.principal

    @property
    def host(self) -> str:
        """The address that it comes from, without the port."""
        kind, _, rest = unquote(self.peer).partition(":")
        return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else self.peer

    @property
    def actor(self) -> Actor:
        """The actor that the store records with a change."""
        return Actor(
            self.principal, self.method, self.request_id, self.caller.credential, self.host, only_own=self.only_own
        )

    def check_use(self, project: str) -> None:
        """Raises: Refused ACCESS_DENIED unless the caller may read what is in the project: train on it, ask it."""
        if not self.rights.may(self.caller, Permission.SUBMIT, project):
            raise no_right(project)


# Which of the four shapes a behaviour has follows from the descriptor of its method.
Behaviour = Callable[[Any, Call], Awaitable[Message]] | Callable[[Any, Call], AsyncIterator[Message | bytes]]


class Service(Protocol):
    """A service's name and its behaviours by method name."""

    full_name: str

    def behaviours(self) -> Mapping[str, Behaviour]:
        """The behaviour of each method, by name."""


@dataclass(frozen=True)
class Method:
    """A method that is served: its path `/package.Service/Method`, its types and its behaviour."""

    path: str
    request_type: type[Message]
    client_streaming: bool
    server_streaming: bool
    behaviour: Behaviour
    shape: Shape = field(repr=False)


def method_of(descriptor: MethodDescriptor, request_type: type[Message], behaviour: Behaviour) -> Method:
    """Makes the method of a descriptor."""
    return Method(
        path=f"/{descriptor.containing_service.full_name}/{descriptor.name}",
        request_type=request_type,
        client_streaming=descriptor.client_streaming,
        server_streaming=descriptor.server_streaming,
        behaviour=behaviour,
        shape=shape_of(descriptor.input_type),
    )
