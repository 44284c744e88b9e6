# SPDX-License-Identifier: AGPL-3.0-or-later
"""Volume groups of an Element's v2.0: disks cloned from files, external clients opened and closed."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import msgspec

from replicator.simulator.model import GroupDisk, IscsiClient, VolumeGroup
from replicator.simulator.v3.checks import (
    InvalidError,
    boolean,
    check,
    many,
    record,
    text,
    uuid,
    whole,
)
from replicator.simulator.v3.element_v2 import ElementV2, accepted, list_of
from replicator.simulator.v3.envelope import V3, Json
from replicator.simulator.v3.groups import target_name
from replicator.simulator.web import HttpError, Reply, Request

MIB = 1 << 20
_CREATE = record(container_uuid=uuid, storage_container_uuid=uuid, size=whole(1), size_mb=whole(1))
_CLONE = record(
    ndfs_filepath=text(1024),
    vmdisk_uuid=uuid,
    container_uuid=uuid,
    storage_container_uuid=uuid,
    minimum_size=whole(0),
)
_DISK = record(
    index=whole(0, 16383),
    create_spec=_CREATE,
    create_config=_CREATE,
    clone_spec=_CLONE,
    volume_group_uuid=uuid,
)
_CLIENT = record(client_address_=text(255, shortest=1), chap_secret=text(16, shortest=12))
_AUTHENTICATION = record(auth_type_=text(one_of=("CHAP", "NONE")), password=text(16, shortest=12))
_GROUP = record(
    name_=text(256, shortest=1),
    description=text(1000),
    uuid=uuid,
    disk_list=many(_DISK, 256),
    attached_clients=many(_CLIENT, 32),
    iscsi_initiator_list=many(text(255, shortest=1), 32),
    iscsi_initiator_name_list=many(text(255, shortest=1), 32),
    iscsi_target=text(512),
    iscsi_target_prefix=text(512),
    enabled_authentications=many(_AUTHENTICATION, 2),
    flash_mode_enabled=boolean,
    load_balance_vm_attachments=boolean,
    is_shared=boolean,
)
_CHANGE = record(
    uuid=uuid,
    name=text(256, shortest=1),
    description=text(1000),
    attached_clients=many(_CLIENT, 32),
    iscsi_initiator_list=many(text(255, shortest=1), 32),
    iscsi_initiator_name_list=many(text(255, shortest=1), 32),
    iscsi_target=text(512),
    enabled_authentications=many(_AUTHENTICATION, 2),
    flash_mode_enabled=boolean,
    load_balance_vm_attachments=boolean,
)
_OPEN = record(iscsi_client_=_CLIENT, operation=text(one_of=("ATTACH", "DETACH")), uuid=uuid)
_VM = record(
    operation=text(one_of=("ATTACH", "DETACH")), uuid=uuid, vm_uuid_=uuid, index=whole(0, 255)
)


class ElementGroups:
    """Handlers; ``request.cluster`` is always an Element's."""

    def __init__(self, v3: V3, element: ElementV2) -> None:
        self._v3 = v3
        self._element = element

    def _find(self, request: Request, group: str) -> VolumeGroup:
        found = self._v3.world.volume_groups.get(group)
        if found is None or found.cluster != request.cluster:
            raise HttpError(404, f"Volume group with UUID {group} not found", "not_found")
        return found

    async def get(self, request: Request, group: str) -> Reply:
        """GET /volume_groups/{uuid}."""
        return Reply(200, _body(self._find(request, group)))

    async def list_all(self, request: Request) -> Reply:
        """GET /volume_groups."""
        here = [g for g in self._v3.world.volume_groups.values() if g.cluster == request.cluster]
        return list_of([_body(group) for group in here], request)

    async def create(self, request: Request) -> Reply:
        """POST /volume_groups."""
        body = check(request.json(), _GROUP)
        made = str(uuid4())
        name = body.get("iscsi_target") or body.get("iscsi_target_prefix") or body["name"]
        group = VolumeGroup(
            uuid=made,
            name=body["name"],
            description=body.get("description", ""),
            cluster=request.cluster or "",
            target=target_name(name, made),
            load_balanced=body.get("load_balance_vm_attachments", False),
            shared=body.get("is_shared", False),
        )
        _authenticate(group, body)
        group.clients = _clients(group, body)
        disks = self._disks(group, body.get("disk_list", []))
        return accepted(self._v3.core.create_group(group, disks, **self._v3.common(request)))

    def _disks(self, group: VolumeGroup, given: list[Json]) -> list[tuple[GroupDisk, Any]]:
        taken = {disk.index for disk in group.disks}
        found = []
        for each in given:
            index = each.get("index", next(n for n in range(16385) if n not in taken))
            if index in taken:
                raise InvalidError(f"disk_list: the index {index} is taken")
            taken.add(index)
            clone, create = (
                each.get("clone_spec"),
                each.get("create_spec") or each.get("create_config"),
            )
            if (clone is None) == (create is None):
                raise InvalidError(
                    "disk_list: a disk is one of clone_spec and create_spec", "MISSING_ATTRIBUTE"
                )
            if clone is not None and not self._v3.knob("v3_group_from_path", default=True):
                raise InvalidError("disk_list: clone_spec is not known", "REQUEST_NOT_SUPPORTED")
            spec = clone or create or {}
            container = spec.get("container_uuid") or spec.get("storage_container_uuid")
            if clone is not None:
                source, size = self._element.source(clone), clone.get("minimum_size", 0)
            else:
                size = spec.get("size", spec.get("size_mb", 0) * MIB)
                if not size or container is None:
                    raise InvalidError(
                        "create_spec: needs container_uuid and size or size_mb", "MISSING_ATTRIBUTE"
                    )
                source = self._v3.core.sources.blank(size)
            if container is not None and container not in self._v3.world.containers:
                raise HttpError(404, f"storage container {container} not found", "not_found")
            where = container or self._v3.core.default_container(group.cluster)
            found.append(
                (GroupDisk(uuid=str(uuid4()), index=index, size=size, container=where), source)
            )
        return found

    async def add_disk(self, request: Request, group: str) -> Reply:
        """POST /volume_groups/{uuid}/disks."""
        found = self._find(request, group)
        body = check(request.json(), _DISK)
        [(disk, source)] = self._disks(found, [body])
        return accepted(
            self._v3.core.add_group_disk(found.uuid, disk, source, **self._v3.common(request))
        )

    async def remove_disk(self, request: Request, group: str, index: str) -> Reply:
        """DELETE /volume_groups/{uuid}/disks/{index}."""
        found = self._find(request, group)
        for disk in found.disks:
            if str(disk.index) == index:
                common = self._v3.common(request)
                return accepted(self._v3.core.remove_group_disk(found.uuid, disk.uuid, **common))
        raise HttpError(404, f"volume group {group} has no disk {index}", "not_found")

    async def update(self, request: Request, group: str) -> Reply:
        """PUT /volume_groups/{uuid}; an empty ``attached_clients`` closes it to everybody."""
        found = self._find(request, group)
        body = check(request.json(), _CHANGE)
        changed: VolumeGroup = msgspec.structs.replace(found)
        changed.name = body.get("name", found.name)
        changed.description = body.get("description", found.description)
        changed.load_balanced = body.get("load_balance_vm_attachments", found.load_balanced)
        _authenticate(changed, body)
        if body.keys() & {"attached_clients", "iscsi_initiator_list", "iscsi_initiator_name_list"}:
            changed.clients = _clients(found, body)
        return accepted(self._v3.core.update_group(found.uuid, changed, **self._v3.common(request)))

    async def delete(self, request: Request, group: str) -> Reply:
        """DELETE /volume_groups/{uuid}: refused while anything is attached."""
        found = self._find(request, group)
        if found.clients or found.vms:
            raise HttpError(
                422, f"Volume group {found.name} has attachments: detach them first", "in_use"
            )
        return accepted(self._v3.core.delete_group(found.uuid, **self._v3.common(request)))

    async def open(self, request: Request, group: str) -> Reply:
        """POST /volume_groups/{uuid}/open: let an initiator log in."""
        found = self._find(request, group)
        given = check(request.json(), _OPEN)["iscsi_client"]
        client = IscsiClient(
            uuid=str(uuid4()), initiator=given["client_address"], secret=given.get("chap_secret")
        )
        return accepted(self._v3.core.attach_client(found.uuid, client, **self._v3.common(request)))

    async def close(self, request: Request, group: str) -> Reply:
        """POST /volume_groups/{uuid}/close: take that back."""
        found = self._find(request, group)
        given = check(request.json(), _OPEN)["iscsi_client"]
        return accepted(
            self._v3.core.detach_client(
                found.uuid, given["client_address"], **self._v3.common(request)
            )
        )

    async def attach_vm(self, request: Request, group: str) -> Reply:
        """POST /volume_groups/{uuid}/attach."""
        found = self._find(request, group)
        vm = self._element.find_vm(request, check(request.json(), _VM)["vm_uuid"])
        return accepted(self._v3.core.attach_vm(found.uuid, vm.uuid, **self._v3.common(request)))

    async def detach_vm(self, request: Request, group: str) -> Reply:
        """POST /volume_groups/{uuid}/detach."""
        found = self._find(request, group)
        vm = check(request.json(), _VM)["vm_uuid"]
        return accepted(self._v3.core.detach_vm(found.uuid, vm, **self._v3.common(request)))


def _authenticate(group: VolumeGroup, body: Json) -> None:
    for each in body.get("enabled_authentications", []):
        group.chap = each["auth_type"] == "CHAP"
        if group.chap:
            if "password" not in each:
                raise InvalidError(
                    "enabled_authentications: CHAP needs a password", "MISSING_ATTRIBUTE"
                )
            group.secret = each["password"]


def _clients(group: VolumeGroup, body: Json) -> list[IscsiClient]:
    known = {client.initiator: client for client in group.clients}
    given = {
        each["client_address"]: each.get("chap_secret") for each in body.get("attached_clients", [])
    }
    for name in ("iscsi_initiator_list", "iscsi_initiator_name_list"):
        given |= dict.fromkeys(body.get(name, []))
    return [
        known.get(address) or IscsiClient(uuid=str(uuid4()), initiator=address, secret=secret)
        for address, secret in given.items()
    ]


def _body(group: VolumeGroup) -> Json:
    return {
        "uuid": group.uuid,
        "name": group.name,
        "description": group.description,
        "iscsi_target": group.target,
        "enabled_authentications": [
            {"auth_type": "CHAP" if group.chap else "NONE", "password": None}
        ],
        "load_balance_vm_attachments": group.load_balanced,
        "is_shared": group.shared,
        "flash_mode_enabled": False,
        "logical_timestamp": max(group.version, 1),
        "disk_list": [
            {
                "index": disk.index,
                "vmdisk_uuid": disk.uuid,
                "vmdisk_size_bytes": disk.size,
                "vmdisk_size_mb": disk.size // MIB,
                "storage_container_uuid": disk.container,
            }
            for disk in group.disks
        ],
        "attachment_list": [
            {"client_uuid": c.uuid, "client_address": c.initiator} for c in group.clients
        ]
        + [{"vm_uuid": vm} for vm in group.vms],
        "attached_clients": [
            {"client_address": c.initiator, "uuid": c.uuid} for c in group.clients
        ],
    }
