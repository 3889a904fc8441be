"""From bytes to a valid request: counted, parsed and validated; large ones in a thread beside the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Final

from google.protobuf.message import DecodeError, Message

from shardyard_coordinator.domain.errors import FieldViolation, Refused, refused_fields
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.serve.call import Method
from shardyard_coordinator.serve.limits import Limits
from shardyard_coordinator.serve.wire import TooManyNodes, path_of, weigh

Validate = Callable[[Message], None]
# Messages up to this size are handled on the loop, in about 2 ms at most.
_LIGHT_NODES: Final = 1_000
_LIGHT_TEXT_BYTES: Final = 64 * 1024
# A field takes two bytes at least.
_LIGHT_BYTES: Final = 2 * _LIGHT_NODES

# Legitimate requests over Limits.max_message_nodes: 10,000 pairs of texts, a history of 40,000
# items; 100 jobs; files, which the 3 MiB of a header limit.
_MORE_NODES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "shardyard.v1.PredictRequest": 50_000,
        "shardyard.v1.EmbedRequest": 50_000,
        "shardyard.v1.ExplainPredictionRequest": 50_000,
        "shardyard.v1.BatchCreateJobsRequest": 100_000,
        "shardyard.v1.CreateModelRequest": 200_000,
        "shardyard.v1.CreateDatasetRequest": 200_000,
    }
)


class Requests:
    """Reads requests. Large ones share one thread, so that they take at most one processor from the loop."""

    def __init__(self, validate: Validate, limits: Limits) -> None:
        self._validate = validate
        self._limits = limits
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="large-requests")

    def close(self) -> None:
        """Ends the thread after its current message. Idempotent."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def read(self, method: Method, data: bytes) -> Message:
        """The request; Refused MALFORMED_REQUEST for invalid bytes, or with every broken rule."""
        if len(data) <= _LIGHT_BYTES or self._is_light(method, data):
            return self._read(method, data)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._read_large, method, data)

    def _is_light(self, method: Method, data: bytes) -> bool:
        try:
            weight = weigh(data, method.shape, _LIGHT_NODES)
        except TooManyNodes:
            return False
        return weight.text_bytes <= _LIGHT_TEXT_BYTES

    def _read_large(self, method: Method, data: bytes) -> Message:
        descriptor = method.request_type.DESCRIPTOR
        most = max(self._limits.max_message_nodes, _MORE_NODES.get(descriptor.full_name, 0))
        try:
            weigh(data, method.shape, most)
        except TooManyNodes as error:
            text = (
                f"with it the message has over {most:,} fields and items, its lists and nested messages counted; "
                "leave out what is not needed, or send it in several calls"
            )
            field = path_of(descriptor, error.numbers) or "(a field that is not known)"
            raise refused_fields([FieldViolation(field, text)]) from None
        return self._read(method, data)

    def _read(self, method: Method, data: bytes) -> Message:
        try:
            request = method.request_type.FromString(data)
        except DecodeError:
            raise Refused(
                Reason.MALFORMED_REQUEST,
                f"{len(data)} bytes are not a {method.request_type.DESCRIPTOR.full_name}; "
                "send a message of that type, of at most 100 levels, with its strings in UTF-8",
            ) from None
        self._validate(request)
        return request
