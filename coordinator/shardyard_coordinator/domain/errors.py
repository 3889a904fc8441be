"""What is raised inside the coordinator: `Refused` carries everything that an error on the wire needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardyard_coordinator.domain.reasons import MEANINGS, Code, Reason


@dataclass(frozen=True)
class FieldViolation:
    """One broken rule: the field's path from the request on, and value, rule and next step in words."""

    field: str
    message: str
    reason: Reason = Reason.SPEC_INVALID
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Refused(Exception):
    """A call that cannot be served, with its reason; becomes a google.rpc.Status."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s

    @property
    def code(self) -> Code:
        """The gRPC code that belongs to the reason."""
        return MEANINGS[self.reason].code

    def fresh_copy(self) -> Refused:
        """The same refusal, never raised: a raised one keeps its callers' variables in memory with its traceback."""
        return Refused(
            self.reason,
            self.message,
            metadata=self.metadata,
            violations=self.violations,
            retry_after_s=self.retry_after_s,
        )


def refused_fields(violations: Sequence[FieldViolation]) -> Refused:
    """All violations as one refusal: with their common reason, else SPEC_INVALID.

    Raises: ValueError without a violation.
    """
    if not violations:
        raise ValueError("no violation to report")
    reasons = {violation.reason for violation in violations}
    reason = reasons.pop() if len(reasons) == 1 else Reason.SPEC_INVALID
    first = violations[0]
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    return Refused(reason, f"{first.field}: {first.message}{more}", metadata=first.metadata, violations=violations)
