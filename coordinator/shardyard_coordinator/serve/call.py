"""One call on its way through the guard, and the parts of a method."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from shardyard_coordinator.seams import Actor
from shardyard_coordinator.serve.wire import Shape, shape_of


@dataclass(frozen=True)
class Call:
    """Who calls what, over which connection, and until when: `deadline_s` is on the loop's clock; None: no limit."""

    method: str
    principal: str
    request_id: str
    deadline_s: float | None
    peer: str = ""

    @property
    def actor(self) -> Actor:
        """The actor that the store records with a change."""
        return Actor(self.principal, self.method, self.request_id)


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
