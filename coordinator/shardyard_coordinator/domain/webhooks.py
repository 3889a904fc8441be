"""The rows of webhooks and their deliveries as frozen records; times are microseconds since 1970 UTC, 0 if unset."""

from __future__ import annotations

from dataclasses import dataclass

from shardyard_coordinator.domain.records import Place


@dataclass(frozen=True)
class WebhookRecord:
    """A webhook. `kinds` are numbers of EventKind, empty: all; `disabled_us` is 0 while events are sent; `failed_us` is
    how long it has been failing, in service; `maker_groups` are those of the maker when it made or last changed it;
    `suspended_us` is 0 while the maker may view the project.
    """

    id: int
    uid: str
    project: str
    webhook_id: str
    version: int
    url: str
    kinds: frozenset[int]
    secret: bytes
    old_secret: bytes
    old_until_us: int
    position: int
    removal: int
    disabled_us: int
    message: str
    failures: int
    failed_us: int
    failing_since_us: int
    next_attempt_us: int
    last_delivery_us: int
    deliveries: int
    creator: str
    request_id: str
    fingerprint: bytes
    create_us: int
    update_us: int
    maker_groups: frozenset[str] = frozenset()
    suspended_us: int = 0

    @property
    def name(self) -> str:
        """`projects/{project}/webhooks/{webhook}`."""
        return f"projects/{self.project}/webhooks/{self.webhook_id}"

    @property
    def etag(self) -> str:
        """Changes with every update; deliveries do not change it."""
        return f"{self.uid[-8:]}-{self.version}"

    @property
    def place(self) -> Place:
        """Where it continues."""
        return Place(self.position, self.removal)


@dataclass(frozen=True)
class DeliveryRecord:
    """One attempt to deliver an event; `status` is 0 without an answer."""

    number: int
    event_id: str
    type: str
    attempt: int
    delivered: bool
    status: int
    message: str
    time_us: int
    duration_us: int
