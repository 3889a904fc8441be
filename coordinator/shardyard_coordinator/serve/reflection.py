"""Server reflection, as `grpc.reflection.v1` and as the older `v1alpha` that many tools still ask for.

It knows the files of the services that are served, and what those import: nothing else that this process has loaded,
such as the protocol between service and workers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Final

from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc import code_pb2
from grpc_reflection.v1alpha import reflection_pb2

from shardyard_coordinator.serve.call import Behaviour, Call

_SERVICE: Final = "ServerReflection"
_ALPHA: Final = "grpc.reflection.v1alpha"
_V1: Final = "grpc.reflection.v1"
_NOT_FOUND: Final = (code_pb2.NOT_FOUND, "not found; list the services, then ask for one of their names")
_EMPTY: Final = (code_pb2.INVALID_ARGUMENT, "asks for nothing; set one of the fields of message_request")


def _renamed() -> Any:
    """The file of `grpc.reflection.v1`: that of `v1alpha` under another package (no library ships it)."""
    made = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(made)
    made.name, made.package = "grpc/reflection/v1/reflection.proto", _V1
    for field in (field for message in made.message_type for field in message.field):
        if field.type_name:
            field.type_name = _in_v1(field.type_name)
    for method in made.service[0].method:
        method.input_type, method.output_type = _in_v1(method.input_type), _in_v1(method.output_type)
    pool = DescriptorPool()
    pool.Add(made)  # type: ignore[no-untyped-call]
    return pool.FindFileByName(made.name)  # type: ignore[no-untyped-call]


def _in_v1(name: str) -> str:
    return name.replace(f".{_ALPHA}.", f".{_V1}.")


FILES: Final = (_renamed(), reflection_pb2.DESCRIPTOR)


class Catalogue:
    """Served files by name and by symbol, with all that they import, encoded once."""

    def __init__(self, files: Iterable[FileDescriptor]) -> None:
        self._pool = DescriptorPool()
        self._encoded: dict[str, bytes] = {}
        self._needs: dict[str, tuple[str, ...]] = {}
        self.services: list[str] = []
        for file in files:
            self._add(file)
            self.services += [service.full_name for service in file.services_by_name.values()]
        self.services.sort()

    def _add(self, file: FileDescriptor) -> None:
        if file.name in self._encoded:
            return
        needs = {file.name: None}
        for dependency in file.dependencies:
            self._add(dependency)
            needs |= dict.fromkeys(self._needs[dependency.name])
        proto = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(proto)  # type: ignore[no-untyped-call]
        self._encoded[file.name] = proto.SerializeToString()
        self._needs[file.name] = tuple(needs)
        self._pool.Add(proto)  # type: ignore[no-untyped-call]

    def file(self, name: str) -> list[bytes] | None:
        """The file and what it imports, each an encoded FileDescriptorProto; None if it is not known."""
        needs = self._needs.get(name)
        return None if needs is None else [self._encoded[each] for each in needs]

    def containing(self, symbol: str) -> list[bytes] | None:
        """The file with that service, method, message, field or enum, and what it imports; None if there is none."""
        try:
            return self.file(self._pool.FindFileContainingSymbol(symbol).name)  # type: ignore[no-untyped-call]
        except KeyError:
            return None

    def is_message(self, name: str) -> bool:
        """Whether there is a message of that name."""
        try:
            self._pool.FindMessageTypeByName(name)  # type: ignore[no-untyped-call]
        except KeyError:
            return False
        return True


class Reflection:
    """One version of the service."""

    def __init__(self, file: Any, catalogue: Catalogue) -> None:
        service = file.services_by_name[_SERVICE]
        self.full_name: str = service.full_name
        self._catalogue = catalogue
        self._response: Any = message_factory.GetMessageClass(service.methods[0].output_type)

    def behaviours(self) -> Mapping[str, Behaviour]:
        """The behaviour of each method, by name."""
        return {"ServerReflectionInfo": self.info}

    async def info(self, requests: AsyncIterator[Any], _call: Call) -> AsyncIterator[Any]:
        """Answers each question; an answer reports if nothing is found."""
        async for request in requests:
            response = self._response(valid_host=request.host, original_request=request)
            self._answer(request, response)
            yield response

    def _answer(self, request: Any, response: Any) -> None:
        asked = request.WhichOneof("message_request")
        found: list[bytes] | None = None
        if asked == "list_services":
            for name in self._catalogue.services:
                response.list_services_response.service.add(name=name)
            return
        if asked == "all_extension_numbers_of_type" and self._catalogue.is_message(getattr(request, asked)):
            # Our messages have no extensions.
            response.all_extension_numbers_response.base_type_name = getattr(request, asked)
            return
        if asked == "file_by_filename":
            found = self._catalogue.file(request.file_by_filename)
        elif asked == "file_containing_symbol":
            found = self._catalogue.containing(request.file_containing_symbol)
        if found is not None:
            response.file_descriptor_response.file_descriptor_proto.extend(found)
            return
        response.error_response.error_code, response.error_response.error_message = _NOT_FOUND if asked else _EMPTY
