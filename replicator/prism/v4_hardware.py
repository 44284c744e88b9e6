# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a VM is made of, from v4's description of it, and the lists that turn ids into names."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final

from replicator.hardware import Firmware, Hardware, Nic
from replicator.prism.answers import Node
from replicator.prism.devices import disk_slots
from replicator.prism.errors import PrismNotFoundError, PrismPermissionError
from replicator.prism.types import Container, Subnet, Vm
from replicator.prism.v4_calls import V4Calls
from replicator.prism.v4_read import read_cluster

_MIB: Final = 1 << 20
#: From an id to a name; empty where there is none.
Name = Callable[[str], str]


def read_hardware(vm: Vm, where: str, *, cluster: Name, subnet: Name, container: Name) -> Hardware:
    """From a VM that v4 has described. ``where``: who did, for errors."""
    node = Node(vm.config, f"{where}: VM {vm.name}")
    boot = node.maybe("bootConfig")
    uefi = boot is not None and boot.text("$objectType", "").endswith(".UefiBoot")
    return Hardware(
        platform="nutanix",
        uuid=vm.uuid,
        name=vm.name,
        cluster=vm.cluster,
        cluster_name=cluster(vm.cluster),
        description=node.text("description", ""),
        sockets=node.number("numSockets", 1, low=1),
        cores_per_socket=node.number("numCoresPerSocket", 1, low=1),
        threads_per_core=node.number("numThreadsPerCore", 1, low=1),
        memory_mib=max(1, node.number("memorySizeBytes", 1 << 30, low=1) // _MIB),
        firmware=Firmware.UEFI if uefi else Firmware.BIOS,
        secure_boot=uefi and boot is not None and boot.flag("isSecureBootEnabled", default=False),
        machine_type=node.text("machineType", ""),
        timezone=node.text("hardwareClockTimezone", ""),
        cdroms=len(node.nodes("cdRoms")),
        nics=tuple(_nic(item, subnet) for item in node.nodes("nics")),
        disks=disk_slots(vm, container),
    )


def _nic(node: Node, name: Name) -> Nic:
    """Of 4.1 and later, or in the form before."""
    card = node.maybe("nicBackingInfo") or node.maybe("backingInfo")
    subnet = subnet_of(node)
    return Nic(
        subnet=subnet,
        subnet_name=name(subnet) if subnet else "",
        mac=mac_of(node),
        model="" if card is None else card.text("model", ""),
        connected=card is None or card.flag("isConnected", default=True),
    )


def mac_of(node: Node) -> str:
    """A NIC's MAC address, in lower case; empty without one."""
    card = node.maybe("nicBackingInfo") or node.maybe("backingInfo")
    return "" if card is None else card.text("macAddress", "").lower()


def subnet_of(node: Node) -> str:
    """The id of the subnet that a NIC is in; empty without one."""
    network = node.maybe("nicNetworkInfo") or node.maybe("networkInfo")
    reference = None if network is None else network.maybe("subnet")
    return "" if reference is None else reference.text("extId", "")


class Names:
    """Clusters, subnets and containers of one Prism Central, by id: a list is asked for once, and again for an id that is new."""

    def __init__(self, calls: V4Calls) -> None:
        self._calls = calls
        self._names: dict[str, dict[str, str]] = {}

    async def hardware(self, vm: Vm) -> Hardware:
        """As ``Prism.hardware``, of a VM that was described."""
        node = Node(vm.config, f"{self._calls.central.where}: VM {vm.name}")
        subnets = {subnet_of(item) for item in node.nodes("nics")} - {""}
        containers = {disk.container for disk in vm.disks if disk.container}
        clusters = await self._known("clusters", {vm.cluster})
        return read_hardware(
            vm,
            self._calls.central.where,
            cluster=_naming(clusters),
            subnet=_naming(await self._known("subnets", subnets)),
            container=_naming(await self._known("containers", containers)),
        )

    async def _known(self, what: str, wanted: set[str]) -> dict[str, str]:
        names = self._names.setdefault(what, {})
        if not wanted <= names.keys():
            # What may not be seen stays without a name: a backup does not need it.
            with suppress(PrismPermissionError, PrismNotFoundError):
                names.update(await self._list(what))
            for uuid in wanted:
                names.setdefault(uuid, "")
        return names

    async def _list(self, what: str) -> dict[str, str]:
        if what == "subnets":
            return {each.uuid: each.name for each in await self.subnets()}
        if what == "containers":
            return {each.uuid: each.name for each in await self.containers()}
        nodes = await self._calls.listed("clustermgmt", "config/clusters")
        found = (read_cluster(node) for node in nodes)
        return {each.uuid: each.name for each in found if each is not None}

    async def subnets(self) -> list[Subnet]:
        """All of them, as they are now."""
        return [
            read_subnet(node) for node in await self._calls.listed("networking", "config/subnets")
        ]

    async def containers(self) -> list[Container]:
        """All of them, as they are now."""
        nodes = await self._calls.listed("clustermgmt", "config/storage-containers")
        return [read_container(node) for node in nodes]


def read_subnet(node: Node) -> Subnet:
    """A subnet of a list; one of a VPC is on no cluster of its own."""
    clusters = node.texts("clusterReferenceList")
    one = node.text("clusterReference", "")
    return Subnet(
        uuid=node.uuid("extId"),
        name=node.text("name", ""),
        clusters=tuple(dict.fromkeys([*clusters, *([one] if one else [])])),
        vlan=node.number("networkId") if node.has("networkId") else None,
    )


def read_container(node: Node) -> Container:
    """A storage container of a list. What refers to it takes ``containerExtId`` where that is there (nutanix-v4.md, 8)."""
    return Container(
        uuid=node.text("containerExtId", "") or node.uuid("extId"),
        name=node.text("name", ""),
        cluster=node.text("clusterExtId", ""),
        internal=node.flag("isInternal", default=False)
        or node.flag("isMarkedForRemoval", default=False),
    )


def _naming(names: dict[str, str]) -> Name:
    return lambda uuid: names.get(uuid, "")


__all__ = ["Names", "mac_of", "read_container", "read_hardware", "read_subnet", "subnet_of"]
