"""Every method of every descriptor is served, needs what its row says, and every reason is documented."""

from __future__ import annotations

import pytest

from helpers.repository import ROOT
from shardyard_coordinator.domain.access import (
    ALL_PROJECTS,
    LOCAL,
    BindingRecord,
    Caller,
    Grant,
    Permission,
    Role,
)
from shardyard_coordinator.domain.reasons import MEANINGS, Reason
from shardyard_coordinator.serve import permissions
from shardyard_coordinator.serve.app import descriptors
from shardyard_coordinator.serve.permissions import PERMISSIONS, Where, may
from shardyard_coordinator.serve.rights import Rights
from shardyard_coordinator.serve.validation import requests
from shardyard_coordinator.serve.validation.counts import own_limit
from shardyard_coordinator.serve.validation.naming import NAMES

ALICE = Caller("alice", "tokens/abcdefghijkl")


def paths() -> set[str]:
    return {f"/{service.full_name}/{method.name}" for service in descriptors() for method in service.methods}


def rights(role: Role, project: str) -> Rights:
    return Rights([BindingRecord("b", project, "alice", role, "", 0)])


def test_the_permission_table_has_exactly_the_methods_that_are_served() -> None:
    assert set(PERMISSIONS) == paths()


def test_a_request_names_its_project_exactly_if_its_method_needs_a_permission_there() -> None:
    for service in descriptors():
        for method in service.methods:
            needs = PERMISSIONS[f"/{service.full_name}/{method.name}"]
            in_a_project = needs.permission not in (Permission.OPEN, Permission.KNOWN) and needs.where in (
                Where.PROJECT,
                Where.VISIBLE,
            )
            named = method.input_type.name in NAMES or method.client_streaming
            of_a_token = NAMES.get(method.input_type.name, ("", ""))[1] == "token"
            assert named == in_a_project or of_a_token or needs.permission is Permission.OPEN, method.full_name


def test_somebody_without_a_role_may_do_nothing_but_what_is_open_and_ask_who_it_is() -> None:
    nobody = Rights()
    for project in (None, "nlp", ALL_PROJECTS):
        allowed = {path for path in paths() if may(nobody, ALICE, path, project)}
        assert {path.split("/")[1] for path in allowed} == {
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
            "shardyard.v1.AuthService",
        }
        assert {path for path in allowed if "AuthService" in path} == {"/shardyard.v1.AuthService/GetIdentity"}
    assert all(may(nobody, LOCAL, path, "default") for path in paths())
    assert not may(nobody, Caller(""), "/shardyard.v1.AuthService/GetIdentity")


@pytest.mark.parametrize("role", Role)
def test_a_role_counts_in_its_project_and_nowhere_else(role: Role) -> None:
    own = rights(role, "nlp")
    for path, needs in PERMISSIONS.items():
        if needs.permission in (Permission.OPEN, Permission.KNOWN):
            continue
        has = needs.permission in permissions.GRANTS[role]
        assert may(own, ALICE, path, "nlp") == (has and needs.where is not Where.EVERYWHERE), path
        assert may(own, ALICE, path, "vision") == (has and needs.where is Where.SOMEWHERE), path
        in_one = needs.where in (Where.SOMEWHERE, Where.VISIBLE)
        assert may(own, ALICE, path, ALL_PROJECTS) == (has and in_one), path
        assert may(rights(role, ALL_PROJECTS), ALICE, path, "vision") == has, path


@pytest.mark.parametrize("role", Role)
def test_a_scope_takes_away_and_never_adds(role: Role) -> None:
    for path in paths():
        for granted in Role:
            for project in ("nlp", ALL_PROJECTS):
                scoped = Caller("alice", "tokens/abcdefghijkl", scopes=(Grant(role, project),))
                if may(rights(granted, "nlp"), scoped, path, "nlp"):
                    assert may(rights(granted, "nlp"), ALICE, path, "nlp"), path
                    assert may(rights(role, project), ALICE, path, "nlp"), path


def test_a_method_without_a_row_is_denied() -> None:
    assert not may(Rights(), LOCAL, "/shardyard.v1.JobService/NoSuchMethod", "default")


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
