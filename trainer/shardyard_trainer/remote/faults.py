"""What a request to an object store failed with, in words. Of an answer only its code is repeated, never its text."""

from __future__ import annotations

import re
from collections.abc import Iterator

from shardyard_trainer.data.errors import SpecError

NOT_FOUND = "OBJECT_NOT_FOUND"
EXISTS = "OBJECT_EXISTS"
REFUSED = "OBJECT_STORE_REFUSED"
UNREACHABLE = "OBJECT_STORE_UNREACHABLE"

_CODE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MISSING = {"NoSuchBucket", "NoSuchKey", "NotFound", "404"}
_NO_UPLOAD = "NoSuchUpload"
_CONFLICT = "ConditionalRequestConflict"
_NOT_OFFERED = {"NotImplemented", "501"}
_CHANGED = {"PreconditionFailed", "412"}
_ELSEWHERE = {"PermanentRedirect", "301", "307", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_LATER = {
    *("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "OperationAborted", "503", "500", "502"),
    *("504", "429", "TooManyRequests", "Busy", "ServerBusy", "BadDigest", _CONFLICT, _NO_UPLOAD),
}


class ObjectChanged(Exception):
    """An object is not the one that was listed: it was replaced or removed since."""


class ObjectTaken(Exception):
    """An object is there already, and was not replaced."""


def code_of(error: BaseException) -> str:
    """The object store's code for what failed; empty if it did not answer."""
    for each in _causes(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            code = str(response.get("Error", {}).get("Code", ""))
            return code if _CODE.fullmatch(code) else "an unknown code"
    return ""


def is_changed(error: BaseException) -> bool:
    """Whether the object is not the one that was listed any more."""
    return code_of(error) in _CHANGED


def is_missing(error: BaseException) -> bool:
    """Whether there is no such object."""
    return code_of(error) in _MISSING


def is_no_upload(error: BaseException) -> bool:
    """Whether an object in parts is not being written: it is complete, or its parts were removed."""
    return code_of(error) == _NO_UPLOAD


def is_conflict(error: BaseException) -> bool:
    """Whether others wrote or removed the object at the same moment: nothing is said about who was first."""
    return code_of(error) == _CONFLICT


def is_not_offered(error: BaseException) -> bool:
    """Whether the store does not offer what a request asked for."""
    return code_of(error) in _NOT_OFFERED


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    code = code_of(error)
    return not code or code in _LATER


def in_words(
    error: BaseException, what: str, *, field: str, secret: str, instead: str = ", or upload the files"
) -> SpecError:
    """The error for the person who named `what`; `secret` is the name of the one that was used, if any."""
    code = code_of(error)
    if code in _MISSING:
        bucket = code == "NoSuchBucket"
        text = f"{what}: there is no such {'bucket' if bucket else 'object, nor objects below it'}; check its spelling"
        return SpecError(field, NOT_FOUND, text)
    if code in _ELSEWHERE:
        text = f"{what}: the bucket is in another region ({code}); have the operator set --s3-region"
        return SpecError(field, REFUSED, text)
    if code == "InvalidObjectState":
        text = f"{what}: an object is archived and cannot be read ({code}); restore it in the object store first"
        return SpecError(field, REFUSED, text)
    if code in _LATER:
        return SpecError(field, UNREACHABLE, f"{what}: the object store cannot answer at the moment ({code})")
    if code:
        keys = f"with the keys of the secret {secret}" if secret else "without keys"
        text = f"{what}: the object store refuses it {keys} ({code}); have the operator allow it there"
        return SpecError(field, REFUSED, text)
    text = f"{what}: the object store cannot be reached ({type(error).__name__}); try again{instead}"
    return SpecError(field, UNREACHABLE, text)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__
