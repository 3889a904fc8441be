"""A rank's reports to its supervisor, and the directives in reply.

A separate thread sends events in batches, so that the training loop never waits for progress; it waits for durable
events (checkpoint, evaluation, phase, failure, export), which the supervisor has on disk when `emit` returns. The null
twin keeps the same contract and prints.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Protocol, TextIO

from google.protobuf import json_format

from shardyard.worker.v1 import worker_pb2

SendReport = Callable[[bytes], bytes]
"""Takes a serialised ReportRequest, answers with a serialised ReportReply; blocks until the supervisor has it."""

BATCH_S = 0.02
POLL_S = 1.0
EXIT_FENCED = 3
EXIT_SUPERVISOR_LOST = 70


class Reporter(Protocol):
    """Sends events of one rank, in the order in which they were emitted."""

    def emit(self, event: worker_pb2.WorkerEvent, *, durable: bool = False) -> None:
        """Hands the event over; with `durable` returns when it is on disk."""

    def settle(self) -> None:
        """Returns when everything emitted is on disk."""

    @property
    def directive(self) -> worker_pb2.Directive:
        """The newest directive; ACTION_UNSPECIFIED: continue."""

    def close(self) -> None:
        """Returns when everything emitted has been sent."""


class SendingReporter:
    """Sends through `send`, at least once every `poll_s` seconds (None: only when there is something to send).

    A reply that fences, and a supervisor that does not answer, end the process at once: nothing that this rank would
    still do could count.
    """

    def __init__(self, send: SendReport, *, epoch: int, rank: int, poll_s: float | None = POLL_S) -> None:
        self._send = send
        self._epoch = epoch
        self._rank = rank
        self._poll_s = poll_s
        self._changed = threading.Condition()
        self._events: list[worker_pb2.WorkerEvent] = []
        self._emitted = 0
        self._durable_up_to = 0
        self._sent_durably = 0
        self._closing = False
        self._directive = worker_pb2.Directive()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    def emit(self, event: worker_pb2.WorkerEvent, *, durable: bool = False) -> None:
        """Hands the event over; with `durable` returns when it is on disk."""
        event.rank = self._rank
        event.time.GetCurrentTime()
        with self._changed:
            self._events.append(event)
            self._emitted += 1
        if durable:
            self.settle()

    def settle(self) -> None:
        """Returns when everything emitted is on disk."""
        with self._changed:
            mine = self._emitted
            self._durable_up_to = max(self._durable_up_to, mine)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._sent_durably >= mine)

    @property
    def directive(self) -> worker_pb2.Directive:
        """The newest directive; ACTION_UNSPECIFIED: continue."""
        return self._directive

    def close(self) -> None:
        """Returns when everything emitted has been sent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._send_batch():
                pass
        except BaseException:  # The edge of this thread: whatever `send` raises, the supervisor is lost to this rank.
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(EXIT_SUPERVISOR_LOST)

    def _send_batch(self) -> bool:
        """Waits for events, or for the time to ask, and sends; true when closed and everything is sent."""
        with self._changed:
            self._changed.wait_for(self._is_urgent, timeout=BATCH_S if self._events else self._poll_s)
            if self._closing and not self._events:
                return True
            durable = self._durable_up_to > self._sent_durably
            if not self._events and not durable and self._poll_s is None:
                return False
            events, self._events = self._events, []
            last = self._emitted
        request = worker_pb2.ReportRequest(epoch=self._epoch, rank=self._rank, events=events, durable=durable)
        reply = worker_pb2.ReportReply.FromString(self._send(request.SerializeToString()))
        if reply.fenced:
            os._exit(EXIT_FENCED)
        if reply.HasField("directive"):
            self._directive = reply.directive
        if durable:
            with self._changed:
                self._sent_durably = last
                self._changed.notify_all()
        return False

    def _is_urgent(self) -> bool:
        return self._closing or self._durable_up_to > self._sent_durably


class PrintingReporter:
    """Prints what would be sent: the null twin. No supervisor: no directive ever comes."""

    def __init__(self, out: TextIO, *, quiet: bool = False) -> None:
        self._out = out
        self._quiet = quiet
        self.directive = worker_pb2.Directive()

    def emit(self, event: worker_pb2.WorkerEvent, *, durable: bool = False) -> None:
        """Prints the event on one line; the numbers of single steps are left out."""
        kind = event.WhichOneof("payload")
        if self._quiet or kind is None or kind == "metrics":
            return
        text = json_format.MessageToJson(getattr(event, kind), preserving_proto_field_name=True, indent=None)
        self._out.write(f"{time.strftime('%H:%M:%S')} {kind} {text}\n")
        self._out.flush()

    def settle(self) -> None:
        """Nothing to wait for: everything was printed at once."""

    def close(self) -> None:
        """Has nothing left to send."""
