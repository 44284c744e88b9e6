# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the account may do by v3: cheap reads on Prism Central and an Element, and the permissions of its roles.

Prism Central's roles say nothing of an Element, which makes the snapshots: there only trying shows (nutanix-v3.md, section 13).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from replicator.prism.answers import Node
from replicator.prism.errors import (
    PrismAuthError,
    PrismError,
    PrismNotFoundError,
    PrismPermissionError,
    PrismRefusedError,
)
from replicator.prism.types import BACKUP, CLUSTERS, VMS, Access
from replicator.prism.v3_calls import V3Host
from replicator.prism.v3_regions import PATH as REGIONS

#: What is listed on Prism Central, by duty, its kind, and what that needs.
_READS: Final[tuple[tuple[str, str, str, str], ...]] = (
    (CLUSTERS, "clusters", "cluster", "View_Cluster"),
    (VMS, "vms", "vm", "View_Virtual_Machine"),
    (VMS, "images", "image", "View_Image"),
    (VMS, "subnets", "subnet", "View_Subnet"),
    (BACKUP, "volume_groups", "volume_group", "View_Volume_Group_Details"),
)
#: What can only be proved by doing it, or by the roles. Names that this Prism does not have are passed over.
_NEEDS: Final = {
    BACKUP: (
        "Create_Volume_Group",
        "Update_Volume_Group_Details_Internal",
        "Delete_Volume_Group",
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
_ROLES_MAX: Final = 500


@dataclass(frozen=True, slots=True)
class _Roles:
    """The account's roles, and the ids of the permissions that they hold. ``everything``: it is an administrator."""

    names: tuple[str, ...]
    held: frozenset[str]
    everything: bool


async def read_access(central: V3Host, element: V3Host | None) -> Sequence[Access]:
    """As ``Prism.access``. ``element``: one to try the account on; None where none is known."""
    is_element = element is not None and element.endpoint is central.endpoint
    # An Element lists neither clusters nor, by v3, volume groups.
    reads = [read for read in _READS if not is_element or read[0] == VMS]
    found = [await _try_list(central, *read) for read in reads]
    if element is not None:
        found.append(await _try_snapshots(element))
        found.append(await _try_regions(element))
    found.extend(
        [_unknown(duty, "an Element tells no roles") for duty in _NEEDS]
        if is_element
        else await _by_roles(central)
    )
    return found


async def _try_list(host: V3Host, duty: str, path: str, kind: str, permission: str) -> Access:
    try:
        await host.call("POST", f"{path}/list", {"kind": kind, "length": 1})
    except PrismPermissionError as error:
        return Access(duty, granted=False, lacks=error.permission or permission, detail=str(error))
    except (PrismNotFoundError, PrismRefusedError) as error:
        return Access(duty, granted=None, lacks=permission, detail=str(error))
    return Access(duty, granted=True, detail=f"may list {path}")


async def _try_snapshots(element: V3Host) -> Access:
    try:
        await element.call("POST", "vm_snapshots/list", {"kind": "vm_snapshot", "length": 1})
    except (PrismAuthError, PrismPermissionError) as error:
        return _not_on_element("does not accept the account for snapshots", error)
    except PrismError as error:
        return Access(BACKUP, granted=None, lacks="vm_snapshots", detail=str(error))
    return Access(BACKUP, granted=True, detail="may list snapshots on the Element")


async def _try_regions(element: V3Host) -> Access:
    """A question that holds nothing must be refused as such: then changed regions can be asked for here."""
    try:
        await element.call("POST", REGIONS, {})
    except PrismRefusedError:
        return Access(BACKUP, granted=True, detail="may ask for changed regions on the Element")
    except (PrismAuthError, PrismPermissionError) as error:
        return _not_on_element("does not let the account ask for changed regions", error)
    except PrismError as error:
        return Access(BACKUP, granted=None, lacks=REGIONS, detail=str(error))
    return Access(BACKUP, granted=None, lacks=REGIONS, detail="it answers to an empty question")


def _not_on_element(what: str, error: PrismError) -> Access:
    return Access(
        BACKUP,
        granted=False,
        detail=f"the Element {what} ({error})",
        remedy="make the account known to the Element, as Cluster Admin; or name another that is, with prism_element_user"
        " and prism_element_passfile",
    )


async def _by_roles(central: V3Host) -> list[Access]:
    """One for each duty: all that its roles must hold, all that they lack, or that they cannot be seen."""
    try:
        roles = await _roles(central)
        if roles.everything:
            detail = f"role {', '.join(roles.names)}" if roles.names else "the local administrator"
            return [Access(duty, granted=True, detail=detail) for duty in _NEEDS]
        if not roles.names:
            return [_unknown(duty, "no role of the account itself was found") for duty in _NEEDS]
        known = await _permissions(central)
    except _UNSEEN as error:
        return [_unknown(duty, f"its roles cannot be seen: {error}") for duty in _NEEDS]
    return [_judge(duty, roles, known) for duty in _NEEDS]


def _judge(duty: str, roles: _Roles, known: dict[str, str]) -> Access:
    names = ", ".join(roles.names)
    needed = [name for name in _NEEDS[duty] if name in known]
    missing = [name for name in needed if known[name] not in roles.held]
    if missing:
        return Access(duty, granted=False, lacks=", ".join(missing), detail=f"by its role {names}")
    if not needed:
        return _unknown(duty, "Prism's permissions have other names")
    return Access(duty, granted=True, detail=f"by its role {names}")


def _unknown(duty: str, detail: str) -> Access:
    return Access(duty, granted=None, detail=detail)


async def _roles(central: V3Host) -> _Roles:
    info = await central.get("users/info")
    names: list[str] = []
    held: set[str] = set()
    policies = info.nodes("access_control_policy_list")
    for policy in policies[:_ROLES_MAX]:
        role = policy.node("role")
        names.append(role.text("name", ""))
        held.update(role.texts("permission_uuid_list"))
    details = info.maybe("user_details")
    is_admin = not policies and details is not None and await _is_admin(central, details)
    everything = is_admin or not _ALL_POWERFUL.isdisjoint(names)
    return _Roles(tuple(sorted(set(names))), frozenset(held), everything)


async def _is_admin(central: V3Host, details: Node) -> bool:
    """The local administrator has no policies, and all rights. ``users/me`` must say the same of who it is."""
    if details.text("user_type", "") != "LOCAL" or details.text("username", "") != "admin":
        return False
    me = (await central.get("users/me")).node("status")
    return me.text("name", "") == "admin"


async def _permissions(central: V3Host) -> dict[str, str]:
    """The ids of the permissions that matter, by name."""
    wanted = sorted({name for needs in _NEEDS.values() for name in needs})
    found: dict[str, str] = {}
    async with aclosing(central.pages("permissions", "permission", page=500)) as items:
        async for item in items:
            name = item.node("status").text("name", "")
            if name in wanted:
                found[name] = item.node("metadata").uuid("uuid")
    return found
