# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the account may do by v4: seen by cheap reads, and by its roles where it may look at them (nutanix-v4.md, section 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from replicator.prism.answers import Node
from replicator.prism.endpoint import segment
from replicator.prism.errors import (
    PrismNotFoundError,
    PrismPermissionError,
    PrismRefusedError,
)
from replicator.prism.types import BACKUP, CLUSTERS, VMS, Access
from replicator.prism.v4_calls import V4Calls, quoted

#: Namespace and list of each thing that is only looked at, by duty, and what that needs.
_READS: Final = (
    (BACKUP, "dataprotection", "config/recovery-points", "View_Recovery_Point"),
    (BACKUP, "volumes", "config/volume-groups", "View_Volume_Group_Details"),
    (BACKUP, "volumes", "config/iscsi-clients", "View_External_iSCSI_Client"),
    (VMS, "vmm", "ahv/config/vms", "View_Virtual_Machine"),
    (VMS, "vmm", "content/images", "View_Image"),
    (VMS, "networking", "config/subnets", "View_Subnet"),
    (VMS, "clustermgmt", "config/storage-containers", "View_Storage_Container"),
    (CLUSTERS, "clustermgmt", "config/clusters", "View_Cluster"),
    (CLUSTERS, "prism", "config/tasks", "View_Task"),
)
#: What can only be proved by doing it, or by the role.
NEEDS: Final = {
    BACKUP: (
        "Create_Recovery_Point",
        "Delete_Recovery_Point",
        "Set_Expiration_Time_Recovery_Point",
        "Create_Volume_Group",
        "Delete_Volume_Group",
        "Create_Volume_Group_Disk",
        "Attach_Volume_Group_To_External_iSCSI_Client",
        "Detach_Volume_Group_From_External_iSCSI_Client",
    ),
    VMS: (
        "Create_Virtual_Machine",
        "Update_Virtual_Machine",
        "Delete_Virtual_Machine",
        "Create_Image",
        "Delete_Image",
    ),
    CLUSTERS: ("View_Cluster",),
}
_ALL_POWERFUL: Final = frozenset({"Super Admin", "Prism Admin"})
_UNSEEN: Final = (PrismPermissionError, PrismNotFoundError, PrismRefusedError)
_ROLES_MAX: Final = 20


async def read_access(calls: V4Calls, user: str) -> Sequence[Access]:
    """As ``Prism.access``. ``user``: the account's name, empty for an API key (its roles are not looked for)."""
    found = [await _try_read(calls, *read) for read in _READS]
    found.extend(await _by_roles(calls, user))
    return found


async def _try_read(
    calls: V4Calls, duty: str, namespace: str, path: str, permission: str
) -> Access:
    try:
        await calls.call(namespace, "GET", path, query={"$limit": 1})
    except PrismPermissionError as error:
        return Access(duty, granted=False, lacks=error.permission or permission, detail=str(error))
    except (PrismNotFoundError, PrismRefusedError) as error:
        return Access(duty, granted=None, lacks=permission, detail=str(error))
    return Access(duty, granted=True, detail=f"may list {namespace}/{path}")


async def _by_roles(calls: V4Calls, user: str) -> list[Access]:
    """One for each duty: all that its role must hold, all that it lacks, or that it cannot be seen."""
    try:
        roles, certain = await _roles(calls, user)
        if any(role.text("displayName", "") in _ALL_POWERFUL for role in roles):
            names = ", ".join(role.text("displayName", "") for role in roles)
            return [Access(duty, granted=True, detail=f"role {names}") for duty in NEEDS]
        held = {operation for role in roles for operation in role.texts("operations")}
        known = await _operations(calls) if roles else {}
    except _UNSEEN as error:
        return [_unknown(duty, f"its roles cannot be seen: {error}") for duty in NEEDS]
    if not roles:
        return [_unknown(duty, "no role of the account itself was found") for duty in NEEDS]
    return [_judge(duty, held, known, certain=certain) for duty in NEEDS]


def _judge(duty: str, held: set[str], known: dict[str, str], *, certain: bool) -> Access:
    needed = [name for name in NEEDS[duty] if name in known]  # not all are operations of this Prism
    missing = [name for name in needed if known[name] not in held and name not in held]
    if missing:
        # What it holds by a group is not seen, unless it is a local account.
        granted = False if certain else None
        return Access(duty, granted=granted, lacks=", ".join(missing), detail="by its role")
    if not needed:
        return _unknown(duty, "Prism's operations have other names")
    return Access(duty, granted=True, detail="by its role")


def _unknown(duty: str, detail: str) -> Access:
    return Access(duty, granted=None, detail=detail)


async def _roles(calls: V4Calls, user: str) -> tuple[list[Node], bool]:
    """The roles that policies give to the account itself, and whether there can be no others (a local account)."""
    if not user:
        return [], False
    users = await calls.listed(
        "iam",
        "authn/users",
        f"username eq {quoted(user)}",
        lambda n: n.text("username", "") == user,
    )
    if len(users) != 1:
        return [], False
    uuid = users[0].text("extId")
    policies = await calls.listed("iam", "authz/authorization-policies", keep=_names(uuid))
    roles = sorted({policy.text("role") for policy in policies if policy.has("role")})
    found = [await calls.get("iam", f"authz/roles/{segment(role)}") for role in roles[:_ROLES_MAX]]
    return found, users[0].text("userType", "") == "LOCAL"


def _names(uuid: str) -> Any:
    def matches(policy: Node) -> bool:
        # Free-form: {"user": {"uuid": {"anyof": [id]}}}, or one of the old API's forms.
        return any(uuid in str(identity.raw) for identity in policy.nodes("identities"))

    return matches


async def _operations(calls: V4Calls) -> dict[str, str]:
    """The ids of the operations that matter, by name."""
    names = sorted({name for needs in NEEDS.values() for name in needs})
    wanted = " or ".join(f"displayName eq {quoted(name)}" for name in names)
    nodes = await calls.listed(
        "iam", "authz/operations", wanted, lambda node: node.text("displayName", "") in names
    )
    return {node.text("displayName"): node.text("extId") for node in nodes}
