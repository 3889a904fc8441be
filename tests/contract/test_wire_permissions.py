"""Every method of every descriptor is served, has a permission, and every reason is documented."""

from __future__ import annotations

from helpers.repository import ROOT
from shardyard_coordinator.domain.reasons import MEANINGS, Reason
from shardyard_coordinator.serve import permissions
from shardyard_coordinator.serve.app import descriptors
from shardyard_coordinator.serve.validation import requests
from shardyard_coordinator.serve.validation.counts import own_limit


def paths() -> set[str]:
    return {f"/{service.full_name}/{method.name}" for service in descriptors() for method in service.methods}


def test_the_permission_table_has_exactly_the_methods_that_are_served() -> None:
    assert set(permissions.PERMISSIONS) == paths()


def test_an_unknown_principal_may_do_nothing_but_what_is_open() -> None:
    allowed = {path for path in paths() if permissions.may("stranger", path)}
    assert {path.split("/")[1] for path in allowed} == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert all(permissions.may("local", path) for path in paths())


def test_a_method_without_a_row_is_denied() -> None:
    assert not permissions.may("local", "/shardyard.v1.JobService/NoSuchMethod")


def test_every_reason_has_a_code_and_is_documented() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    assert set(MEANINGS) == set(Reason)
    assert [reason for reason in Reason if f"`{reason.value}`" not in text] == []


def test_every_repeated_field_of_our_requests_has_a_limit_of_its_own() -> None:
    unlimited = []
    for service in descriptors():
        if service.full_name.startswith("shardyard."):
            for method in service.methods:
                unlimited += list(_unlimited(method.input_type, frozenset()))
    assert unlimited == []


def _unlimited(message, seen):  # type: ignore[no-untyped-def]
    if message.full_name in seen or not message.full_name.startswith("shardyard."):
        return
    seen = seen | {message.full_name}
    for field in message.fields:
        if message.name == "Job" and field.name in requests.OUTPUT_ONLY:
            continue
        if field.is_repeated and own_limit(field) is None:
            yield f"{message.name}.{field.name}"
        if field.message_type is not None:
            yield from _unlimited(field.message_type, seen)
