# SPDX-License-Identifier: AGPL-3.0-or-later
"""Who the account is and what it may do: users, roles, access control policies and permissions of v3."""

from __future__ import annotations

from typing import TypeVar
from uuid import NAMESPACE_URL, uuid5

from replicator.simulator.model import Entity, Role, User
from replicator.simulator.v3.checks import check_uuid
from replicator.simulator.v3.envelope import V3, Json, Listing, list_reply
from replicator.simulator.v4.permissions import OPERATIONS, operation_id
from replicator.simulator.web import HttpError, Reply, Request

_NAMED = frozenset({"name", "uuid"})
_USERS = frozenset({"name", "uuid", "username"})
E = TypeVar("E", bound=Entity)
Policy = tuple[str, User, Role]


class Users:
    """Handlers. The local admin has no policy, and all rights."""

    def __init__(self, v3: V3) -> None:
        self._v3 = v3

    def _role(self, user: User) -> Role | None:
        """The role of a user, which is kept by id or by name."""
        roles = self._v3.world.roles
        named = (role for role in roles.values() if role.name == user.role)
        return roles.get(user.role) or next(named, None)

    def _policies(self) -> list[Policy]:
        found = []
        for user in self._v3.world.users.values():
            role = self._role(user)
            if role is not None and user.name != "admin":
                found.append((str(uuid5(NAMESPACE_URL, f"replctl:policy:{user.uuid}")), user, role))
        return found

    # Users

    def _user_body(self, user: User) -> Json:
        policies = [
            {"kind": "access_control_policy", "uuid": uuid, "name": f"{role.name} for {owner.name}"}
            for uuid, owner, role in self._policies()
            if owner.uuid == user.uuid
        ]
        resources: Json = {
            "user_type": user.kind
            if user.kind in ("LOCAL", "IDP", "DIRECTORY_SERVICE")
            else "LOCAL",
            "display_name": user.name,
            "access_control_policy_reference_list": policies,
            "projects_reference_list": [],
        }
        return {
            "status": {"name": user.name, "state": "COMPLETE", "resources": resources},
            "spec": {"resources": {}},
            "metadata": self._v3.metadata("user", user),
        }

    async def me(self, request: Request) -> Reply:
        """GET /users/me."""
        return self._v3.entity_reply(self._user_body(request.user))

    async def info(self, request: Request) -> Reply:
        """GET /users/info: roles and permissions in one call."""
        user = request.user
        lists = [
            {
                "role": {
                    "name": role.name,
                    "permission_uuid_list": [operation_id(o) for o in _operations(role)],
                },
                "filter_list": {"context_list": []},
            }
            for _, owner, role in self._policies()
            if owner.uuid == user.uuid
        ]
        details = {
            "user_uuid": user.uuid,
            "username": user.name,
            "display_name": user.name,
            "user_type": user.kind
            if user.kind in ("LOCAL", "IDP", "DIRECTORY_SERVICE")
            else "LOCAL",
        }
        answer = {
            "user_details": details,
            "user_legacy_name": user.name,
            "access_control_policy_list": lists,
        }
        return Reply(200, answer)

    async def list_users(self, request: Request) -> Reply:
        """POST /users/list."""
        listing = Listing(
            "user",
            _USERS,
            lambda u: {"name": u.name, "username": u.name, "uuid": u.uuid},
            self._user_body,
        )
        return await list_reply(request, self._v3.world.users.values(), listing)

    async def get_user(self, request: Request, uuid: str) -> Reply:
        """GET /users/{uuid}."""
        del request
        return self._v3.entity_reply(self._user_body(_found(self._v3.world.users, "user", uuid)))

    # Roles

    def _role_body(self, role: Role) -> Json:
        references = [
            {"kind": "permission", "uuid": operation_id(name), "name": name}
            for name in _operations(role)
        ]
        shared = {
            "name": role.name,
            "description": role.description,
            "resources": {"permission_reference_list": references},
        }
        return {
            "status": {**shared, "state": "COMPLETE", "is_system_defined": role.system},
            "spec": shared,
            "metadata": self._v3.metadata("role", role),
        }

    async def list_roles(self, request: Request) -> Reply:
        """POST /roles/list."""
        listing = Listing(
            "role", _NAMED, lambda r: {"name": r.name, "uuid": r.uuid}, self._role_body
        )
        return await list_reply(request, self._v3.world.roles.values(), listing)

    async def get_role(self, request: Request, uuid: str) -> Reply:
        """GET /roles/{uuid}."""
        del request
        return self._v3.entity_reply(self._role_body(_found(self._v3.world.roles, "role", uuid)))

    # Policies

    def _policy_body(self, policy: Policy) -> Json:
        uuid, user, role = policy
        resources = {
            "role_reference": {"kind": "role", "uuid": role.uuid, "name": role.name},
            "user_reference_list": [{"kind": "user", "uuid": user.uuid, "name": user.name}],
            "user_group_reference_list": [],
            "filter_list": {"context_list": []},
        }
        shared = {"name": f"{role.name} for {user.name}", "description": "", "resources": resources}
        return {
            "status": {**shared, "state": "COMPLETE", "is_system_defined": False},
            "spec": shared,
            "metadata": self._v3.metadata("access_control_policy", Entity(uuid=uuid)),
        }

    async def list_policies(self, request: Request) -> Reply:
        """POST /access_control_policies/list."""
        listing = Listing(
            "access_control_policy",
            _NAMED,
            lambda p: {"name": f"{p[2].name} for {p[1].name}", "uuid": p[0]},
            self._policy_body,
        )
        return await list_reply(request, self._policies(), listing)

    async def get_policy(self, request: Request, uuid: str) -> Reply:
        """GET /access_control_policies/{uuid}."""
        del request
        for policy in self._policies():
            if policy[0] == check_uuid(uuid):
                return self._v3.entity_reply(self._policy_body(policy))
        raise HttpError(404, f"the access_control_policy {uuid} was not found", "not_found")

    # Permissions

    def _permission_body(self, name: str) -> Json:
        action, _, kind = name.partition("_")
        shared = {
            "name": name,
            "description": name.replace("_", " "),
            "resources": {"operation": action.lower(), "kind": kind.lower()},
        }
        return {
            "status": {**shared, "state": "COMPLETE"},
            "spec": shared,
            "metadata": self._v3.metadata("permission", Entity(uuid=operation_id(name))),
        }

    async def list_permissions(self, request: Request) -> Reply:
        """POST /permissions/list."""
        listing = Listing(
            "permission",
            _NAMED,
            lambda n: {"name": n, "uuid": operation_id(n)},
            self._permission_body,
        )
        return await list_reply(request, OPERATIONS, listing)

    async def get_permission(self, request: Request, uuid: str) -> Reply:
        """GET /permissions/{uuid}."""
        del request
        for name in OPERATIONS:
            if operation_id(name) == check_uuid(uuid):
                return self._v3.entity_reply(self._permission_body(name))
        raise HttpError(404, f"the permission {uuid} was not found", "not_found")


def _operations(role: Role) -> list[str]:
    return list(OPERATIONS) if "*" in role.operations else sorted(role.operations)


def _found(collection: dict[str, E], kind: str, uuid: str) -> E:
    found = collection.get(check_uuid(uuid))
    if found is None:
        raise HttpError(404, f"the {kind} {uuid} was not found", "not_found")
    return found
