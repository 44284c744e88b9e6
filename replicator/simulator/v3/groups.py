# SPDX-License-Identifier: AGPL-3.0-or-later
"""Volume groups of v3: made with their disks and who may log in, changed by PUT, removed once nothing is attached."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import uuid4

import msgspec

from replicator.simulator.core import DiskSource
from replicator.simulator.model import AffectedEntity, GroupDisk, IscsiClient, Task, VolumeGroup
from replicator.simulator.v3.checks import InvalidError, check, check_uuid
from replicator.simulator.v3.envelope import V3, Json, Listing, list_reply
from replicator.simulator.v3.shapes import intent, volume_group
from replicator.simulator.v3.vm_spec import MIB, source_of
from replicator.simulator.web import HttpError, Reply, Request

_BODY = intent("volume_group", volume_group)
_ATTRIBUTES = frozenset({"name", "uuid", "cluster", "created_by"})


class Groups:
    """Handlers."""

    def __init__(self, v3: V3) -> None:
        self._v3 = v3

    def _find(self, uuid: str) -> VolumeGroup:
        found = self._v3.world.volume_groups.get(check_uuid(uuid))
        if found is None:
            raise HttpError(404, f"the volume_group {uuid} was not found", "not_found")
        return found

    async def get(self, request: Request, uuid: str) -> Reply:
        """GET /volume_groups/{uuid}."""
        del request
        if check_uuid(uuid) not in self._v3.world.volume_groups:
            return Reply(200, self._v3.unmade("volume_group", uuid))
        return self._v3.entity_reply(self.body(self._find(uuid)))

    async def list_all(self, request: Request) -> Reply:
        """POST /volume_groups/list."""
        listing = Listing("volume_group", _ATTRIBUTES, _describe, self.body)
        return await list_reply(request, self._v3.world.volume_groups.values(), listing)

    def body(self, group: VolumeGroup) -> Json:
        """A volume group as v3 writes it down. Secrets are never read back."""
        shared: Json = {
            "sharing_status": "SHARED" if group.shared else "NOT_SHARED",
            "usage_type": group.usage,
            "flash_mode": "DISABLED",
            "load_balance_vm_attachments": group.load_balanced,
        }
        if group.created_by:
            shared["created_by"] = group.created_by
        prefix = group.v3.get("iscsi_target_prefix")
        if prefix:
            shared["iscsi_target_prefix"] = prefix
        chap = "CHAP" if group.chap else "NONE"
        size = sum(disk.size for disk in group.disks)
        attachments: list[Json] = [
            {"iscsi_initiator_name": client.initiator} for client in group.clients
        ]
        vms: list[Json] = [{"vm_reference": {"kind": "vm", "uuid": vm}} for vm in group.vms]
        disks = [
            {
                "index": disk.index,
                "disk_size_bytes": disk.size,
                "disk_size_mib": -(-disk.size // MIB),
                "storage_container_uuid": disk.container,
            }
            for disk in group.disks
        ]
        status = {
            "name": group.name,
            "description": group.description,
            "state": self._v3.state("volume_group", group.uuid),
            "cluster_reference": self._v3.cluster_reference(group.cluster),
            "resources": {
                **shared,
                "iscsi_target_name": group.target,
                "enabled_authentications": chap,
                "size_bytes": size,
                "size_mib": -(-size // MIB),
                "disk_list": [
                    {"uuid": disk.uuid, **body}
                    for disk, body in zip(group.disks, disks, strict=True)
                ],
                "attachment_list": [{**a, "enabled_authentications": chap} for a in attachments]
                + vms,
            },
            **self._v3.execution_context(group.uuid),
        }
        spec = {
            "name": group.name,
            "description": group.description,
            "cluster_reference": self._v3.cluster_reference(group.cluster),
            "resources": {**shared, "disk_list": disks, "attachment_list": attachments + vms},
        }
        return {
            "status": status,
            "spec": spec,
            "metadata": self._v3.metadata("volume_group", group),
        }

    async def create(self, request: Request) -> Reply:
        """POST /volume_groups."""
        body = check(request.json(), _BODY)
        spec = body["spec"]
        cluster = spec.get("cluster_reference", {}).get("uuid")
        if cluster is None:
            raise InvalidError(
                "spec: 'cluster_reference' is a required property", "MISSING_ATTRIBUTE"
            )
        if cluster not in self._v3.world.clusters:
            raise HttpError(404, f"the cluster {cluster} was not found", "not_found")
        uuid = body["metadata"].get("uuid") or str(uuid4())
        if uuid in self._v3.world.volume_groups:
            raise HttpError(409, f"there is a volume_group {uuid} already", "exists")
        resources = spec["resources"]
        prefix = resources.get("iscsi_target_prefix", "")
        group = VolumeGroup(
            uuid=uuid, cluster=cluster, target=target_name(prefix or spec["name"], uuid)
        )
        group.v3 = {"iscsi_target_prefix": prefix} if prefix else {}
        _apply(group, spec)
        clients, vms = _attachments(group, resources.get("attachment_list", []))
        if vms:
            raise InvalidError(
                "attachment_list: VMs are not attached here", "REQUEST_NOT_SUPPORTED"
            )
        group.clients = clients
        disks = self._disks(group, resources.get("disk_list", []))
        task = self._v3.core.create_group(group, disks, **self._v3.common(request))
        return self._v3.accepted(self._v3.remember("volume_group", uuid, "create", spec, task))

    def _disks(self, group: VolumeGroup, given: list[Json]) -> list[tuple[GroupDisk, DiskSource]]:
        taken = {disk.index for disk in group.disks}
        found = []
        for each in given:
            index = each.get("index", next(n for n in range(16385) if n not in taken))
            if index in taken:
                raise InvalidError(f"disk_list: the index {index} is taken")
            taken.add(index)
            found.append(self._disk(group, index, each))
        return found

    def _disk(self, group: VolumeGroup, index: int, given: Json) -> tuple[GroupDisk, DiskSource]:
        size = given.get("disk_size_bytes", given.get("disk_size_mib", 0) * MIB)
        container = given.get("storage_container_uuid")
        reference = given.get("data_source_reference")
        if container is not None and container not in self._v3.world.containers:
            raise HttpError(404, f"the storage_container {container} was not found", "not_found")
        if reference is not None:
            self._check_strategy(reference)
            source = source_of(self._v3, reference)
        elif size and container is not None:
            source = self._v3.core.sources.blank(size)
        else:
            raise InvalidError(
                "disk_list: a disk needs a data_source_reference, or a size and a storage_container_uuid",
                "MISSING_ATTRIBUTE",
            )
        where = container or self._v3.core.default_container(group.cluster)
        made = GroupDisk(uuid=str(uuid4()), index=index, size=size, container=where, source={})
        return made, source

    def _check_strategy(self, reference: Json) -> None:
        """Whether a disk by its URL is taken at all is not certain of real ones: it can be switched off."""
        if "url" in reference and not self._v3.knob("v3_group_from_url", default=True):
            raise InvalidError(
                "data_source_reference: 'url' is not supported", "REQUEST_NOT_SUPPORTED"
            )

    async def update(self, request: Request, uuid: str) -> Reply:
        """PUT /volume_groups/{uuid}: what the spec leaves out stays; an empty attachment_list detaches everybody."""
        group = self._find(uuid)
        body = check(request.json(), _BODY)
        self._v3.check_version("volume_group", group, body["metadata"])
        common = self._v3.common(request)
        parts = self._changes(group, body["spec"], common)
        affected = AffectedEntity(kind="volume_group", uuid=group.uuid, name=group.name)
        task = self._v3.together("VolumeGroupUpdate", affected, parts, **common)
        made = self._v3.remember("volume_group", group.uuid, "update", body["spec"], task)
        return self._v3.accepted(made, body["metadata"]["spec_version"])

    def _changes(
        self, group: VolumeGroup, spec: Json, common: dict[str, Any]
    ) -> list[Callable[[], Task]]:
        core, resources = self._v3.core, spec["resources"]
        changed: VolumeGroup = msgspec.structs.replace(group)
        _apply(changed, spec)
        parts: list[Callable[[], Task]] = []
        if "disk_list" in resources:
            parts += self._disk_changes(group, resources["disk_list"], common)
        clients, vms = group.clients, set(group.vms)
        if "attachment_list" in resources:
            clients, vms = _attachments(group, resources["attachment_list"])
        if changed.load_balanced and clients:
            raise InvalidError(
                "a load balanced volume group takes no external client", "REQUEST_NOT_SUPPORTED"
            )
        kept = {client.initiator for client in clients}
        # One by one: a detached client's session ends.
        parts += [
            partial(core.detach_client, group.uuid, client.uuid, **common)
            for client in group.clients
            if client.initiator not in kept
        ]
        parts += [
            partial(core.detach_vm, group.uuid, vm, **common) for vm in group.vms if vm not in vms
        ]
        changed.clients = clients
        if changed != group:
            parts.append(partial(core.update_group, group.uuid, changed, **common))
        parts += [partial(core.attach_vm, group.uuid, vm, **common) for vm in vms - set(group.vms)]
        return parts

    def _disk_changes(
        self, group: VolumeGroup, given: list[Json], common: dict[str, Any]
    ) -> list[Callable[[], Task]]:
        """Disks are told apart by their index."""
        core = self._v3.core
        wanted = {each["index"] for each in given if "index" in each}
        parts: list[Callable[[], Task]] = [
            partial(core.remove_group_disk, group.uuid, disk.uuid, **common)
            for disk in group.disks
            if disk.index not in wanted
        ]
        known = {disk.index for disk in group.disks}
        fresh = [each for each in given if each.get("index") not in known]
        for disk, source in self._disks(group, fresh):
            parts.append(partial(core.add_group_disk, group.uuid, disk, source, **common))
        return parts

    async def delete(self, request: Request, uuid: str) -> Reply:
        """DELETE /volume_groups/{uuid}: refused while anything is attached."""
        group = self._find(uuid)
        if group.clients or group.vms:
            raise HttpError(
                422, f"the volume group {group.name} has attachments: detach them first", "in_use"
            )
        task = self._v3.core.delete_group(group.uuid, **self._v3.common(request))
        return self._v3.deleted("volume_group", uuid, task)


def target_name(prefix: str, uuid: str) -> str:
    """The group's part of its targets' names: iSCSI knows lower case, digits, points, colons and dashes only."""
    return re.sub(r"[^a-z0-9.:-]+", "-", f"{prefix}-{uuid}".lower())


def _apply(group: VolumeGroup, spec: Json) -> None:
    resources = spec["resources"]
    group.name = spec["name"]
    group.description = spec.get("description", group.description)
    if "sharing_status" in resources:
        group.shared = resources["sharing_status"] == "SHARED"
    group.usage = resources.get("usage_type", group.usage)
    group.created_by = resources.get("created_by", group.created_by)
    group.load_balanced = resources.get("load_balance_vm_attachments", group.load_balanced)
    if "target_secret" in resources:
        group.secret, group.chap = resources["target_secret"], True


def _attachments(group: VolumeGroup, given: list[Json]) -> tuple[list[IscsiClient], set[str]]:
    """Who may log in, and which VMs have it; those that are known keep their ids and secrets."""
    known = {client.initiator: client for client in group.clients}
    clients: dict[str, IscsiClient] = {}
    vms = set()
    for each in given:
        names = [
            each[name]
            for name in ("iscsi_initiator_name", "iscsi_initiator_network_id")
            if name in each
        ]
        if len(names) + ("vm_reference" in each) != 1:
            raise InvalidError(
                "attachment_list: an attachment is one initiator or one vm_reference"
            )
        if "vm_reference" in each:
            vms.add(each["vm_reference"]["uuid"])
            continue
        old = known.get(names[0])
        secret = each.get("client_secret", old.secret if old is not None else None)
        uuid = old.uuid if old is not None else str(uuid4())
        clients[names[0]] = IscsiClient(uuid=uuid, initiator=names[0], secret=secret)
    return list(clients.values()), vms


def _describe(group: VolumeGroup) -> Json:
    return {
        "uuid": group.uuid,
        "name": group.name,
        "cluster": group.cluster,
        "created_by": group.created_by,
    }
