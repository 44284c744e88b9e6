# SPDX-License-Identifier: AGPL-3.0-or-later
"""Namespace volumes: volume groups, their disks, who may log in to them. Secrets go in and never come out."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from replicator.simulator.model import GroupDisk, IscsiClient, VolumeGroup
from replicator.simulator.v4.api import LISTED, PAGED, Api, Call, Namespace
from replicator.simulator.v4.parts import check_cluster
from replicator.simulator.web import HttpError, Reply, Router

if TYPE_CHECKING:
    from replicator.simulator.sources import DiskSource

_CONFIG = "volumes.v4.config."
_GROUP = _CONFIG + "VolumeGroup"
_DISK = _CONFIG + "VolumeDisk"
_CLIENT = _CONFIG + "IscsiClient"
_ATTACHMENT = _CONFIG + "IscsiClientAttachment"
_VM_ATTACHMENT = _CONFIG + "VmAttachment"
_PREFIX_MAX = 150
_SOURCES = ("STORAGE_CONTAINER", "VM_DISK", "VOLUME_DISK", "DISK_RECOVERY_POINT")


def _group_body(group: VolumeGroup) -> dict[str, Any]:
    authentication = "CHAP" if group.chap else "NONE"
    attached = "EXTERNAL" if group.clients else "DIRECT" if group.vms else "NONE"
    return {
        "extId": group.uuid,
        "name": group.name,
        "description": group.description or None,
        "shouldLoadBalanceVmAttachments": group.load_balanced,
        "sharingStatus": "SHARED" if group.shared else "NOT_SHARED",
        "targetPrefix": group.v4.get("targetPrefix"),
        "targetName": group.target,
        "enabledAuthentications": authentication,
        "iscsiFeatures": {"enabledAuthentications": authentication},
        "createdBy": group.created_by or None,
        "clusterReference": group.cluster,
        "usageType": group.usage,
        "attachmentType": attached,
        "protocol": "ISCSI" if group.clients else "NOT_ASSIGNED",
        "isHidden": False,
        "hydrationStatus": "COMPLETE",
    }


def _disk_body(disk: GroupDisk) -> dict[str, Any]:
    return {
        "extId": disk.uuid,
        "index": disk.index,
        "diskSizeBytes": disk.size,
        "storageContainerId": disk.container or None,
        "description": disk.source.get("description"),
        "diskDataSourceReference": disk.source.get("reference"),
    }


def _find(call: Call, uuid: str) -> VolumeGroup:
    found: VolumeGroup = call.core.get("volume_groups", uuid)
    return found


async def _list(call: Call) -> Reply:
    return call.many(call.world.volume_groups.values(), _group_body, _GROUP)


async def _get(call: Call, group: str) -> Reply:
    found = _find(call, group)
    return call.one(_group_body(found), _GROUP, found)


async def _create(call: Call) -> Reply:
    body = call.body(_GROUP)
    for name in ("name", "clusterReference"):
        if not body.get(name):
            raise HttpError(400, f"{name} is needed to create a volume group")
    cluster = check_cluster(call.world, body["clusterReference"])
    uuid = str(uuid4())
    prefix = body.get("targetPrefix") or re.sub(r"[^\da-zA-Z:.\-]", "-", body["name"])
    # The names of targets have an end: 223 bytes, with what stands before and behind this.
    prefix = prefix[:_PREFIX_MAX]
    group = VolumeGroup(
        uuid=uuid, cluster=cluster.uuid, target=body.get("targetName") or f"{prefix}-{uuid}".lower()
    )
    _apply(group, body)
    disks: list[tuple[GroupDisk, DiskSource]] = []
    for part in body.get("disks", []):
        disks.append(_new_disk(call, group, part, [disk for disk, _ in disks]))
    return call.task(call.core.create_group(group, disks, **call.common))


def _apply(group: VolumeGroup, body: dict[str, Any]) -> None:
    """What can be given at any time."""
    group.name = body.get("name", group.name)
    group.description = body.get("description", group.description)
    group.created_by = body.get("createdBy", group.created_by)
    group.usage = body.get("usageType", group.usage)
    group.load_balanced = body.get("shouldLoadBalanceVmAttachments", group.load_balanced)
    if "sharingStatus" in body:
        group.shared = body["sharingStatus"] == "SHARED"
    features = body.get("iscsiFeatures") or {}
    given = {body.get("enabledAuthentications"), features.get("enabledAuthentications")} - {None}
    if len(given) > 1:
        raise HttpError(400, "enabledAuthentications is given twice and differs")
    group.secret = features.get("targetSecret", group.secret)
    if given:
        group.chap = given == {"CHAP"}
    if group.chap and not group.secret:
        raise HttpError(400, "CHAP needs iscsiFeatures.targetSecret")
    if "targetPrefix" in body:
        group.v4 = {**group.v4, "targetPrefix": body["targetPrefix"]}


async def _update(call: Call, group: str) -> Reply:
    found = _find(call, group)
    body = call.body(_GROUP)
    call.match(found)
    changed = copy.deepcopy(found)
    _apply(changed, body)
    return call.task(call.core.update_group(group, changed, **call.common))


async def _delete(call: Call, group: str) -> Reply:
    call.match(_find(call, group))
    return call.task(call.core.delete_group(group, **call.common))


# Disks


def _new_disk(
    call: Call, group: VolumeGroup, part: dict[str, Any], taken: list[GroupDisk]
) -> tuple[GroupDisk, DiskSource]:
    reference = part.get("diskDataSourceReference") or {}
    kind, uuid = reference.get("entityType"), reference.get("extId")
    if kind not in _SOURCES or uuid is None:
        raise HttpError(
            400,
            f"diskDataSourceReference needs an extId and one of the types {', '.join(_SOURCES)}",
        )
    index = part.get("index")
    if index is None:
        used = {disk.index for disk in taken}
        index = next(number for number in range(len(used) + 1) if number not in used)
    size = part.get("diskSizeBytes", 0)
    disk = GroupDisk(uuid=str(uuid4()), index=index, size=size, container="")
    disk.source = {"reference": reference, "description": part.get("description")}
    if kind == "STORAGE_CONTAINER":
        if not size:
            raise HttpError(400, "a blank disk needs diskSizeBytes")
        if call.core.get("containers", uuid).cluster != group.cluster:
            raise HttpError(422, f"storage container {uuid} is on another cluster")
        disk.container = uuid
        return disk, call.core.sources.blank(size)
    source = _clone_source(call, group, kind, uuid)
    if size and size < source.size:
        raise HttpError(422, f"diskSizeBytes {size} is less than the source's {source.size}")
    disk.container = call.core.default_container(group.cluster)
    return disk, source


def _clone_source(call: Call, group: VolumeGroup, kind: str, uuid: str) -> DiskSource:
    """Raises HttpError 404 for what is not there, 422 for what is on another cluster."""
    sources = call.core.sources
    if kind == "VM_DISK":
        homes = {
            vm.cluster
            for vm in call.world.vms.values()
            for disk in vm.disks
            if uuid in (disk.uuid, disk.backing)
        }
        source = sources.vm_disk(uuid)
    elif kind == "VOLUME_DISK":
        homes = {
            each.cluster
            for each in call.world.volume_groups.values()
            if any(disk.uuid == uuid for disk in each.disks)
        }
        if not homes:
            raise HttpError(404, f"no volume disk with the id {uuid}", "not_found")
        source = sources.group_disk(uuid)
    else:
        homes = {
            snapshot.cluster
            for snapshot in call.world.snapshots.values()
            for part in snapshot.vms
            if any(disk.uuid == uuid for disk in part.disks)
        }
        source = sources.snapshot_disk(uuid)
    if group.cluster not in homes:
        raise HttpError(422, f"{kind} {uuid} is on another cluster than the volume group")
    return source


async def _list_disks(call: Call, group: str) -> Reply:
    return call.many(_find(call, group).disks, _disk_body, _DISK)


def _disk(group: VolumeGroup, uuid: str) -> GroupDisk:
    for disk in group.disks:
        if disk.uuid == uuid:
            return disk
    raise HttpError(404, f"volume group {group.uuid} has no disk {uuid}", "not_found")


async def _get_disk(call: Call, group: str, disk: str) -> Reply:
    found = _find(call, group)
    return call.one(_disk_body(_disk(found, disk)), _DISK, found)


async def _create_disk(call: Call, group: str) -> Reply:
    found = _find(call, group)
    disk, source = _new_disk(call, found, call.body(_DISK), found.disks)
    return call.task(call.core.add_group_disk(group, disk, source, **call.common))


async def _delete_disk(call: Call, group: str, disk: str) -> Reply:
    _disk(_find(call, group), disk)
    return call.task(call.core.remove_group_disk(group, disk, **call.common))


# Attachments


async def _attach(call: Call, group: str) -> Reply:
    found = _find(call, group)
    body = call.body(_CLIENT)
    call.match(found)
    name = body.get("iscsiInitiatorName")
    if (name is None) == (body.get("iscsiInitiatorNetworkId") is None):
        raise HttpError(
            400, "exactly one of iscsiInitiatorName and iscsiInitiatorNetworkId is needed"
        )
    if name is None:
        raise HttpError(501, "initiators by network are not simulated", "not_supported")
    if body.get("enabledAuthentications") == "CHAP" and not found.chap:
        raise HttpError(400, "the volume group has no CHAP secret")
    client = IscsiClient(
        uuid=str(uuid4()),
        initiator=name,
        secret=body.get("clientSecret"),
        targets=body.get("numVirtualTargets", 32),
    )
    for each in call.world.volume_groups.values():
        # The same initiator is one client, whatever number of volume groups it holds.
        for known in each.clients:
            if known.initiator == name:
                client.uuid = known.uuid
    return call.task(call.core.attach_client(group, client, **call.common))


async def _detach(call: Call, group: str) -> Reply:
    found = _find(call, group)
    body = call.body(_ATTACHMENT)
    call.match(found)
    return call.task(call.core.detach_client(group, body["extId"], **call.common))


async def _list_attachments(call: Call, group: str) -> Reply:
    found = _find(call, group)

    def show(client: IscsiClient) -> dict[str, Any]:
        return {"extId": client.uuid, "clusterReference": found.cluster}

    return call.many(found.clients, show, _ATTACHMENT)


async def _attach_vm(call: Call, group: str) -> Reply:
    found = _find(call, group)
    body = call.body(_VM_ATTACHMENT)
    call.match(found)
    return call.task(call.core.attach_vm(group, body["extId"], **call.common))


async def _detach_vm(call: Call, group: str) -> Reply:
    found = _find(call, group)
    body = call.body(_VM_ATTACHMENT)
    call.match(found)
    return call.task(call.core.detach_vm(group, body["extId"], **call.common))


async def _list_vms(call: Call, group: str) -> Reply:
    return call.many(_find(call, group).vms, lambda vm: {"extId": vm}, _VM_ATTACHMENT)


async def _metadata(call: Call, group: str) -> Reply:
    found = _find(call, group)
    body = {"ownerReference": call.request.user.uuid, "categoryIds": []}
    return call.one(body, _CONFIG + "VolumeGroupMetadata", found)


def _clients(call: Call) -> dict[str, tuple[IscsiClient, list[VolumeGroup]]]:
    found: dict[str, tuple[IscsiClient, list[VolumeGroup]]] = {}
    for group in call.world.volume_groups.values():
        for client in group.clients:
            found.setdefault(client.uuid, (client, []))[1].append(group)
    return found


def _client_body(entry: tuple[IscsiClient, list[VolumeGroup]]) -> dict[str, Any]:
    client, groups = entry
    return {
        "extId": client.uuid,
        "iscsiInitiatorName": client.initiator,
        "enabledAuthentications": "CHAP" if client.secret else "NONE",
        "clusterReference": groups[0].cluster,
        "attachmentSite": "PRIMARY",
        "attachedTargets": [
            {"iscsiTargetName": group.target, "numVirtualTargets": client.targets}
            for group in groups
        ],
    }


async def _list_clients(call: Call) -> Reply:
    return call.many(_clients(call).values(), _client_body, _CLIENT)


async def _get_client(call: Call, client: str) -> Reply:
    found = _clients(call).get(client)
    if found is None:
        raise HttpError(404, f"no iSCSI client with the id {client}", "not_found")
    return call.one(_client_body(found), _CLIENT, found[1][0])


def add(api: Api, router: Router) -> None:
    """The endpoints."""
    space = Namespace(api, router, "volumes")
    groups, one = "/config/volume-groups", "/config/volume-groups/{group}"
    disks, disk = one + "/disks", one + "/disks/{disk}"
    view, client_view = "View_Volume_Group_Details", "View_External_iSCSI_Client"
    disk_view = "View_Volume_Group_Disks"
    for path, handler, response, permission, query in (
        (groups, _list, "ListVolumeGroupsApiResponse", view, LISTED),
        (one, _get, "GetVolumeGroupApiResponse", view, ("$expand",)),
        (disks, _list_disks, "ListVolumeDisksApiResponse", disk_view, LISTED),
        (disk, _get_disk, "GetVolumeDiskApiResponse", disk_view, ("$expand",)),
        (
            one + "/external-iscsi-attachments",
            _list_attachments,
            "ListExternalIscsiAttachmentsApiResponse",
            "View_Volume_Group_iSCSI_Attachments",
            LISTED,
        ),
        (
            one + "/vm-attachments",
            _list_vms,
            "ListVmAttachmentsApiResponse",
            "View_Volume_Group_VM_Attachments",
            (*PAGED, "$filter", "$orderby"),
        ),
        (
            one + "/metadata",
            _metadata,
            "GetVolumeGroupMetadataApiResponse",
            "View_Volume_Group_Metadata",
            (),
        ),
        (
            "/config/iscsi-clients",
            _list_clients,
            "ListIscsiClientsApiResponse",
            client_view,
            LISTED,
        ),
        (
            "/config/iscsi-clients/{client}",
            _get_client,
            "GetIscsiClientApiResponse",
            client_view,
            ("$expand", "$select"),
        ),
    ):
        space.get(path, handler, _CONFIG + response, permission=permission, query=query)
    for method, path, handler, response, permission in (
        ("POST", groups, _create, "CreateVolumeGroupApiResponse", "Create_Volume_Group"),
        (
            "PUT",
            one,
            _update,
            "UpdateVolumeGroupApiResponse",
            "Update_Volume_Group_Details_Internal",
        ),
        ("DELETE", one, _delete, "DeleteVolumeGroupApiResponse", "Delete_Volume_Group"),
        ("POST", disks, _create_disk, "CreateVolumeDiskApiResponse", "Create_Volume_Group_Disk"),
        ("DELETE", disk, _delete_disk, "DeleteVolumeDiskApiResponse", "Delete_Volume_Group_Disk"),
    ):
        space.add(method, path, handler, _CONFIG + response, permission=permission)
    attach = "Attach_Volume_Group_To_External_iSCSI_Client"
    detach = "Detach_Volume_Group_From_External_iSCSI_Client"
    for action, handler, response, permission in (
        ("attach-iscsi-client", _attach, "AttachIscsiClientApiResponse", attach),
        ("detach-iscsi-client", _detach, "DetachIscsiClientApiResponse", detach),
        ("attach-vm", _attach_vm, "AttachVmApiResponse", "Update_Virtual_Machine"),
        ("detach-vm", _detach_vm, "DetachVmApiResponse", "Update_Virtual_Machine"),
    ):
        path = f"{one}/$actions/{action}"
        space.post(path, handler, _CONFIG + response, permission=permission)
