# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a VM is made of, from v3's description of it. v3 gives the names of subnets and containers with their ids. No I/O."""

from __future__ import annotations

from replicator.hardware import DiskSlot, Firmware, Hardware, Nic
from replicator.prism.answers import Node
from replicator.prism.devices import disk_slots
from replicator.prism.types import Vm
from replicator.prism.v3_read import reference_uuid


def read_hardware(vm: Vm, where: str) -> Hardware:
    """From a VM that v3 has described. ``where``: who did, for errors."""
    status = Node(vm.config.get("status"), f"{where}: VM {vm.name}")
    resources = status.node("resources")
    boot = resources.maybe("boot_config")
    kind = boot.text("boot_type", "LEGACY") if boot is not None else "LEGACY"
    drives = [item.node("device_properties") for item in resources.nodes("disk_list")]
    return Hardware(
        platform="nutanix",
        uuid=vm.uuid,
        name=vm.name,
        cluster=vm.cluster,
        cluster_name=_name(status, "cluster_reference"),
        description=status.text("description", ""),
        sockets=resources.number("num_sockets", 1, low=1),
        cores_per_socket=resources.number("num_vcpus_per_socket", 1, low=1),
        threads_per_core=resources.number("num_threads_per_core", 1, low=1),
        memory_mib=resources.number("memory_size_mib", 1024, low=1),
        firmware=Firmware.BIOS if kind == "LEGACY" else Firmware.UEFI,
        secure_boot=kind == "SECURE_BOOT",
        machine_type=resources.text("machine_type", ""),
        timezone=resources.text("hardware_clock_timezone", ""),
        cdroms=sum(drive.text("device_type", "DISK") == "CDROM" for drive in drives),
        nics=tuple(_nic(item) for item in resources.nodes("nic_list")),
        disks=_slots(vm, resources),
    )


def _nic(node: Node) -> Nic:
    return Nic(
        subnet=reference_uuid(node, "subnet_reference"),
        subnet_name=_name(node, "subnet_reference"),
        mac=node.text("mac_address", "").lower(),
        model=node.text("model", ""),
        connected=node.flag("is_connected", default=True),
    )


def _slots(vm: Vm, resources: Node) -> tuple[DiskSlot, ...]:
    names: dict[str, str] = {}
    for item in resources.nodes("disk_list"):
        storage = item.maybe("storage_config")
        if storage is not None:
            container = reference_uuid(storage, "storage_container_reference")
            names[container] = _name(storage, "storage_container_reference")
    return disk_slots(vm, lambda container: names.get(container, ""))


def _name(node: Node, reference: str) -> str:
    found = node.maybe(reference)
    return "" if found is None else found.text("name", "")


__all__ = ["read_hardware"]
