"""Questions to the processes that open clients' files, and what their crashes mean to callers.

An input that ends its process, or takes too long or too much memory, is refused, and the verdict is remembered: the
same question is then answered without running it again. UNAVAILABLE means that the same question may succeed later.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from shardyard_coordinator.domain.errors import FieldViolation, Refused, refused_fields
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.launch.protocols import Compute, ComputeFailed, ComputeUnavailable, InputFailed
from shardyard_coordinator.log_context import logged_about
from shardyard_coordinator.serve.call import Call
from shardyard_coordinator.serve.limits import Limits

log = logging.getLogger(__name__)

_REMEMBERED_S = 600.0
_MOST_REMEMBERED = 1024
# Reading and tokenising proceed at a megabyte a second on a slow core; a quarter of that counts as stuck.
_S_PER_MIB = 4.0
_MOST_FOR_DATA_S = 3600.0
_NEXT_STEPS = {
    Reason.MODEL_INVALID: "use another model or tokenizer, or save this one again with `save_pretrained`",
    Reason.DATA_INVALID: "give fewer, smaller or simpler files",
}
_NEXT_STEP = "leave out what is unusual in it"


@dataclass(frozen=True)
class Subject:
    """What to blame for a failure, unless the process said what it was reading; `prefix` is put before field names."""

    field: str
    what: str
    reason: Reason
    prefix: str = ""


class Questions:
    """Asks the compute processes, and remembers the inputs that ended one."""

    def __init__(self, compute: Compute, limits: Limits) -> None:
        self._compute = compute
        self._limits = limits
        self._verdicts: OrderedDict[bytes, tuple[float, Refused]] = OrderedDict()

    async def inspect(
        self,
        function: str,
        request: bytes,
        call: Call,
        *,
        subject: Subject,
        key: bytes,
        route: bytes = b"",
        network: bool = False,
        data_bytes: int = 0,
        secrets: Sequence[str] = (),
    ) -> bytes:
        """Calls a function of the trainer in a separate process, whose time limit grows with `data_bytes`.

        `key` identifies the request: the same one is the same function, request and content of files. Questions of one
        `route` name the same files. The function gets the values of `secrets` too (`protocols.Compute`).
        Raises Refused: the subject's reason, or INSPECTION_UNAVAILABLE.
        """
        more_s = min(data_bytes // 2**20 * _S_PER_MIB, _MOST_FOR_DATA_S)
        caller, cpu_s = _caller(call), self._limits.inspection_s + more_s
        return await self._judged(
            lambda: self._compute.inspect(
                function, request, caller=caller, cpu_s=cpu_s, route=route, network=network, secrets=secrets
            ),
            call,
            subject,
            key,
        )

    async def ask(self, function: str, folder: str, request: bytes, call: Call, *, subject: Subject) -> bytes:
        """Asks a model's process. If the caller leaves, a question that has not begun is dropped; verdicts are kept.

        Raises Refused.
        """
        key = hashlib.sha256(f"{function} {folder} ".encode() + request).digest()
        caller, turn_s = _caller(call), self._limits.turn_s
        judging = asyncio.ensure_future(
            self._judged(
                lambda: self._compute.ask(function, folder, request, caller=caller, turn_s=turn_s), call, subject, key
            )
        )
        try:
            return await asyncio.shield(judging)
        except asyncio.CancelledError:
            judging.cancel()
            judging.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise

    async def _judged(self, ask: Callable[[], Awaitable[bytes]], call: Call, subject: Subject, key: bytes) -> bytes:
        if (known := self._recall(key)) is not None:
            raise known.fresh_copy()
        try:
            return await ask()
        except ComputeUnavailable as error:
            log.warning("no worker has answered %s, request %s: %s", call.method, call.request_id, error)
            raise not_in_time() from None
        except ComputeFailed:
            error_id = _logged(call, "the system failed")
            text = f"the system failed the worker that inspected it; the service's log has details under {error_id}"
            raise Refused(Reason.INSPECTION_UNAVAILABLE, text, retry_after_s=1.0) from None
        except InputFailed as failed:
            refused = _refusal(failed, call, subject)
            self._remember(key, refused.fresh_copy())
            raise refused from None

    def _recall(self, key: bytes) -> Refused | None:
        until_s, refused = self._verdicts.get(key, (0.0, None))
        return refused if time.monotonic() < until_s else None

    def _remember(self, key: bytes, refused: Refused) -> None:
        self._verdicts[key] = time.monotonic() + _REMEMBERED_S, refused
        self._verdicts.move_to_end(key)
        while len(self._verdicts) > _MOST_REMEMBERED:
            self._verdicts.popitem(last=False)


def still_looking(what: str = "what the spec names") -> Refused:
    """The error while an answer is still being computed; the next caller shares it."""
    text = f"{what} is still being inspected; the inspection continues: ask again after the delay"
    return Refused(Reason.INSPECTION_UNAVAILABLE, text, retry_after_s=2.0)


def not_in_time() -> Refused:
    """The error if no worker became free in time."""
    text = "no worker could look into it in time; try again after the delay"
    return Refused(Reason.INSPECTION_UNAVAILABLE, text, retry_after_s=1.0)


def _refusal(failed: InputFailed, call: Call, subject: Subject) -> Refused:
    reason = Reason(failed.reason) if failed.reason in Reason.__members__ else subject.reason
    field = f"{subject.prefix}{failed.field}" if failed.field else subject.field
    details = ""
    if failed.log:
        log.error("a question to a compute process failed: %s", failed.log)
        details = f" (the service's log has details under {_logged(call, 'an unexpected error')})"
    step = _NEXT_STEPS.get(reason, _NEXT_STEP)
    text = f"reading {failed.what or subject.what} {failed.how}{details}; {step}"
    return refused_fields([FieldViolation(field, text, reason)])


def _logged(call: Call, what: str) -> str:
    error_id = secrets.token_hex(8)
    with logged_about(error_id=error_id):
        log.exception("error %s in %s, request %s: %s", error_id, call.method, call.request_id, what)
    return error_id


def _caller(call: Call) -> tuple[str, ...]:
    """The levels on which callers take turns: principals, then the connections of each."""
    return call.principal, call.peer
