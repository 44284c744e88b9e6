# SPDX-License-Identifier: AGPL-3.0-or-later
"""A VM made of images by v3, and what there is to make it with: subnets and storage containers (nutanix-data-path.md, B3, B4)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any, Final

from replicator.hardware import Firmware, Nic
from replicator.prism.answers import Node
from replicator.prism.devices import drive_places, machine_of
from replicator.prism.endpoint import segment
from replicator.prism.errors import (
    PrismAuthError,
    PrismNotFoundError,
    PrismPermissionError,
    PrismRefusedError,
    PrismUnreachableError,
)
from replicator.prism.settings import Waits
from replicator.prism.types import Container, NewDisk, NewVm, Subnet
from replicator.prism.v3_calls import V3Host
from replicator.prism.v3_read import reference_uuid

_PAGE: Final = 100
_PAGES_MAX: Final = 1000
#: The containers that a cluster keeps for itself: v2.0 does not say it of them in every version.
_INTERNAL: Final = frozenset({"NutanixManagementShare", "NutanixMetadataContainer"})
#: Why an Element may not tell its containers, though Prism Central can.
_NOT_THERE: Final = (
    PrismAuthError,
    PrismNotFoundError,
    PrismPermissionError,
    PrismRefusedError,
    PrismUnreachableError,
)


class Restoring:
    """The part of PrismV3 that makes VMs. ``element``: the Element of a cluster."""

    def __init__(
        self, central: V3Host, element: Callable[[str], Awaitable[V3Host]], waits: Waits
    ) -> None:
        self._central = central
        self._element = element
        self._waits = waits

    async def subnets(self, cluster: str) -> list[Subnet]:
        """As ``RestorePrism.subnets``."""
        async with aclosing(self._central.pages("subnets", "subnet")) as items:
            found = [_read_subnet(item) async for item in items]
        return [each for each in found if not each.clusters or cluster in each.clusters]

    async def containers(self, cluster: str) -> list[Container]:
        """As ``RestorePrism.containers``: from the Element; where the account is not let in there, from Prism Central."""
        try:
            element = await self._element(cluster)
            nodes = (await element.get_v2("storage_containers")).nodes("entities")
        except _NOT_THERE:
            found = await self._grouped_containers()
        else:
            found = [_read_container(node, cluster) for node in nodes]
        return [each for each in found if each.cluster == cluster]

    async def _grouped_containers(self) -> list[Container]:
        names = ("container_name", "cluster", "is_internal")
        body: dict[str, Any] = {
            "entity_type": "storage_container",
            "group_member_attributes": [{"attribute": name} for name in names],
            "group_member_count": _PAGE,
        }
        found: list[Container] = []
        for page in range(_PAGES_MAX):
            body["group_member_offset"] = page * _PAGE
            root = (await self._central.call("POST", "groups", body)).node()
            rows = [
                row
                for group in root.nodes("group_results")
                for row in group.nodes("entity_results")
            ]
            found += [_read_grouped(row) for row in rows]
            if len(rows) < _PAGE:
                break
        return found

    async def macs(self) -> frozenset[str]:
        """As ``RestorePrism.macs``."""
        async with aclosing(self._central.pages("vms", "vm")) as items:
            return frozenset(
                [
                    nic.text("mac_address", "").lower()
                    async for item in items
                    for nic in item.node("status").node("resources").nodes("nic_list")
                ]
            ) - {""}

    async def create(self, new: NewVm) -> str:
        """As ``RestorePrism.create_vm``: the name stands for the request."""
        node = await self._central.create(
            "vms",
            "vm",
            _spec(new),
            what="create a VM",
            timeout_s=self._waits.image_s,
            wanted=f"vm_name=={new.name}",
        )
        return node.node("metadata").uuid("uuid")

    async def rename(self, uuid: str, name: str) -> None:
        """As ``RestorePrism.rename_vm``."""

        def edit(spec: dict[str, Any], node: Node) -> bool:
            del node
            if spec.get("name") == name:
                return False
            spec["name"] = name
            return True

        await self._change(uuid, edit, "rename a VM")

    async def power_on(self, uuid: str) -> None:
        """As ``RestorePrism.power_on``."""

        def edit(spec: dict[str, Any], node: Node) -> bool:
            if node.node("status").node("resources").text("power_state", "") == "ON":
                return False
            spec["resources"] = {**spec["resources"], "power_state": "ON"}
            return True

        await self._change(uuid, edit, "power a VM on")

    async def _change(
        self, uuid: str, edit: Callable[[dict[str, Any], Node], bool], what: str
    ) -> None:
        path = f"vms/{segment(uuid)}"
        await self._central.change(path, edit, what=what, timeout_s=self._waits.delete_s)

    async def delete(self, uuid: str) -> None:
        """As ``RestorePrism.delete_vm``."""
        with suppress(PrismNotFoundError):
            await self._central.delete(f"vms/{segment(uuid)}", "delete a VM")


def _read_subnet(node: Node) -> Subnet:
    status = node.node("status")
    resources = status.node("resources")
    cluster = reference_uuid(status, "cluster_reference")
    return Subnet(
        uuid=node.node("metadata").uuid("uuid"),
        name=status.text("name", ""),
        clusters=(cluster,) if cluster else (),
        vlan=resources.number("vlan_id") if resources.has("vlan_id") else None,
    )


def _read_container(node: Node, cluster: str) -> Container:
    """Of v2.0; the Element is that of ``cluster``."""
    name = node.text("name", "")
    return Container(
        uuid=node.uuid("storage_container_uuid"),
        name=name,
        cluster=node.text("cluster_uuid", "") or cluster,
        internal=name in _INTERNAL
        or node.flag("is_nutanix_managed", default=False)
        or node.flag("marked_for_removal", default=False),
    )


def _read_grouped(row: Node) -> Container:
    values: dict[str, str] = {}
    for item in row.nodes("data"):
        for held in item.nodes("values")[:1]:
            values[item.text("name", "")] = next(iter(held.texts("values")), "")
    name = values.get("container_name", "")
    return Container(
        uuid=row.uuid("entity_id"),
        name=name,
        cluster=values.get("cluster", ""),
        internal=name in _INTERNAL or values.get("is_internal", "").lower() in {"1", "true"},
    )


def _spec(new: NewVm) -> dict[str, Any]:
    """nutanix-v3.md, 6: what is not known is left to Prism."""
    hardware = new.hardware
    boot = "LEGACY"
    if hardware.firmware is Firmware.UEFI:
        boot = "SECURE_BOOT" if hardware.secure_boot else "UEFI"
    resources: dict[str, Any] = {
        "num_sockets": hardware.sockets,
        "num_vcpus_per_socket": hardware.cores_per_socket,
        "num_threads_per_core": hardware.threads_per_core,
        "memory_size_mib": hardware.memory_mib,
        "boot_config": {"boot_type": boot},
        "power_state": "OFF",
        "disk_list": [
            *map(_disk, new.disks),
            *(_drive(bus, index) for bus, index in drive_places(new)),
        ],
        "nic_list": [_nic(nic) for nic in hardware.nics],
    }
    machine = machine_of(hardware)
    if machine:
        resources["machine_type"] = machine
    if hardware.timezone:
        resources["hardware_clock_timezone"] = hardware.timezone
    return {
        "name": new.name,
        "description": new.description,
        "cluster_reference": {"kind": "cluster", "uuid": new.cluster},
        "resources": resources,
    }


def _disk(disk: NewDisk) -> dict[str, Any]:
    return {
        "data_source_reference": {"kind": "image", "uuid": disk.image},
        "device_properties": {
            "device_type": "DISK",
            "disk_address": {"adapter_type": disk.bus, "device_index": disk.index},
        },
        "storage_config": {
            "storage_container_reference": {"kind": "storage_container", "uuid": disk.container}
        },
    }


def _drive(bus: str, index: int) -> dict[str, Any]:
    return {
        "device_properties": {
            "device_type": "CDROM",
            "disk_address": {"adapter_type": bus, "device_index": index},
        }
    }


def _nic(nic: Nic) -> dict[str, Any]:
    body: dict[str, Any] = {
        "nic_type": "NORMAL_NIC",
        "vlan_mode": "ACCESS",
        "is_connected": nic.connected,
        "subnet_reference": {"kind": "subnet", "uuid": nic.subnet},
    }
    if nic.mac:
        body["mac_address"] = nic.mac
    if nic.model:
        body["model"] = nic.model
    return body


__all__ = ["Restoring"]
