"""Why a call was refused: one enum, one table of gRPC codes and sentences (docs/errors.md lists them from here)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple


class Code(StrEnum):
    """The gRPC status codes that are used, by name; the numbers belong to the wire."""

    CANCELLED = "CANCELLED"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    ABORTED = "ABORTED"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"
    DATA_LOSS = "DATA_LOSS"


class Reason(StrEnum):
    """The reason in every error's ErrorInfo."""

    SPEC_INVALID = "SPEC_INVALID"
    MALFORMED_REQUEST = "MALFORMED_REQUEST"
    BATCH_NOT_DIVISIBLE = "BATCH_NOT_DIVISIBLE"
    OBJECTIVE_UNSUPPORTED = "OBJECTIVE_UNSUPPORTED"
    PRECISION_UNSUPPORTED = "PRECISION_UNSUPPORTED"
    MODEL_DOES_NOT_FIT = "MODEL_DOES_NOT_FIT"
    TOO_LARGE_FOR_CLUSTER = "TOO_LARGE_FOR_CLUSTER"
    PATH_NOT_ALLOWED = "PATH_NOT_ALLOWED"
    ADDRESS_NOT_ALLOWED = "ADDRESS_NOT_ALLOWED"
    MODEL_INVALID = "MODEL_INVALID"
    MODEL_UNSAFE = "MODEL_UNSAFE"
    CUSTOM_CODE_REFUSED = "CUSTOM_CODE_REFUSED"
    TOKENIZER_MISSING = "TOKENIZER_MISSING"
    LABEL_MISMATCH = "LABEL_MISMATCH"
    DATA_INVALID = "DATA_INVALID"
    TASK_MISMATCH = "TASK_MISMATCH"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    PAGE_TOKEN_INVALID = "PAGE_TOKEN_INVALID"
    CURSOR_INVALID = "CURSOR_INVALID"
    FILTER_INVALID = "FILTER_INVALID"
    CHUNK_TOO_LARGE = "CHUNK_TOO_LARGE"
    UPLOAD_MISMATCH = "UPLOAD_MISMATCH"
    FIELD_IMMUTABLE = "FIELD_IMMUTABLE"
    JOB_NOT_FOUND = "JOB_NOT_FOUND"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    REVISION_NOT_FOUND = "REVISION_NOT_FOUND"
    DATASET_NOT_FOUND = "DATASET_NOT_FOUND"
    FILE_NOT_FOUND = "FILE_NOT_FOUND"
    OBJECT_NOT_FOUND = "OBJECT_NOT_FOUND"
    CHECKPOINT_NOT_FOUND = "CHECKPOINT_NOT_FOUND"
    QUEUE_NOT_FOUND = "QUEUE_NOT_FOUND"
    METRIC_NOT_FOUND = "METRIC_NOT_FOUND"
    WEBHOOK_NOT_FOUND = "WEBHOOK_NOT_FOUND"
    TOKEN_NOT_FOUND = "TOKEN_NOT_FOUND"
    ROLE_BINDING_NOT_FOUND = "ROLE_BINDING_NOT_FOUND"
    SERVICE_NOT_FOUND = "SERVICE_NOT_FOUND"
    JOB_EXISTS = "JOB_EXISTS"
    MODEL_EXISTS = "MODEL_EXISTS"
    DATASET_EXISTS = "DATASET_EXISTS"
    WEBHOOK_EXISTS = "WEBHOOK_EXISTS"
    CREDENTIALS_MISSING = "CREDENTIALS_MISSING"
    CREDENTIALS_INVALID = "CREDENTIALS_INVALID"
    CREDENTIALS_EXPIRED = "CREDENTIALS_EXPIRED"
    ACCESS_DENIED = "ACCESS_DENIED"
    INVALID_STATE = "INVALID_STATE"
    MODEL_NOT_READY = "MODEL_NOT_READY"
    MODEL_CHANGED = "MODEL_CHANGED"
    DATASET_NOT_READY = "DATASET_NOT_READY"
    DATA_CHANGED = "DATA_CHANGED"
    OBJECT_STORE_REFUSED = "OBJECT_STORE_REFUSED"
    SECRET_UNUSABLE = "SECRET_UNUSABLE"
    MODEL_IN_USE = "MODEL_IN_USE"
    DATASET_IN_USE = "DATASET_IN_USE"
    ETAG_MISMATCH = "ETAG_MISMATCH"
    PLAN_STALE = "PLAN_STALE"
    JOB_REPLACED = "JOB_REPLACED"
    UPLOAD_IN_PROGRESS = "UPLOAD_IN_PROGRESS"
    CURSOR_AHEAD = "CURSOR_AHEAD"
    CURSOR_EXPIRED = "CURSOR_EXPIRED"
    OFFSET_OUT_OF_RANGE = "OFFSET_OUT_OF_RANGE"
    CRC_MISMATCH = "CRC_MISMATCH"
    CHECKSUM_MISMATCH = "CHECKSUM_MISMATCH"
    FILE_DAMAGED = "FILE_DAMAGED"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    RATE_LIMITED = "RATE_LIMITED"
    RESPONSE_TOO_LARGE = "RESPONSE_TOO_LARGE"
    SLOW_CONSUMER = "SLOW_CONSUMER"
    OVERLOADED = "OVERLOADED"
    TOO_MANY_WATCHERS = "TOO_MANY_WATCHERS"
    INSPECTION_UNAVAILABLE = "INSPECTION_UNAVAILABLE"
    HUB_UNREACHABLE = "HUB_UNREACHABLE"
    OBJECT_STORE_UNREACHABLE = "OBJECT_STORE_UNREACHABLE"
    ISSUER_UNREACHABLE = "ISSUER_UNREACHABLE"
    STORE_FULL = "STORE_FULL"
    STORE_BUSY = "STORE_BUSY"
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"
    STORAGE_FULL = "STORAGE_FULL"
    STORAGE_NOT_WRITABLE = "STORAGE_NOT_WRITABLE"
    STORAGE_UNAVAILABLE = "STORAGE_UNAVAILABLE"
    DRAINING = "DRAINING"
    STARTING = "STARTING"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    METHOD_UNKNOWN = "METHOD_UNKNOWN"
    INTERNAL = "INTERNAL"


class Meaning(NamedTuple):
    """A reason's gRPC code and what it means."""

    code: Code
    sentence: str


_IA, _NF, _FP = Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION

MEANINGS: Mapping[Reason, Meaning] = MappingProxyType(
    {
        Reason.SPEC_INVALID: Meaning(
            _IA, "One or more fields break a rule; each violation names field, value and rule."
        ),
        Reason.MALFORMED_REQUEST: Meaning(_IA, "The bytes are not a message of the method's type."),
        Reason.BATCH_NOT_DIVISIBLE: Meaning(_IA, "micro_batch_size × accumulation × workers is not the global batch."),
        Reason.OBJECTIVE_UNSUPPORTED: Meaning(_IA, "The model cannot be trained for this objective."),
        Reason.PRECISION_UNSUPPORTED: Meaning(_IA, "The hardware or the ZeRO stage does not support the precision."),
        Reason.MODEL_DOES_NOT_FIT: Meaning(
            _IA, "The model states, or the samples of a step, exceed a worker's memory."
        ),
        Reason.TOO_LARGE_FOR_CLUSTER: Meaning(_FP, "No node set of the cluster could ever hold the gang."),
        Reason.PATH_NOT_ALLOWED: Meaning(_IA, "The path is not a regular file or folder under an allowed data root."),
        Reason.ADDRESS_NOT_ALLOWED: Meaning(_IA, "The URI's scheme or address is not allowed."),
        Reason.MODEL_INVALID: Meaning(_IA, "The model folder is not one that loads."),
        Reason.MODEL_UNSAFE: Meaning(_IA, "The model's weights could run code; only safetensors are loaded."),
        Reason.CUSTOM_CODE_REFUSED: Meaning(
            _IA, "The model needs Python code that the operator does not allow to run."
        ),
        Reason.TOKENIZER_MISSING: Meaning(_IA, "Neither the model nor the spec has a tokenizer."),
        Reason.LABEL_MISMATCH: Meaning(
            _IA, "The model's head has other labels than the data; ask for a new head, or give data with its labels."
        ),
        Reason.DATA_INVALID: Meaning(_IA, "The data cannot be trained on; file, line and value are named."),
        Reason.TASK_MISMATCH: Meaning(_IA, "The model was not trained for what is asked of it."),
        Reason.REQUEST_ID_REUSED: Meaning(_IA, "The request id was used with another request."),
        Reason.PAGE_TOKEN_INVALID: Meaning(_IA, "The page token is not one of this list and these parameters."),
        Reason.CURSOR_INVALID: Meaning(_IA, "The cursor is not one of this stream."),
        Reason.FILTER_INVALID: Meaning(_IA, "The filter is not `FIELD OP VALUE` joined by AND."),
        Reason.CHUNK_TOO_LARGE: Meaning(_IA, "A chunk is larger than 1 MiB."),
        Reason.UPLOAD_MISMATCH: Meaning(
            _IA, "An upload breaks its announcement: order, size, file or end; nothing of the broken part is kept."
        ),
        Reason.FIELD_IMMUTABLE: Meaning(_IA, "The field cannot be changed by an update."),
        Reason.JOB_NOT_FOUND: Meaning(_NF, "There is no such job."),
        Reason.MODEL_NOT_FOUND: Meaning(_NF, "There is no such model."),
        Reason.REVISION_NOT_FOUND: Meaning(_NF, "The Hub model has no such revision."),
        Reason.DATASET_NOT_FOUND: Meaning(_NF, "There is no such data set."),
        Reason.FILE_NOT_FOUND: Meaning(_NF, "The model or data set has no such file."),
        Reason.OBJECT_NOT_FOUND: Meaning(_NF, "The object store has no such object, nor objects below it."),
        Reason.CHECKPOINT_NOT_FOUND: Meaning(_NF, "There is no such checkpoint."),
        Reason.QUEUE_NOT_FOUND: Meaning(_NF, "There is no such queue."),
        Reason.METRIC_NOT_FOUND: Meaning(_NF, "The job has no such metric."),
        Reason.WEBHOOK_NOT_FOUND: Meaning(_NF, "There is no such webhook."),
        Reason.TOKEN_NOT_FOUND: Meaning(_NF, "There is no such token."),
        Reason.ROLE_BINDING_NOT_FOUND: Meaning(_NF, "There is no such role binding."),
        Reason.SERVICE_NOT_FOUND: Meaning(_NF, "There is no such service to ask the health of."),
        Reason.JOB_EXISTS: Meaning(Code.ALREADY_EXISTS, "The job id is taken."),
        Reason.MODEL_EXISTS: Meaning(Code.ALREADY_EXISTS, "The model id is taken."),
        Reason.DATASET_EXISTS: Meaning(Code.ALREADY_EXISTS, "The data set id is taken."),
        Reason.WEBHOOK_EXISTS: Meaning(Code.ALREADY_EXISTS, "The webhook id is taken."),
        Reason.CREDENTIALS_MISSING: Meaning(
            Code.UNAUTHENTICATED, "The service wants to know who calls: send a token, a JWT or a client certificate."
        ),
        Reason.CREDENTIALS_INVALID: Meaning(
            Code.UNAUTHENTICATED, "The credentials are not ones that this service accepts."
        ),
        Reason.CREDENTIALS_EXPIRED: Meaning(Code.UNAUTHENTICATED, "The credentials are expired or revoked."),
        Reason.ACCESS_DENIED: Meaning(Code.PERMISSION_DENIED, "Not allowed, whether it exists or not."),
        Reason.INVALID_STATE: Meaning(_FP, "The job's state does not allow it."),
        Reason.MODEL_NOT_READY: Meaning(_FP, "The model is still being uploaded."),
        Reason.MODEL_CHANGED: Meaning(_FP, "A file of the model is not the one that was uploaded or exported."),
        Reason.DATASET_NOT_READY: Meaning(_FP, "The data set is still being uploaded."),
        Reason.DATA_CHANGED: Meaning(_FP, "A file of the data set is not the one that was uploaded or made."),
        Reason.OBJECT_STORE_REFUSED: Meaning(
            _FP, "The object store refuses the request; the message has its code, such as AccessDenied."
        ),
        Reason.SECRET_UNUSABLE: Meaning(_FP, "The file of a secret is missing, or does not have what it is used for."),
        Reason.MODEL_IN_USE: Meaning(_FP, "A live job reads the model."),
        Reason.DATASET_IN_USE: Meaning(_FP, "A live job reads the data set."),
        Reason.ETAG_MISMATCH: Meaning(Code.ABORTED, "It has changed since the etag was read."),
        Reason.PLAN_STALE: Meaning(Code.ABORTED, "The job would run otherwise than the plan says; plan it again."),
        Reason.JOB_REPLACED: Meaning(Code.ABORTED, "The job of that name is another one now."),
        Reason.UPLOAD_IN_PROGRESS: Meaning(Code.ABORTED, "Another upload of the same resource is in progress."),
        Reason.CURSOR_AHEAD: Meaning(Code.OUT_OF_RANGE, "The cursor is beyond the last event."),
        Reason.CURSOR_EXPIRED: Meaning(Code.OUT_OF_RANGE, "Events after the cursor have expired."),
        Reason.OFFSET_OUT_OF_RANGE: Meaning(Code.OUT_OF_RANGE, "The offset is past the end of the file."),
        Reason.CRC_MISMATCH: Meaning(Code.DATA_LOSS, "A chunk arrived damaged; send it again."),
        Reason.CHECKSUM_MISMATCH: Meaning(Code.DATA_LOSS, "A file's sha256 is not the one announced."),
        Reason.FILE_DAMAGED: Meaning(Code.DATA_LOSS, "The service's own copy of a file is damaged or gone."),
        Reason.QUOTA_EXCEEDED: Meaning(Code.RESOURCE_EXHAUSTED, "A quota of the project or the service is used up."),
        Reason.RATE_LIMITED: Meaning(
            Code.RESOURCE_EXHAUSTED, "Too many calls in a short time; try again after the delay."
        ),
        Reason.RESPONSE_TOO_LARGE: Meaning(
            Code.RESOURCE_EXHAUSTED, "The answer would exceed 3 MiB; ask for fewer instances."
        ),
        Reason.SLOW_CONSUMER: Meaning(Code.RESOURCE_EXHAUSTED, "The reader stopped reading; continue from its cursor."),
        Reason.OVERLOADED: Meaning(Code.UNAVAILABLE, "Too much at once; try again after the delay."),
        Reason.TOO_MANY_WATCHERS: Meaning(
            Code.RESOURCE_EXHAUSTED, "Too many streams are open; try again after the delay."
        ),
        Reason.INSPECTION_UNAVAILABLE: Meaning(
            Code.UNAVAILABLE, "No worker can look into model and data at the moment."
        ),
        Reason.HUB_UNREACHABLE: Meaning(Code.UNAVAILABLE, "The Hugging Face Hub cannot be reached."),
        Reason.OBJECT_STORE_UNREACHABLE: Meaning(Code.UNAVAILABLE, "The object store does not answer, or not in time."),
        Reason.ISSUER_UNREACHABLE: Meaning(
            Code.UNAVAILABLE, "The keys of the JWT's issuer cannot be fetched at the moment."
        ),
        Reason.STORE_FULL: Meaning(Code.UNAVAILABLE, "The store's disk is full."),
        Reason.STORE_BUSY: Meaning(Code.UNAVAILABLE, "Another process holds the store."),
        Reason.STORE_UNAVAILABLE: Meaning(Code.UNAVAILABLE, "The store does not answer."),
        Reason.STORAGE_FULL: Meaning(Code.UNAVAILABLE, "The storage's disk is full."),
        Reason.STORAGE_NOT_WRITABLE: Meaning(Code.UNAVAILABLE, "The storage may be read, but not written."),
        Reason.STORAGE_UNAVAILABLE: Meaning(Code.UNAVAILABLE, "The storage is not mounted, or its disk fails."),
        Reason.DRAINING: Meaning(
            Code.UNAVAILABLE, "The service is stopping; continue from the cursor when it is back."
        ),
        Reason.STARTING: Meaning(Code.UNAVAILABLE, "The service looks through its store; try again after the delay."),
        Reason.DEADLINE_EXCEEDED: Meaning(Code.DEADLINE_EXCEEDED, "The call's deadline passed."),
        Reason.CANCELLED: Meaning(Code.CANCELLED, "The caller cancelled."),
        Reason.METHOD_UNKNOWN: Meaning(Code.UNIMPLEMENTED, "There is no such method."),
        Reason.INTERNAL: Meaning(Code.INTERNAL, "A defect of the service; its log has the id."),
    }
)
