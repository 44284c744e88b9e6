# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which calls of v3 and v2.0 Prism Central and an Element answer, with what permission, and how their errors look.

The split is the point: ``vm_snapshots`` and ``data/changed_regions`` are 404 on Prism Central, policies, volume groups and
recovery points of v3 are 404 on an Element, which refuses a PUT of a VM.
"""

from __future__ import annotations

import re
from typing import Final

from replicator.simulator.core import Core
from replicator.simulator.v3.checks import InvalidError
from replicator.simulator.v3.element_v2 import ElementV2
from replicator.simulator.v3.element_v2_groups import ElementGroups
from replicator.simulator.v3.envelope import API_VERSION, V3
from replicator.simulator.v3.groups import Groups
from replicator.simulator.v3.images import Images
from replicator.simulator.v3.inventory import Inventory
from replicator.simulator.v3.recovery_points import RecoveryPoints
from replicator.simulator.v3.snapshots import Snapshots
from replicator.simulator.v3.tasks import Tasks
from replicator.simulator.v3.users import Users
from replicator.simulator.v3.vms import Vms
from replicator.simulator.web import Handler, HttpError, Reply, Request, Router

BASE: Final = "/api/nutanix/v3"
BASES_V2: Final = ("/PrismGateway/services/rest/v2.0", "/api/nutanix/v2.0")
_VIEW_VM, _NEW_VM, _CHANGE_VM, _DROP_VM = (
    f"{word}_Virtual_Machine" for word in ("View", "Create", "Update", "Delete")
)
_VIEW_POINT, _NEW_POINT, _DROP_POINT = (
    f"{word}_Recovery_Point" for word in ("View", "Create", "Delete")
)
_VIEW_GROUP, _NEW_GROUP, _DROP_GROUP = (
    "View_Volume_Group_Details", "Create_Volume_Group", "Delete_Volume_Group"
)  # fmt: skip
_CHANGE_GROUP = "Update_Volume_Group_Details_Internal"
_OPEN_GROUP, _CLOSE_GROUP = (
    "Attach_Volume_Group_To_External_iSCSI_Client", "Detach_Volume_Group_From_External_iSCSI_Client"
)  # fmt: skip
_VIEW_IMAGE, _NEW_IMAGE, _DROP_IMAGE = (f"{word}_Image" for word in ("View", "Create", "Delete"))

Row = tuple[str, str, Handler, str | None]

#: How v3 spells the reasons; by status where the word is not here.
_REASONS: Final = {
    "not_found": "ENTITY_NOT_FOUND",
    "spec_version": "CONCURRENT_REQUESTS_NOT_ALLOWED",
    "etag_mismatch": "CONCURRENT_REQUESTS_NOT_ALLOWED",
    "forbidden": "ACCESS_DENIED",
    "rate_limit": "TOO_MANY_REQUESTS",
    "exists": "ENTITY_ALREADY_EXISTS",
    "in_use": "ENTITY_DELETION_FAILED",
    "not_supported": "REQUEST_NOT_SUPPORTED",
    "media_type": "UNSUPPORTED_MEDIA_TYPE_ERROR",
}
_BY_STATUS: Final = {
    401: "AUTHENTICATION_REQUIRED",
    500: "INTERNAL_ERROR",
    503: "SERVICE_UNAVAILABLE",
}
_V2_CODES: Final = {400: 1000, 401: 1001, 403: 1003, 404: 1202, 409: 1101, 422: 1000}


def build_v3(core: Core) -> dict[str, Router]:
    """Routers of Prism Central (``pc``) and of every Element (``element``)."""
    v3 = V3(core)
    vms, images, tasks, users = Vms(v3), Images(v3), Tasks(v3), Users(v3)
    inventory, snapshots = Inventory(v3), Snapshots(v3)
    central, element = Router(), Router()
    both = [
        *_tasks(tasks),
        *_vms(vms),
        *_images(images),
        ("GET", "/versions", inventory.versions, None),
        ("POST", "/subnets/list", inventory.list_subnets, "View_Subnet"),
        ("GET", "/subnets/{uuid}", inventory.get_subnet, "View_Subnet"),
        # An Element answers it as well: ntnx-api finds out in this way what it talks to.
        ("GET", "/users/me", users.me, None),
    ]
    _mount(central, BASE, [*both, *_central(v3, vms, inventory, users)])
    _mount(element, BASE, [*both, *_snapshots(snapshots), ("PUT", "/vms/{uuid}", _not_here, None)])
    for router in (central, element):
        router.add(
            "PUT",
            f"{BASE}/images/{{uuid}}/file",
            images.put_file,
            permission=_NEW_IMAGE,
            streams=True,
        )
    identifiers = _identifiers(snapshots)
    _mount(central, BASE, identifiers)
    _mount(element, BASE, [(m, t, _unless_off(v3, h), p) for m, t, h, p in identifiers])
    for base in BASES_V2:
        _mount(element, base, _element_v2(v3))
        _mount(central, base, [("GET", "/vms/{uuid}", _not_on_central, None)])
    return {"pc": central, "element": element}


def _mount(router: Router, base: str, rows: list[Row]) -> None:
    for method, template, handler, permission in rows:
        router.add(method, base + template, handler, permission=permission)


def _tasks(tasks: Tasks) -> list[Row]:
    return [
        ("POST", "/tasks/list", tasks.list_all, "View_Task"),
        ("POST", "/tasks/poll", tasks.poll, "View_Task"),
        ("GET", "/tasks/{uuid}", tasks.get, "View_Task"),
        ("POST", "/tasks/{uuid}/abort", tasks.abort, "View_Task"),
    ]


def _vms(vms: Vms) -> list[Row]:
    return [
        ("POST", "/vms/list", vms.list_all, _VIEW_VM),
        ("GET", "/vms/{uuid}", vms.get, _VIEW_VM),
        ("POST", "/vms", vms.create, _NEW_VM),
        ("DELETE", "/vms/{uuid}", vms.delete, _DROP_VM),
        ("GET", "/vms/{uuid}/vm_disk/{disk}/data", vms.data, _VIEW_VM),
    ]


def _images(images: Images) -> list[Row]:
    return [
        ("POST", "/images/list", images.list_all, _VIEW_IMAGE),
        ("GET", "/images/{uuid}", images.get, _VIEW_IMAGE),
        ("POST", "/images", images.create, _NEW_IMAGE),
        ("PUT", "/images/{uuid}", images.update, "Update_Image"),
        ("DELETE", "/images/{uuid}", images.delete, _DROP_IMAGE),
        ("GET", "/images/{uuid}/file", images.get_file, _VIEW_IMAGE),
    ]


def _snapshots(snapshots: Snapshots) -> list[Row]:
    return [
        ("POST", "/vm_snapshots/list", snapshots.list_all, _VIEW_POINT),
        ("GET", "/vm_snapshots/{uuid}", snapshots.get, _VIEW_POINT),
        ("POST", "/vm_snapshots", snapshots.create, _NEW_POINT),
        ("PUT", "/vm_snapshots/{uuid}", snapshots.update, "Set_Expiration_Time_Recovery_Point"),
        ("DELETE", "/vm_snapshots/{uuid}", snapshots.delete, _DROP_POINT),
        ("POST", "/data/changed_regions", snapshots.changed_regions, _VIEW_POINT),
    ]


def _identifiers(snapshots: Snapshots) -> list[Row]:
    return [
        ("POST", "/idempotence_identifiers", snapshots.new_identifiers, None),
        ("GET", "/idempotence_identifiers/{client}", snapshots.get_identifiers, None),
        ("DELETE", "/idempotence_identifiers/{client}", snapshots.delete_identifiers, None),
    ]


def _central(v3: V3, vms: Vms, inventory: Inventory, users: Users) -> list[Row]:
    groups, points = Groups(v3), RecoveryPoints(v3)
    return [
        ("PUT", "/vms/{uuid}", vms.update, _CHANGE_VM),
        ("POST", "/vms/{uuid}/clone", vms.clone, _NEW_VM),
        ("POST", "/vms/{uuid}/snapshot", points.create, _NEW_POINT),
        ("POST", "/vms/{uuid}/{action}", vms.act, _CHANGE_VM),
        ("POST", "/vm_recovery_points/list", points.list_all, _VIEW_POINT),
        ("GET", "/vm_recovery_points/{uuid}", points.get, _VIEW_POINT),
        ("DELETE", "/vm_recovery_points/{uuid}", points.delete, _DROP_POINT),
        ("POST", "/vm_recovery_points/{uuid}/restore", points.restore, "Restore_VM_Recovery_Point"),
        ("POST", "/volume_groups/list", groups.list_all, _VIEW_GROUP),
        ("GET", "/volume_groups/{uuid}", groups.get, _VIEW_GROUP),
        ("POST", "/volume_groups", groups.create, _NEW_GROUP),
        ("PUT", "/volume_groups/{uuid}", groups.update, _CHANGE_GROUP),
        ("DELETE", "/volume_groups/{uuid}", groups.delete, _DROP_GROUP),
        ("POST", "/clusters/list", inventory.list_clusters, "View_Cluster"),
        ("GET", "/clusters/{uuid}", inventory.get_cluster, "View_Cluster"),
        ("POST", "/hosts/list", inventory.list_hosts, "View_Cluster"),
        ("GET", "/prism_central", inventory.prism_central, None),
        ("POST", "/groups", inventory.groups, "View_Storage_Container"),
        ("POST", "/categories/list", inventory.list_categories, "View_Category"),
        ("GET", "/categories/{name}", inventory.get_category, "View_Category"),
        ("POST", "/categories/{name}/list", inventory.list_category_values, "View_Category"),
        ("GET", "/categories/{name}/{value}", inventory.get_category_value, "View_Category"),
        ("GET", "/users/info", users.info, None),
        ("POST", "/users/list", users.list_users, "View_User"),
        ("GET", "/users/{uuid}", users.get_user, "View_User"),
        ("POST", "/roles/list", users.list_roles, "View_Role"),
        ("GET", "/roles/{uuid}", users.get_role, "View_Role"),
        ("POST", "/access_control_policies/list", users.list_policies, "View_Authorization_Policy"),
        ("GET", "/access_control_policies/{uuid}", users.get_policy, "View_Authorization_Policy"),
        ("POST", "/permissions/list", users.list_permissions, "View_Operation"),
        ("GET", "/permissions/{uuid}", users.get_permission, "View_Operation"),
    ]


def _element_v2(v3: V3) -> list[Row]:
    element = ElementV2(v3)
    groups = ElementGroups(v3, element)
    return [
        ("GET", "/cluster", element.cluster, "View_Cluster"),
        ("GET", "/clusters", element.clusters, "View_Cluster"),
        ("GET", "/hosts", element.hosts, "View_Cluster"),
        ("GET", "/storage_containers", element.containers, "View_Storage_Container"),
        ("GET", "/networks", element.networks, "View_Subnet"),
        ("GET", "/vms", element.vms, _VIEW_VM),
        ("GET", "/vms/{vm}", element.vm, _VIEW_VM),
        ("POST", "/vms/{vm}/set_power_state", element.set_power, _CHANGE_VM),
        ("POST", "/vms/{vm}/disks/attach", element.attach_disks, _CHANGE_VM),
        ("POST", "/vms/{vm}/disks/detach", element.detach_disks, _CHANGE_VM),
        ("GET", "/virtual_disks/{disk}", element.virtual_disk, _VIEW_VM),
        ("GET", "/tasks/{task}", element.task, "View_Task"),
        ("POST", "/tasks/poll", element.poll, "View_Task"),
        ("GET", "/volume_groups", groups.list_all, _VIEW_GROUP),
        ("POST", "/volume_groups", groups.create, _NEW_GROUP),
        ("GET", "/volume_groups/{group}", groups.get, _VIEW_GROUP),
        ("PUT", "/volume_groups/{group}", groups.update, _CHANGE_GROUP),
        ("DELETE", "/volume_groups/{group}", groups.delete, _DROP_GROUP),
        ("POST", "/volume_groups/{group}/disks", groups.add_disk, "Create_Volume_Group_Disk"),
        (
            "DELETE",
            "/volume_groups/{group}/disks/{index}",
            groups.remove_disk,
            "Delete_Volume_Group_Disk",
        ),
        ("POST", "/volume_groups/{group}/open", groups.open, _OPEN_GROUP),
        ("POST", "/volume_groups/{group}/close", groups.close, _CLOSE_GROUP),
        ("POST", "/volume_groups/{group}/attach", groups.attach_vm, _CHANGE_GROUP),
        ("POST", "/volume_groups/{group}/detach", groups.detach_vm, _CHANGE_GROUP),
    ]


async def _not_here(request: Request, **arguments: str) -> Reply:
    del arguments
    raise HttpError(
        405, f"{request.method} {request.path} is not supported on an Element", "not_supported"
    )


async def _not_on_central(request: Request, **arguments: str) -> Reply:
    del arguments
    raise HttpError(412, f"{request.path} is served by the cluster's Element", "not_supported")


def _unless_off(v3: V3, handler: Handler) -> Handler:
    """Whether Elements hand out identifiers is not known of all releases: a knob takes it from them."""

    async def handle(request: Request, **arguments: str) -> Reply:
        if not v3.knob("v3_identifiers_on_element", default=True):
            raise HttpError(404, f"no such path: {request.path}", "not_found")
        return await handler(request, **arguments)

    return handle


def render_error(request: Request, error: HttpError) -> Reply:
    """The body of an error, as v3 writes it; as v2.0 does below its paths."""
    if any(request.path.startswith(base) for base in BASES_V2):
        code = {"code": _V2_CODES.get(error.status, 1000), "help_url": None}
        return Reply(
            error.status, {"message": error.message, "error_code": code, "detailed_message": None}
        )
    if isinstance(error, InvalidError):
        reason = error.v3_reason
    elif error.reason in _REASONS:
        reason = _REASONS[error.reason]
    else:
        reason = _BY_STATUS.get(error.status, "INVALID_REQUEST")
    details = {"permission": error.permission} if error.permission is not None else {}
    body = {
        "api_version": API_VERSION,
        "code": error.status,
        "kind": _kind(request.path),
        "state": "ERROR",
        "message_list": [{"message": error.message, "reason": reason, "details": details}],
    }
    return Reply(error.status, body)


def _kind(path: str) -> str:
    """``vm`` for /api/nutanix/v3/vms/…"""
    match = re.match(rf"{BASE}/(\w+)", path)
    word = match[1] if match is not None else ""
    if word.endswith("ies"):
        return f"{word[:-3]}y"
    return word.removesuffix("s")
