# SPDX-License-Identifier: AGPL-3.0-or-later
"""A VM as v3 writes it down, and a VM made from what v3 was given. Knows nothing of requests.

What nothing here interprets (``_KEPT``) is kept as given and read back.
"""

from __future__ import annotations

from typing import Any
from uuid import NAMESPACE_URL, uuid4, uuid5

import msgspec

from replicator.simulator.core import DiskSource
from replicator.simulator.model import Disk, Nic, Vm
from replicator.simulator.v3.checks import InvalidError
from replicator.simulator.v3.envelope import V3, Json
from replicator.simulator.web import HttpError

MIB = 1 << 20
_KEPT = (
    "hardware_clock_timezone", "guest_os_id", "vtpm_config", "gpu_list", "serial_port_list", "vnuma_config", "apc_config",
    "is_agent_vm", "vga_console_enabled", "disable_branding", "enable_cpu_passthrough", "gpu_console_enabled",
    "hardware_virtualization_enabled", "is_vcpu_hard_pinned", "memory_overcommit_enabled", "cpu_hotplug_enabled",
    "scsi_controller_enabled", "power_state_mechanism", "parent_reference", "storage_config",
)  # fmt: skip
_USUAL: Json = {
    "hardware_clock_timezone": "UTC",
    "vtpm_config": {"vtpm_enabled": False},
    "gpu_list": [],
    "serial_port_list": [],
    "vnuma_config": {"num_vnuma_nodes": 0},
    "apc_config": {"enabled": False},
    "is_agent_vm": False,
    "vga_console_enabled": True,
    "disable_branding": False,
    "enable_cpu_passthrough": False,
    "gpu_console_enabled": False,
    "hardware_virtualization_enabled": False,
    "is_vcpu_hard_pinned": False,
    "memory_overcommit_enabled": False,
    "cpu_hotplug_enabled": True,
    "scsi_controller_enabled": True,
    "power_state_mechanism": {
        "mechanism": "HARD",
        "guest_transition_config": {
            "enable_script_exec": False,
            "should_fail_on_script_failure": False,
        },
    },
}
_SPEC_ONLY = frozenset({"parent_reference"})
_BOOT_ORDER = ["CDROM", "DISK", "NETWORK"]

NewDisk = tuple[Disk, DiskSource | None]


def spec_body(v3: V3, vm: Vm) -> Json:
    """``spec`` of a VM: what a client may change and put back."""
    return {
        "name": vm.name,
        "description": vm.description,
        "cluster_reference": v3.cluster_reference(vm.cluster),
        "resources": {**_resources(v3, vm), "power_state": "OFF" if vm.power == "OFF" else "ON"},
    }


def status_body(v3: V3, vm: Vm) -> Json:
    """``status`` of a VM."""
    resources = {
        name: value for name, value in _resources(v3, vm).items() if name not in _SPEC_ONLY
    }
    for disk in resources["disk_list"]:
        disk["is_migration_in_progress"] = False
    resources |= {
        "power_state": vm.power,
        "hypervisor_type": "AHV",
        "protection_type": "UNPROTECTED",
        "generation_uuid": str(uuid5(NAMESPACE_URL, f"generation:{vm.uuid}")),
        "bios_uuid": vm.uuid,
        "vtpm_config": {"vtpm_enabled": False, "version": "", **vm.v3.get("vtpm_config", {})},
    }
    if vm.tools:
        resources["guest_tools"] = {"nutanix_guest_tools": _tools(vm)}
    return {
        "name": vm.name,
        "description": vm.description,
        "state": v3.state("vm", vm.uuid),
        "cluster_reference": v3.cluster_reference(vm.cluster),
        "resources": resources,
        **v3.execution_context(vm.uuid),
    }


def _tools(vm: Vm) -> Json:
    return {
        "ngt_state": "INSTALLED",
        "state": "ENABLED",
        "is_reachable": vm.power == "ON",
        "vss_snapshot_capable": True,
        "version": "4.1",
        "available_version": "4.1",
        "enabled_capability_list": ["VSS_SNAPSHOT"],
        "iso_mount_state": "UNMOUNTED",
        "guest_os_version": "linux:64:Linux",
    }


def _resources(v3: V3, vm: Vm) -> Json:
    found = {name: vm.v3.get(name, _USUAL.get(name)) for name in _KEPT}
    return {
        "num_sockets": vm.sockets,
        "num_vcpus_per_socket": vm.cores,
        "num_threads_per_core": vm.threads,
        "memory_size_mib": vm.memory // MIB,
        "machine_type": vm.machine,
        "boot_config": {
            "boot_type": vm.boot.get("type", "LEGACY"),
            "boot_device_order_list": vm.v3.get("boot_device_order_list", _BOOT_ORDER),
        },
        "disk_list": [disk_body(v3, disk) for disk in vm.disks],
        "nic_list": [_nic_body(v3, nic) for nic in vm.nics],
        **{name: value for name, value in found.items() if value is not None},
    }


def disk_body(v3: V3, disk: Disk) -> Json:
    """A disk of a VM, in spec and status alike."""
    kind = "CDROM" if disk.cdrom else "VOLUME_GROUP" if disk.volume_group is not None else "DISK"
    body: Json = {
        "uuid": disk.uuid,
        "device_properties": {
            "device_type": kind,
            "disk_address": {"adapter_type": disk.bus, "device_index": disk.index},
        },
    }
    if disk.size:
        body |= {"disk_size_bytes": disk.size, "disk_size_mib": -(-disk.size // MIB)}
    container = v3.world.containers.get(disk.container)
    if container is not None:
        reference = {"kind": "storage_container", "uuid": container.uuid, "name": container.name}
        body["storage_config"] = {
            "flash_mode": "DISABLED",
            "storage_container_reference": reference,
        }
    given = disk.source.get("v3")
    if isinstance(given, dict):
        body["data_source_reference"] = given
    if disk.volume_group is not None:
        body["volume_group_reference"] = {"kind": "volume_group", "uuid": disk.volume_group}
    return body


def _nic_body(v3: V3, nic: Nic) -> Json:
    subnet = v3.world.subnets.get(nic.subnet)
    body: Json = {
        "uuid": nic.uuid,
        "nic_type": "NORMAL_NIC",
        "vlan_mode": "ACCESS",
        "trunked_vlan_list": [],
        "is_connected": nic.connected,
        "num_queues": 1,
        "ip_endpoint_list": [],
        **nic.v3,
        "subnet_reference": {
            "kind": "subnet",
            "uuid": nic.subnet,
            "name": subnet.name if subnet is not None else "",
        },
    }
    return body | ({"mac_address": nic.mac} if nic.mac else {})


def vm_from(v3: V3, uuid: str, body: Json, cluster: str) -> tuple[Vm, list[NewDisk]]:
    """A new VM and its disks from the body of a POST. Raises HttpError 404 and 422 for references that are none."""
    spec = body["spec"]
    vm = Vm(uuid=uuid, cluster=cluster)
    apply(vm, body)
    vm.nics = [nic_from(v3, nic, set()) for nic in spec["resources"].get("nic_list", [])]
    taken: set[tuple[str, int]] = set()
    disks = []
    for given in spec["resources"].get("disk_list", []):
        if "uuid" in given:
            raise InvalidError("disk_list: a new disk has no 'uuid'")
        disks.append(disk_from(v3, given, taken))
    return vm, disks


def apply(vm: Vm, body: Json) -> None:
    """Take over everything of a spec but power, disks and NICs; what it leaves out stays."""
    spec = body["spec"]
    resources = spec["resources"]
    vm.name = spec["name"]
    vm.description = spec.get("description", vm.description)
    vm.sockets = resources.get("num_sockets", vm.sockets)
    vm.cores = resources.get("num_vcpus_per_socket", vm.cores)
    vm.threads = resources.get("num_threads_per_core", vm.threads)
    vm.memory = resources.get("memory_size_mib", vm.memory // MIB) * MIB
    vm.machine = resources.get("machine_type", vm.machine)
    vm.categories = dict(body["metadata"].get("categories", vm.categories))
    kept = {name: resources[name] for name in _KEPT if name in resources}
    boot = resources.get("boot_config", {})
    if "boot_type" in boot:
        vm.boot = {"type": boot["boot_type"]}
    if "boot_device_order_list" in boot:
        kept["boot_device_order_list"] = boot["boot_device_order_list"]
    vm.v3 = {**vm.v3, **kept}


def disk_from(v3: V3, given: Json, taken: set[tuple[str, int]]) -> NewDisk:
    """A new disk and where its bytes come from; it gets the next free address of its bus where none is said."""
    properties = given.get("device_properties", {})
    kind = properties.get("device_type", "DISK")
    if kind == "VOLUME_GROUP":
        raise InvalidError(
            "disk_list: volume groups are attached through the volume group",
            "REQUEST_NOT_SUPPORTED",
        )
    address = properties.get("disk_address")
    bus = address["adapter_type"] if address else ("IDE" if kind == "CDROM" else "SCSI")
    index = (
        address["device_index"] if address else next(n for n in range(257) if (bus, n) not in taken)
    )
    if (bus, index) in taken:
        raise InvalidError(f"disk_list: the address {bus}.{index} is taken")
    taken.add((bus, index))
    size = given.get("disk_size_bytes", given.get("disk_size_mib", 0) * MIB)
    disk = Disk(
        uuid=str(uuid4()), backing=None, bus=bus, index=index, size=size, cdrom=kind == "CDROM"
    )
    container = given.get("storage_config", {}).get("storage_container_reference", {}).get("uuid")
    if container is not None:
        if container not in v3.world.containers:
            raise HttpError(404, f"the storage_container {container} was not found", "not_found")
        disk.container = container
    reference = given.get("data_source_reference")
    if reference is not None:
        disk.source = {"v3": reference}
        return disk, source_of(v3, reference)
    if disk.cdrom:
        return disk, None
    if not size:
        raise InvalidError(
            "disk_list: a disk needs a size or a data_source_reference", "MISSING_ATTRIBUTE"
        )
    return disk, v3.core.sources.blank(size)


def source_of(v3: V3, reference: Json) -> DiskSource:
    """What a data_source_reference names: an image, a VM's disk, a volume group's disk, or a file by its URL."""
    kind, uuid, url = reference.get("kind"), reference.get("uuid"), reference.get("url")
    if url is not None:
        return v3.core.sources.path(path_of_url(v3, url))
    if uuid is None:
        raise InvalidError(
            "data_source_reference: 'uuid' is a required property", "MISSING_ATTRIBUTE"
        )
    if kind == "image":
        return v3.core.sources.image(uuid)
    if kind == "vm_disk":
        try:
            return v3.core.sources.vm_disk(uuid)
        except HttpError:
            return v3.core.sources.group_disk(uuid)
    raise InvalidError(f"data_source_reference: kind {kind!r} is not one of ['image', 'vm_disk']")


def path_of_url(v3: V3, url: str) -> str:
    """The path in nfs://HOST/PATH, where HOST is an Element or a CVM of a cluster here, or 127.0.0.1. Raises InvalidError."""
    scheme, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    if not mark or scheme != "nfs" or not slash:
        raise InvalidError(f"{url!r} is no nfs:// URL with a path")
    known = {"127.0.0.1"}
    for cluster in v3.world.clusters.values():
        known |= {cluster.address, *cluster.cvms}
    if host not in known:
        raise InvalidError(f"{url!r}: {host} exports no storage container")
    return f"/{path}"


def nic_from(v3: V3, given: Json, known: set[str]) -> Nic:
    """A NIC. Raises InvalidError for an id that the VM does not have: a leftover of another one."""
    uuid = given.get("uuid")
    if uuid is not None and uuid not in known:
        raise InvalidError(f"nic_list: the NIC {uuid} does not exist")
    subnet = given.get("subnet_reference", {}).get("uuid")
    if subnet is None:
        raise InvalidError(
            "nic_list: 'subnet_reference' is a required property", "MISSING_ATTRIBUTE"
        )
    if subnet not in v3.world.subnets:
        raise HttpError(404, f"the subnet {subnet} was not found", "not_found")
    mac = given.get("mac_address", "")
    for vm in v3.world.vms.values():
        for nic in vm.nics:
            if mac and nic.mac.lower() == mac.lower() and nic.uuid != uuid:
                raise InvalidError(f"nic_list: the MAC address {mac} is in use by {vm.name}")
    shown = ("nic_type", "vlan_mode", "ip_endpoint_list", "num_queues", "trunked_vlan_list")
    return Nic(
        uuid=uuid or str(uuid4()),
        subnet=subnet,
        mac=mac,
        connected=given.get("is_connected", True),
        model=given.get("model", "VIRTIO"),
        v3={name: given[name] for name in shown if name in given},
    )


def copy_of(vm: Vm) -> Vm:
    """A VM to change before the world has it."""
    found: Vm = msgspec.structs.replace(vm)
    return found


def describe(vm: Vm) -> dict[str, Any]:
    """What VMs can be filtered by."""
    return {
        "uuid": vm.uuid,
        "name": vm.name,
        "vm_name": vm.name,
        "power_state": vm.power,
        "cluster": vm.cluster,
        "num_sockets": vm.sockets,
        "memory_size_mib": vm.memory // MIB,
    }


ATTRIBUTES = frozenset(describe(Vm(uuid="", cluster="")))
