# SPDX-License-Identifier: AGPL-3.0-or-later
"""Namespace iam: users and their keys, roles, policies (one for each user with a role), operations. There is no "me"."""

from __future__ import annotations

import secrets
from typing import Any
from uuid import NAMESPACE_URL, uuid4, uuid5

from replicator.simulator.model import Role, User
from replicator.simulator.v4.api import LISTED, Api, Call, Handler, Namespace
from replicator.simulator.v4.envelope import when
from replicator.simulator.v4.permissions import BY_ID, OPERATIONS, operation_id
from replicator.simulator.web import HttpError, Reply, Router

_USER = "iam.v4.authn.User"
_KEY = "iam.v4.authn.Key"
_ROLE = "iam.v4.authz.Role"
_POLICY = "iam.v4.authz.AuthorizationPolicy"
_OPERATION = "iam.v4.authz.Operation"


def _user_body(user: User) -> dict[str, Any]:
    return {
        "extId": user.uuid,
        "username": user.name,
        "displayName": user.v4.get("displayName", user.name),
        "userType": user.kind,
        "status": "ACTIVE",
        "description": user.description or None,
        "createdTime": when(user.created_at),
        "lastUpdatedTime": when(user.updated_at),
    }


def _user(call: Call, uuid: str) -> User:
    found: User = call.core.get("users", uuid)
    return found


async def _list_users(call: Call) -> Reply:
    return call.many(call.world.users.values(), _user_body, _USER)


async def _get_user(call: Call, user: str) -> Reply:
    found = _user(call, user)
    return call.one(_user_body(found), _USER, found)


async def _create_user(call: Call) -> Reply:
    body = call.body(_USER)
    if any(user.name == body["username"] for user in call.world.users.values()):
        raise HttpError(409, f"there is a user {body['username']} already", "exists")
    user = User(
        uuid=str(uuid4()),
        name=body["username"],
        kind=body["userType"],
        password=body.get("password", ""),
        description=body.get("description", ""),
        on_element=False,
    )
    user.v4 = {name: body[name] for name in ("displayName",) if name in body}
    call.core.touch(user)
    call.world.users[user.uuid] = user
    return call.one(_user_body(user), _USER, user, 201)


def _key_body(user: User, key: str, *, with_secret: bool = False) -> dict[str, Any]:
    details = {"$objectType": "iam.v4.authn.ApiKeyDetails", "apiKey": user.keys[key]}
    return {
        "extId": key,
        "name": user.v4.get(f"key:{key}", key),
        "keyType": "API_KEY",
        "status": "VALID",
        "assignedTo": user.uuid,
        "keyDetails": details if with_secret else None,
    }


async def _list_keys(call: Call, user: str) -> Reply:
    found = _user(call, user)
    return call.many(list(found.keys), lambda key: _key_body(found, key), _KEY)


async def _get_key(call: Call, user: str, key: str) -> Reply:
    found = _user(call, user)
    if key not in found.keys:
        raise HttpError(404, f"user {user} has no key {key}", "not_found")
    return call.one(_key_body(found, key), _KEY, found)


async def _create_key(call: Call, user: str) -> Reply:
    found = _user(call, user)
    body = call.body(_KEY)
    if found.kind != "SERVICE_ACCOUNT" or body["keyType"] != "API_KEY":
        raise HttpError(400, "only service accounts have API keys")
    key = str(uuid4())
    found.keys = {**found.keys, key: secrets.token_urlsafe(32)}
    found.v4 = {**found.v4, f"key:{key}": body["name"]}
    call.core.touch(found)
    return call.one(_key_body(found, key, with_secret=True), _KEY, found, 201)


async def _delete_key(call: Call, user: str, key: str) -> Reply:
    found = _user(call, user)
    if key not in found.keys:
        raise HttpError(404, f"user {user} has no key {key}", "not_found")
    found.keys = {name: value for name, value in found.keys.items() if name != key}
    call.core.touch(found)
    return call.none()


def _role_body(role: Role) -> dict[str, Any]:
    names = OPERATIONS if "*" in role.operations else role.operations
    return {
        "extId": role.uuid,
        "displayName": role.name,
        "description": role.description or None,
        "operations": [operation_id(name) for name in names],
        "isSystemDefined": role.system,
        "createdTime": when(role.created_at),
        "lastUpdatedTime": when(role.updated_at),
    }


def _role(call: Call, uuid: str) -> Role:
    found: Role = call.core.get("roles", uuid)
    return found


async def _list_roles(call: Call) -> Reply:
    return call.many(call.world.roles.values(), _role_body, _ROLE)


async def _get_role(call: Call, role: str) -> Reply:
    found = _role(call, role)
    return call.one(_role_body(found), _ROLE, found)


async def _create_role(call: Call) -> Reply:
    body = call.body(_ROLE)
    role = Role(
        uuid=str(uuid4()),
        name=body["displayName"],
        description=body.get("description", ""),
        operations=_operations(body),
        system=False,
    )
    call.core.touch(role)
    call.world.roles[role.uuid] = role
    return call.one(_role_body(role), _ROLE, role, 201)


async def _delete_role(call: Call, role: str) -> Reply:
    found = _role(call, role)
    call.match(found)
    if found.system:
        raise HttpError(403, "the role is the system's", "forbidden")
    if any(role_of(call, user) is found for user in call.world.users.values()):
        raise HttpError(409, "users have the role", "in_use")
    del call.world.roles[role]
    call.core.save()
    return call.none()


async def _update_role(call: Call, role: str) -> Reply:
    found = _role(call, role)
    body = call.body(_ROLE)
    call.match(found)
    if found.system:
        raise HttpError(403, "the role is the system's", "forbidden")
    found.name, found.description = body["displayName"], body.get("description", "")
    found.operations = _operations(body)
    call.core.touch(found)
    told = {"message": "the role was updated", "severity": "INFO", "locale": "en-US"}
    return call.one(told, "common.v1.config.Message")


def _operations(body: dict[str, Any]) -> list[str]:
    """The names of a role's operations. Raises HttpError 404."""
    unknown = [uuid for uuid in body.get("operations", []) if uuid not in BY_ID]
    if unknown:
        raise HttpError(404, f"no operation with the id {unknown[0]}", "not_found")
    return [BY_ID[uuid] for uuid in body.get("operations", [])]


def role_of(call: Call, user: User) -> Role | None:
    """The role of a user, if it has one."""
    return call.world.roles.get(user.role)


def _policies(call: Call) -> dict[str, tuple[User, Role]]:
    """Who has which role, by the id of the policy that says so."""
    found = {}
    for user in call.world.users.values():
        role = role_of(call, user)
        if role is not None:
            found[str(uuid5(NAMESPACE_URL, f"replctl:policy:{user.uuid}"))] = (user, role)
    return found


def _policy_body(entry: tuple[str, tuple[User, Role]]) -> dict[str, Any]:
    uuid, (user, role) = entry
    return {
        "extId": uuid,
        "displayName": f"{role.name} for {user.name}",
        "role": role.uuid,
        "authorizationPolicyType": "PREDEFINED_READ_ONLY" if role.system else "USER_DEFINED",
        "isSystemDefined": False,
        "identities": [{"identityFilter": {"user": {"uuid": {"anyof": [user.uuid]}}}}],
        "entities": [{"entityFilter": {"*": {"*": {"eq": "*"}}}}],
    }


async def _list_policies(call: Call) -> Reply:
    return call.many(_policies(call).items(), _policy_body, _POLICY)


async def _get_policy(call: Call, policy: str) -> Reply:
    found = _policies(call).get(policy)
    if found is None:
        raise HttpError(404, f"no authorization policy with the id {policy}", "not_found")
    return call.one(_policy_body((policy, found)), _POLICY, found[0])


def _named_users(identity: Any) -> list[str]:
    """The users of ``{"user": {"uuid": {"anyof": [...]}}}``; the form of filters is free, so others name none."""
    for name in ("user", "uuid", "anyof"):
        identity = identity.get(name) if isinstance(identity, dict) else None
    return (
        [each for each in identity if isinstance(each, str)] if isinstance(identity, list) else []
    )


async def _create_policy(call: Call) -> Reply:
    """Gives its users the role; one user has one role here, so the last policy wins."""
    body = call.body(_POLICY)
    role = _role(call, body["role"])
    filters = [each.get("identityFilter", {}) for each in body.get("identities", [])]
    wanted = [uuid for each in filters for uuid in _named_users(each)]
    if not wanted:
        raise HttpError(400, "identities must name users: user, uuid, anyof")
    users = [_user(call, uuid) for uuid in wanted]
    for user in users:
        user.role = role.uuid
        call.core.touch(user)
    uuid = next(key for key, (user, _) in _policies(call).items() if user is users[0])
    return call.one(_policy_body((uuid, (users[0], role))), _POLICY, users[0], 201)


async def _delete_policy(call: Call, policy: str) -> Reply:
    """Takes the role from its user."""
    found = _policies(call).get(policy)
    if found is None:
        raise HttpError(404, f"no authorization policy with the id {policy}", "not_found")
    call.match(found[0])
    found[0].role = ""
    call.core.touch(found[0])
    return call.none()


def _operation_body(name: str) -> dict[str, Any]:
    return {
        "extId": operation_id(name),
        "displayName": name,
        "entityType": name.partition("_")[2].lower(),
        "operationType": "EXTERNAL",
    }


async def _list_operations(call: Call) -> Reply:
    return call.many(OPERATIONS, _operation_body, _OPERATION)


async def _get_operation(call: Call, operation: str) -> Reply:
    if operation not in BY_ID:
        raise HttpError(404, f"no operation with the id {operation}", "not_found")
    return call.one(_operation_body(BY_ID[operation]), _OPERATION)


def add(api: Api, router: Router) -> None:
    """The endpoints."""
    space = Namespace(api, router, "iam")
    users, roles = "/authn/users", "/authz/roles"
    policies, operations = "/authz/authorization-policies", "/authz/operations"
    keys = users + "/{user}/keys"
    expanded = (*LISTED, "$expand")
    lists: tuple[tuple[str, Handler, str, str], ...] = (
        (users, _list_users, "authn.ListUsersApiResponse", "View_User"),
        (keys, _list_keys, "authn.ListUserKeysApiResponse", "View_User_Key"),
        (roles, _list_roles, "authz.ListRolesApiResponse", "View_Role"),
        (
            policies,
            _list_policies,
            "authz.ListAuthorizationPoliciesApiResponse",
            "View_Authorization_Policy",
        ),
        (operations, _list_operations, "authz.ListOperationsApiResponse", "View_Operation"),
    )
    for path, handler, response, permission in lists:
        space.get(path, handler, "iam.v4." + response, permission=permission, query=expanded)
    others: tuple[tuple[str, str, Handler, str, str], ...] = (
        ("GET", users + "/{user}", _get_user, "authn.GetUserApiResponse", "View_User"),
        ("POST", users, _create_user, "authn.CreateUserApiResponse", "Create_User"),
        ("POST", keys, _create_key, "authn.CreateUserKeyApiResponse", "Create_User_Key"),
        (
            "DELETE",
            keys + "/{key}",
            _delete_key,
            "authn.DeleteUserKeyApiResponse",
            "Delete_User_Key",
        ),
        ("GET", roles + "/{role}", _get_role, "authz.GetRoleApiResponse", "View_Role"),
        ("POST", roles, _create_role, "authz.CreateRoleApiResponse", "Create_Role"),
        ("PUT", roles + "/{role}", _update_role, "authz.UpdateRoleApiResponse", "Create_Role"),
        (
            "DELETE",
            policies + "/{policy}",
            _delete_policy,
            "authz.DeleteAuthorizationPolicyApiResponse",
            "Delete_Authorization_Policy",
        ),
        ("GET", keys + "/{key}", _get_key, "authn.GetUserKeyApiResponse", "View_User_Key"),
        ("DELETE", roles + "/{role}", _delete_role, "authz.DeleteRoleApiResponse", "Delete_Role"),
        (
            "GET",
            policies + "/{policy}",
            _get_policy,
            "authz.GetAuthorizationPolicyApiResponse",
            "View_Authorization_Policy",
        ),
        (
            "POST",
            policies,
            _create_policy,
            "authz.CreateAuthorizationPolicyApiResponse",
            "Create_Authorization_Policy",
        ),
        (
            "GET",
            operations + "/{operation}",
            _get_operation,
            "authz.GetOperationApiResponse",
            "View_Operation",
        ),
    )
    for method, path, handler, response, permission in others:
        space.add(method, path, handler, "iam.v4." + response, permission=permission)
