"""Who has which role, in memory: read from the store when the service starts and after every change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from shardyard_coordinator.domain.access import (
    ALL_PROJECTS,
    LOCAL_PRINCIPAL,
    BindingRecord,
    Caller,
    Grant,
    Permission,
    Role,
    permissions_of,
)

_EVERYTHING = (Grant(Role.ADMIN, ALL_PROJECTS),)


class Rights:
    """What callers may do. Without authentication everybody is `local`, and may do everything."""

    def __init__(self, bindings: Iterable[BindingRecord] = ()) -> None:
        self._grants: dict[str, list[Grant]] = defaultdict(list)
        for binding in bindings:
            self._grants[binding.member].append(binding.grant)

    def grants(self, caller: Caller) -> tuple[Grant, ...]:
        """The roles of the caller and of its groups."""
        if caller.principal == LOCAL_PRINCIPAL:
            return _EVERYTHING
        return tuple(grant for member in sorted(caller.members) for grant in self._grants.get(member, ()))

    def permissions(self, caller: Caller, project: str) -> frozenset[Permission]:
        """What the caller may do in a project, or for `-` in all: what its roles allow and its scopes leave of that."""
        allowed = permissions_of(self.grants(caller), project)
        return allowed if caller.scopes is None else allowed & permissions_of(caller.scopes, project)

    def may(self, caller: Caller, permission: Permission, project: str) -> bool:
        """Whether it has the permission in the project, or for `-` in all."""
        return permission in self.permissions(caller, project)

    def is_member(self, caller: Caller) -> bool:
        """Whether it has a role in any project."""
        return bool(self.grants(caller))

    def may_somewhere(self, caller: Caller, permission: Permission) -> bool:
        """Whether it has the permission in any project."""
        return self.projects(caller, permission) != frozenset()

    def projects(self, caller: Caller, permission: Permission) -> frozenset[str] | None:
        """The projects in which it has the permission; None: in all."""
        if self.may(caller, permission, ALL_PROJECTS):
            return None
        named = {grant.project for grant in (*self.grants(caller), *(caller.scopes or ()))} - {ALL_PROJECTS}
        return frozenset(project for project in named if self.may(caller, permission, project))
