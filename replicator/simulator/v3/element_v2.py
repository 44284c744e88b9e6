# SPDX-License-Identifier: AGPL-3.0-or-later
"""v2.0 of an Element: the cluster, its VMs with their disks' files, power, hot-add, containers, tasks."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from typing import Any
from uuid import uuid4

from replicator.simulator.core_vms import How
from replicator.simulator.model import (
    AffectedEntity,
    Cluster,
    Container,
    Disk,
    PowerState,
    Task,
    Vm,
)
from replicator.simulator.sources import live_path
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
from replicator.simulator.v3.envelope import V3, Json, any_ended
from replicator.simulator.v3.inventory import host_uuid
from replicator.simulator.v3.tasks import operation_of
from replicator.simulator.web import HttpError, Reply, Request

_TRANSITIONS: dict[str, tuple[PowerState, How]] = {
    "ON": ("ON", "hard"),
    "OFF": ("OFF", "hard"),
    "ACPI_SHUTDOWN": ("OFF", "acpi"),
    "ACPI_REBOOT": ("ON", "acpi"),
    "RESET": ("ON", "reset"),
    "POWERCYCLE": ("ON", "cycle"),
    "PAUSE": ("PAUSED", "hard"),
    "RESUME": ("ON", "hard"),
}
_POWER = record(transition_=text(one_of=tuple(_TRANSITIONS)), uuid=uuid, host_uuid=uuid)
_ADDRESS = record(
    device_bus=text(16),
    device_index=whole(0, 255),
    disk_label=text(32),
    device_uuid=uuid,
    vmdisk_uuid=uuid,
    ndfs_filepath=text(1024),
    is_cdrom=boolean,
)
_ATTACH = record(
    uuid=uuid,
    vm_disks_=many(
        record(
            is_cdrom=boolean,
            disk_address=_ADDRESS,
            vm_disk_clone=record(
                disk_address_=_ADDRESS, minimum_size=whole(0), storage_container_uuid=uuid
            ),
            vm_disk_create=record(size_=whole(1), storage_container_uuid_=uuid),
        ),
        64,
    ),
)
_DETACH = record(uuid=uuid, vm_disks_=many(record(disk_address_=_ADDRESS, is_cdrom=boolean), 64))
_POLL = record(completed_tasks_=many(uuid, 1000), timeout_interval=whole(0, 60))
_PROGRESS = {
    "QUEUED": "Queued",
    "RUNNING": "Running",
    "SUCCEEDED": "Succeeded",
    "FAILED": "Failed",
    "CANCELED": "Aborted",
}
_BUSES = ("scsi", "ide", "sata", "pci", "spapr")


class ElementV2:
    """Handlers; ``request.cluster`` is always an Element's."""

    def __init__(self, v3: V3) -> None:
        self._v3 = v3

    def cluster_of(self, request: Request) -> Cluster:
        """The cluster that was asked."""
        found: Cluster = self._v3.core.get("clusters", request.cluster or "")
        return found

    def find_vm(self, request: Request, vm: str) -> Vm:
        """A VM of this cluster. Raises HttpError 404."""
        found = self._v3.world.vms.get(vm)
        if found is None or found.cluster != request.cluster:
            raise HttpError(404, f"VM with UUID {vm} not found", "not_found")
        return found

    # The cluster

    async def cluster(self, request: Request) -> Reply:
        """GET /cluster."""
        return Reply(200, self._cluster_body(self.cluster_of(request)))

    async def clusters(self, request: Request) -> Reply:
        """GET /clusters: this one."""
        return list_of([self._cluster_body(self.cluster_of(request))], request)

    def _cluster_body(self, cluster: Cluster) -> Json:
        return {
            "id": f"{cluster.uuid}::{sum(cluster.uuid.encode()):d}",
            "uuid": cluster.uuid,
            "cluster_uuid": cluster.uuid,
            "name": cluster.name,
            "version": cluster.aos,
            "full_version": f"el8.5-release-{cluster.aos}-stable",
            "cluster_external_ipaddress": cluster.address,
            "cluster_external_data_services_ipaddress": cluster.data_services,
            "hypervisor_types": ["kKvm"],
            "num_nodes": len(cluster.cvms),
            "timezone": "UTC",
            "is_available": cluster.available,
            "operation_mode": "Normal",
        }

    async def hosts(self, request: Request) -> Reply:
        """GET /hosts: one for each CVM."""
        cluster = self.cluster_of(request)
        hosts = [
            {
                "uuid": host_uuid(cluster.uuid, cvm),
                "name": f"{cluster.name}-host-{number}",
                "cluster_uuid": cluster.uuid,
                "controller_vm_backplane_ip": cvm,
                "service_vmexternal_ip": cvm,
                "hypervisor_address": cvm,
                "hypervisor_type": "kKvm",
                "state": "NORMAL",
            }
            for number, cvm in enumerate(cluster.cvms, 1)
        ]
        return list_of(hosts, request)

    async def containers(self, request: Request) -> Reply:
        """GET /storage_containers."""
        here = [c for c in self._v3.world.containers.values() if c.cluster == request.cluster]
        return list_of([_container_body(container) for container in here], request)

    async def networks(self, request: Request) -> Reply:
        """GET /networks."""
        here = [s for s in self._v3.world.subnets.values() if s.cluster == request.cluster]
        bodies = [
            {
                "uuid": s.uuid,
                "name": s.name,
                "vlan_id": s.vlan,
                "vswitch_name": "br0",
                "ip_config": {},
            }
            for s in here
        ]
        return list_of(bodies, request)

    # VMs

    async def vms(self, request: Request) -> Reply:
        """GET /vms."""
        here = [vm for vm in self._v3.world.vms.values() if vm.cluster == request.cluster]
        return list_of([self._vm_body(request, vm) for vm in here], request)

    async def vm(self, request: Request, vm: str) -> Reply:
        """GET /vms/{uuid}; ``include_vm_disk_config`` adds the disks, and with them the names of their files."""
        return Reply(200, self._vm_body(request, self.find_vm(request, vm)))

    def _vm_body(self, request: Request, vm: Vm) -> Json:
        body: Json = {
            "uuid": vm.uuid,
            "name": vm.name,
            "description": vm.description,
            "power_state": {"ON": "on", "OFF": "off", "PAUSED": "suspended"}[vm.power],
            "num_vcpus": vm.sockets,
            "num_cores_per_vcpu": vm.cores,
            "memory_mb": vm.memory >> 20,
            "timezone": vm.v3.get("hardware_clock_timezone", "UTC"),
            "machine_type": vm.machine.lower(),
            "boot": {"uefi_boot": vm.boot.get("type", "LEGACY") != "LEGACY"},
            "host_uuid": None,
            "vm_logical_timestamp": max(vm.version, 1),
            "vm_features": {"VGA_CONSOLE": True},
        }
        if request.query.get("include_vm_disk_config") == "true":
            body["vm_disk_info"] = [self._disk_body(disk) for disk in vm.disks]
        if request.query.get("include_vm_nic_config") == "true":
            body["vm_nics"] = [
                {"mac_address": nic.mac, "network_uuid": nic.subnet, "is_connected": nic.connected}
                for nic in vm.nics
            ]
        return body

    def _disk_body(self, disk: Disk) -> Json:
        bus = disk.bus.lower()
        address: Json = {
            "device_bus": bus,
            "device_index": disk.index,
            "disk_label": f"{bus}.{disk.index}",
            "device_uuid": disk.uuid,
        }
        body: Json = {
            "disk_address": address,
            "is_cdrom": disk.cdrom,
            "is_empty": disk.backing is None,
        }
        if disk.volume_group is not None:
            address["volume_group_uuid"] = disk.volume_group
        if disk.backing is not None:
            address["vmdisk_uuid"] = disk.backing
            address["ndfs_filepath"] = live_path(self._v3.world, disk.backing, disk.container)
            body |= {"size": disk.size, "storage_container_uuid": disk.container}
        return body

    async def set_power(self, request: Request, vm: str) -> Reply:
        """POST /vms/{uuid}/set_power_state."""
        found = self.find_vm(request, vm)
        state, how = _TRANSITIONS[check(request.json(), _POWER)["transition"]]
        return accepted(self._v3.core.set_power(found.uuid, state, how, **self._v3.common(request)))

    async def attach_disks(self, request: Request, vm: str) -> Reply:
        """POST /vms/{uuid}/disks/attach: new disks, blank or cloned from a file, also while the VM runs."""
        found = self.find_vm(request, vm)
        common = self._v3.common(request)
        taken = {(disk.bus, disk.index) for disk in found.disks}
        parts = []
        for given in check(request.json(), _ATTACH)["vm_disks"]:
            disk, source = self._new_disk(given, taken)
            parts.append(partial(self._v3.core.add_disk, found.uuid, disk, source, **common))
        affected = AffectedEntity(kind="vm", uuid=found.uuid, name=found.name)
        return accepted(self._v3.together("VmDiskAttach", affected, parts, **common))

    def _new_disk(self, given: Json, taken: set[tuple[str, int]]) -> tuple[Disk, Any]:
        clone, create = given.get("vm_disk_clone"), given.get("vm_disk_create")
        if (clone is None) == (create is None):
            raise InvalidError("vm_disks: a disk is one of vm_disk_clone and vm_disk_create")
        asked = given.get("disk_address") or (clone or {}).get("disk_address") or {}
        bus = asked.get("device_bus", "scsi").lower()
        if bus not in _BUSES:
            raise InvalidError(f"vm_disks: device_bus {bus!r} is not one of {list(_BUSES)}")
        free = next(n for n in range(257) if (bus.upper(), n) not in taken)
        index = given.get("disk_address", {}).get("device_index", free)
        taken.add((bus.upper(), index))
        disk = Disk(uuid=str(uuid4()), backing=None, bus=bus.upper(), index=index)
        if create is not None:
            disk.container = create["storage_container_uuid"]
            return disk, self._v3.core.sources.blank(create["size"])
        assert clone is not None
        disk.container = clone.get("storage_container_uuid", "")
        disk.size = clone.get("minimum_size", 0)
        return disk, self.source(clone["disk_address"])

    def source(self, address: Json) -> Any:
        """Where the bytes of a clone come from: a file's path, or a disk's id. Raises HttpError 404."""
        core = self._v3.core
        if "ndfs_filepath" in address:
            return core.sources.path(address["ndfs_filepath"])
        if "vmdisk_uuid" in address:
            try:
                return core.sources.vm_disk(address["vmdisk_uuid"])
            except HttpError:
                return core.sources.group_disk(address["vmdisk_uuid"])
        raise InvalidError("disk_address: needs ndfs_filepath or vmdisk_uuid", "MISSING_ATTRIBUTE")

    async def detach_disks(self, request: Request, vm: str) -> Reply:
        """POST /vms/{uuid}/disks/detach: by the file's id, the device's, or by bus and index."""
        found = self.find_vm(request, vm)
        common = self._v3.common(request)
        parts = []
        for given in check(request.json(), _DETACH)["vm_disks"]:
            disk = _disk_at(found, given["disk_address"])
            parts.append(partial(self._v3.core.remove_disk, found.uuid, disk.uuid, **common))
        affected = AffectedEntity(kind="vm", uuid=found.uuid, name=found.name)
        return accepted(self._v3.together("VmDiskDetach", affected, parts, **common))

    async def virtual_disk(self, request: Request, disk: str) -> Reply:
        """GET /virtual_disks/{vmdisk uuid}."""
        for vm in self._v3.world.vms.values():
            for each in vm.disks:
                if each.backing == disk and vm.cluster == request.cluster:
                    return Reply(200, self._virtual_disk_body(vm, each))
        raise HttpError(404, f"virtual disk {disk} not found", "not_found")

    def _virtual_disk_body(self, vm: Vm, disk: Disk) -> Json:
        path = live_path(self._v3.world, disk.backing or "", disk.container)
        return {
            "uuid": disk.backing,
            "virtual_disk_id": disk.backing,
            "cluster_uuid": vm.cluster,
            "storage_container_uuid": disk.container,
            "attached_vm_uuid": vm.uuid,
            "attached_vmname": vm.name,
            "disk_address": f"{disk.bus.lower()}.{disk.index}",
            "disk_capacity_in_bytes": disk.size,
            "nutanix_nfsfile_path": path,
        }

    # Tasks

    async def task(self, request: Request, task: str) -> Reply:
        """GET /tasks/{uuid}."""
        return Reply(200, _task_body(self._task(request, task)))

    def _task(self, request: Request, uuid: str) -> Task:
        found = self._v3.world.tasks.get(uuid)
        hidden = self._v3.core.faults.take("task-not-found", f"{request.method} {request.path}")
        if found is None or hidden is not None:
            raise HttpError(404, f"Task with UUID {uuid} not found", "not_found")
        return found

    async def poll(self, request: Request) -> Reply:
        """POST /tasks/poll: the tasks that have ended, once any has or the time is over."""
        body = check(request.json(), _POLL)
        tasks = [self._task(request, uuid) for uuid in dict.fromkeys(body["completed_tasks"])]
        await any_ended(tasks, body.get("timeout_interval", 0))
        done = [task for task in tasks if task.completed_at is not None]
        answer = {
            "completed_tasks_info": [_task_body(task) for task in done],
            "timed_out": not done,
        }
        return Reply(200, answer)


def accepted(task: Task) -> Reply:
    """201: a write of v2.0 answers with its task."""
    return Reply(201, {"task_uuid": task.uuid})


def list_of(entities: Iterable[Json], request: Request) -> Reply:
    """The answer of a list. Raises HttpError 422 for a page that is none."""
    found = list(entities)
    offset, length = (_whole(request, "offset", 0), _whole(request, "length", len(found)))
    page = found[offset : offset + length]
    metadata = {
        "grand_total_entities": len(found),
        "total_entities": len(found),
        "count": len(page),
        "start_index": offset,
        "end_index": offset + len(page),
        "page": 1,
    }
    return Reply(200, {"metadata": metadata, "entities": page})


def _whole(request: Request, name: str, default: int) -> int:
    given = request.query.get(name, str(default))
    if not given.isascii() or not given.isdigit() or len(given) > 10:
        raise InvalidError(f"{name} is a number")
    return int(given)


def _disk_at(vm: Vm, address: Json) -> Disk:
    for disk in vm.disks:
        at = (address.get("device_bus", "").upper(), address.get("device_index"))
        if address.get("vmdisk_uuid", disk.backing) != disk.backing:
            continue
        if address.get("device_uuid", disk.uuid) != disk.uuid:
            continue
        if address.keys() & {"vmdisk_uuid", "device_uuid"} or at == (disk.bus, disk.index):
            return disk
    raise HttpError(404, f"VM {vm.uuid} has no such disk", "not_found")


def _container_body(container: Container) -> Json:
    return {
        "id": f"{container.cluster}::{container.uuid}",
        "storage_container_uuid": container.uuid,
        "name": container.name,
        "cluster_uuid": container.cluster,
        "max_capacity": container.capacity,
        "is_nutanix_managed": container.internal,
        "nfs_whitelist": [],
        "usage_stats": {
            "storage.capacity_bytes": str(container.capacity),
            "storage.free_bytes": str(container.capacity),
            "storage.usage_bytes": "0",
        },
    }


def _task_body(task: Task) -> Json:
    body: Json = {
        "uuid": task.uuid,
        "operation_type": operation_of(task),
        "progress_status": _PROGRESS[task.status],
        "percentage_complete": task.progress,
        "entity_list": [
            {
                "entity_id": each.uuid,
                "entity_type": each.kind.title().replace("_", ""),
                "entity_name": each.name,
            }
            for each in task.entities
        ],
        "create_time_usecs": int(task.created_at * 1e6),
        "last_updated_time_usecs": int((task.updated_at or time.time()) * 1e6),
    }
    if task.completed_at is not None:
        body["complete_time_usecs"] = int(task.completed_at * 1e6)
        error = task.error
        code = 0 if error is None and task.status == "SUCCEEDED" else 1
        detail = error.message if error is not None else ""
        body["meta_response"] = {"error_code": code, "error_detail": detail}
    return body
