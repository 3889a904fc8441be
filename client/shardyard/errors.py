"""The SDK's errors, as a tree of three levels:

    ShardyardError
    ├── RequestError              the service, or a check before the call, refused it
    │   ├── InvalidArgument       fields break rules; every broken one is in `violations`
    │   ├── NotFound
    │   ├── AlreadyExists
    │   ├── FailedPrecondition    the state does not allow it
    │   ├── PermissionDenied
    │   ├── Unauthenticated
    │   ├── ResourceExhausted     a quota or a limit; `retry_after` says when to try again
    │   ├── Aborted               somebody else was faster: a stale etag, a replaced job
    │   ├── OutOfRange            a cursor or an offset that is not there
    │   ├── DataLoss              bytes or events that arrived damaged or not at all
    │   ├── DeadlineExceeded
    │   ├── Cancelled
    │   ├── Unimplemented
    │   ├── Unavailable           nobody answers, or not now
    │   └── Internal              a defect of the service; its log has the id in the message
    └── JobError                  the call went well, the job did not
        ├── JobFailed
        └── JobCancelled

`code` and `reason` are what a program decides by; the message names value, rule and next step and is for people.
Reasons are listed in docs/errors.md.
"""

from __future__ import annotations

import base64
import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardyard._text import escaped

STATUS_DETAILS_KEY = "grpc-status-details-bin"
LONGEST_RETRY_S = 3600.0
"""The longest delay that is waited for, even if the service asks for more."""


@dataclass(frozen=True)
class Violation:
    """One broken rule: the field's path in the request, the value, rule and next step in words, and the reason."""

    field: str
    message: str
    reason: str = "SPEC_INVALID"

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class ShardyardError(Exception):
    """Everything that this package raises on purpose."""

    code = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata: dict[str, str] = dict(metadata or {})
        self.violations: tuple[Violation, ...] = tuple(violations)
        self.retry_after = retry_after

    def to_dict(self) -> dict[str, Any]:
        """The error as plain data, as `--json` prints it."""
        data: dict[str, Any] = {"code": self.code, "reason": self.reason, "message": self.message}
        if self.metadata:
            data["metadata"] = self.metadata
        if self.violations:
            data["violations"] = [vars(violation) for violation in self.violations]
        if self.retry_after is not None:
            data["retry_after_s"] = self.retry_after
        return data


class RequestError(ShardyardError):
    """A call that was refused or not answered."""


class InvalidArgument(RequestError):
    """Fields break rules; `violations` has all of them."""

    code = "INVALID_ARGUMENT"


class NotFound(RequestError):
    """There is no such resource."""

    code = "NOT_FOUND"


class AlreadyExists(RequestError):
    """The id of a job, model or data set is taken."""

    code = "ALREADY_EXISTS"


class FailedPrecondition(RequestError):
    """The state of the resource or of the cluster does not allow it."""

    code = "FAILED_PRECONDITION"


class PermissionDenied(RequestError):
    """Not allowed, whether it exists or not."""

    code = "PERMISSION_DENIED"


class Unauthenticated(RequestError):
    """No token, or not a valid one."""

    code = "UNAUTHENTICATED"


class ResourceExhausted(RequestError):
    """A quota or a limit is used up."""

    code = "RESOURCE_EXHAUSTED"


class Aborted(RequestError):
    """A concurrent change came first."""

    code = "ABORTED"


class OutOfRange(RequestError):
    """A cursor or an offset out of range, or expired."""

    code = "OUT_OF_RANGE"


class DataLoss(RequestError):
    """Bytes or events arrived damaged, or not at all."""

    code = "DATA_LOSS"


class DeadlineExceeded(RequestError):
    """The call's deadline passed."""

    code = "DEADLINE_EXCEEDED"


class Cancelled(RequestError):
    """The call was cancelled."""

    code = "CANCELLED"


class Unimplemented(RequestError):
    """The service has no such method: it is older than this client."""

    code = "UNIMPLEMENTED"


class Unavailable(RequestError):
    """The service does not answer, or cannot at the moment."""

    code = "UNAVAILABLE"


class Internal(RequestError):
    """A defect of the service."""

    code = "INTERNAL"


class JobError(ShardyardError):
    """A job that did not succeed; `job` is its name, `info` its final state (a `JobInfo`)."""

    def __init__(self, message: str, *, job: str, reason: str, info: Any) -> None:
        super().__init__(message, reason=reason, metadata={"job": job})
        self.job = job
        self.info = info


class JobFailed(JobError):
    """The job ended as FAILED; `reason` is the cause."""

    code = "JOB_FAILED"


class JobCancelled(JobError):
    """The job ended as CANCELLED."""

    code = "JOB_CANCELLED"


# What TLS says of a certificate that the authority does not vouch for, or that is for another name.
_WRONG_NAME = "call host does not match ssl server name"
_UNTRUSTED = ("certificate_verify_failed", "certificate signature failure", "hostname verification", _WRONG_NAME)
_BY_CODE: dict[str, type[RequestError]] = {
    kind.code: kind
    for kind in (
        InvalidArgument,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        PermissionDenied,
        Unauthenticated,
        ResourceExhausted,
        Aborted,
        OutOfRange,
        DataLoss,
        DeadlineExceeded,
        Cancelled,
        Unimplemented,
        Unavailable,
        Internal,
    )
}


def from_rpc(error: Any, *, address: str = "") -> RequestError:
    """A `grpc.RpcError` as one of ours, with everything its google.rpc.Status carries."""
    kind = _BY_CODE.get(error.code().name, RequestError)
    message = error.details() or error.code().name
    reason, metadata, violations, retry_after = _details(error.trailing_metadata() or ())
    if _WRONG_NAME in message.lower():
        kind = Unavailable  # For gRPC it is UNAUTHENTICATED, as if the token were wrong.
    if kind is Unavailable and not reason and address:
        metadata["transport"] = message
        if "settings frame" in message.lower() and "http1" not in message.lower():
            metadata["hangs"] = "true"  # The port is open, but no gRPC server answers.
        message = _transport_words(message, address)
    elif kind is DeadlineExceeded and not reason and address:
        message = f"{address} did not answer in time; it may be busy: try again ({message})"
    return kind(message, reason=reason, metadata=metadata, violations=violations, retry_after=retry_after)


def _transport_words(message: str, address: str) -> str:
    """What to do about a connection that failed, from what gRPC says of it."""
    lower = message.lower()
    if "certificate has expired" in lower or "certificate is not yet valid" in lower:
        return f"the certificate of {address} has expired, or a clock is wrong; the operator has to renew it"
    if any(sign in lower for sign in _UNTRUSTED):
        return (
            f"the certificate of {address} is for another name, or not one that the authority of --ca vouches for; "
            "give the authority's file (SHARDYARD_CA), and the name in the certificate"
        )
    if "wrong_version_number" in lower:
        return f"what listens at {address} does not speak TLS; leave --ca (SHARDYARD_CA) out if that is meant"
    if "alpn" in lower or "http1" in lower:
        return f"what listens at {address} does not speak gRPC; give the address of `--listen`, not that of `--http`"
    if "ssl" in lower or "tls" in lower or "handshake" in lower:
        return f"no TLS connection to {address}: {message}; does the service want a client certificate?"
    if "settings frame" in lower:
        return (
            f"what listens at {address} does not answer; if that is the service, see its log, or end it "
            "(`kill -9` its process) and start it again: what it has accepted is not lost"
        )
    if "errors resolving" in lower:
        return f"the name of {address} is not known on this machine; check its spelling: {message}"
    if "last error" in lower and "socket closed" in lower:
        return (
            f"what listens at {address} closes the connection; if the service has TLS, give its authority's file with "
            "--ca (SHARDYARD_CA), else look whether it has ended"
        )
    if "connect" in lower:
        return f"no service answers at {address}; start one with `shardyard serve --address {address}`"
    return f"the connection to {address} broke: {message}"


def invalid(field: str, message: str, *, reason: str = "SPEC_INVALID") -> InvalidArgument:
    """An error found before the call, in the form in which the service reports its own."""
    return invalid_fields([Violation(field, message, reason)])


def local_file(error: OSError, fallback: str) -> FailedPrecondition:
    """An error of this machine's own disk; `fallback` is the message if the error names no file because it was open."""
    where = f"`{escaped(os.fsdecode(error.filename))}`" if error.filename else fallback
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        step = "free some space on its disk, or choose a place on another one"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        step = "choose a place that you may write"
    else:
        step = "choose another place"
    return FailedPrecondition(f"{where}: {error.strerror or error}; {step}", reason="LOCAL_FILE")


def invalid_fields(violations: Sequence[Violation]) -> InvalidArgument:
    """All violations as one error: with their common reason, else SPEC_INVALID; bytes that are not UTF-8 escaped."""
    violations = [Violation(escaped(each.field), escaped(each.message), each.reason) for each in violations]
    reasons = {violation.reason for violation in violations}
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    return InvalidArgument(
        f"{violations[0]}{more}",
        reason=reasons.pop() if len(reasons) == 1 else "SPEC_INVALID",
        violations=violations,
    )


def _details(
    trailers: Sequence[tuple[str, str | bytes]],
) -> tuple[str, dict[str, str], list[Violation], float | None]:
    """Reason, metadata, violations and delay out of the status details; anything else there is ignored."""
    from google.protobuf.message import DecodeError  # Imported here to keep `import shardyard` light.
    from google.rpc import error_details_pb2, status_pb2

    reason, metadata, violations, retry_after = "", {}, [], None
    for key, value in trailers:
        if key != STATUS_DETAILS_KEY:
            continue
        info, request, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        try:
            status = status_pb2.Status.FromString(value if isinstance(value, bytes) else base64.b64decode(value))
            for detail in status.details:
                if detail.Unpack(info):
                    reason, metadata = info.reason, dict(info.metadata)
                elif detail.Unpack(request):
                    violations += [Violation(v.field, v.description, v.reason) for v in request.field_violations]
                elif detail.Unpack(retry):
                    asked_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
                    retry_after = min(max(asked_s, 0.0), LONGEST_RETRY_S)
        except (DecodeError, ValueError):
            continue  # From a proxy, not from the service: code and message are still used.
    return reason, metadata, violations, retry_after
