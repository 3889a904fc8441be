"""Addresses of an object store that a spec wants to write to: who may is checked before anything is looked up."""

from __future__ import annotations

from shardyard.remote_uris import parse
from shardyard_coordinator.control.remote import Remote
from shardyard_coordinator.control.spec_walk import WalkedSpec
from shardyard_coordinator.domain.errors import FieldViolation, refused_fields
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.serve.validation.text import show


def check_targets(remote: Remote, walked: WalkedSpec, project: str) -> None:
    """Raises Refused ADDRESS_NOT_ALLOWED, the same for an address that nobody may write and one that others may."""
    found = []
    for field, uri in walked.targets:
        if remote.export_root_of(parse(uri), project) is None:
            text = (
                f"{show(uri)} is not under an address that projects/{project} may write; ask the operator for it "
                "(--remote-export-root, and --secret), or download the model"
            )
            found.append(FieldViolation(field, text, Reason.ADDRESS_NOT_ALLOWED))
    if found:
        raise refused_fields(found)
