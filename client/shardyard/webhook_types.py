"""Events of a project, and webhooks: users have them from `shardyard.types`, which says how to read them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from shardyard.job_types import Event


@dataclass(frozen=True)
class ProjectEvent:
    """An event of one of a project's jobs; `cursor` is what to continue after.

    `event.id` is unique in the whole service. `str(event)` is a line for people.
    """

    cursor: str
    job: str
    job_uid: str
    event: Event

    @property
    def job_id(self) -> str:
        """The last part of the job's name."""
        return self.job.rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return f"{self.job_id}  {self.event}"


@dataclass(frozen=True)
class WebhookInfo:
    """A webhook as it was when it was read: `state` is active, failing, suspended (its
    maker may not view the project) or disabled, `message` says why.

    `secret` is empty, except after the webhook was made and after its secret was changed.
    """

    name: str
    uid: str
    etag: str
    url: str
    kinds: tuple[str, ...]
    disabled: bool
    state: str
    message: str
    cursor: str
    secret: str
    failures: int
    failing_since: datetime | None
    next_attempt_time: datetime | None
    last_delivery_time: datetime | None
    creator: str
    create_time: datetime | None
    update_time: datetime | None


@dataclass(frozen=True)
class Delivery:
    """One attempt to deliver an event; `status` is that of HTTP, 0 without an answer."""

    number: int
    event_id: str
    type: str
    attempt: int
    delivered: bool
    status: int
    message: str
    time: datetime | None
    duration: timedelta | None
