# SPDX-License-Identifier: AGPL-3.0-or-later
"""A VM made of images by v4 (nutanix-data-path.md, A3 mode R3 and A4). The images get their bytes through v3: v4 has no upload."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final
from uuid import UUID

import trio

from replicator.hardware import Firmware, Nic
from replicator.prism.answers import Node
from replicator.prism.devices import drive_places, machine_of
from replicator.prism.endpoint import segment
from replicator.prism.errors import (
    PrismAnswerError,
    PrismConflictError,
    PrismNotFoundError,
    PrismTaskError,
)
from replicator.prism.types import Container, NewDisk, NewVm, Subnet
from replicator.prism.v4_calls import STALE_WORDS, V4Calls
from replicator.prism.v4_hardware import Names, mac_of
from replicator.prism.v4_read import typed

_VMS: Final = "ahv/config/vms"
_VM_REL: Final = "vmm:ahv:config:vm"
_AHV: Final = "vmm.v4.ahv.config."
_CONFLICTS_MAX: Final = 10


class Restoring:
    """The part of PrismV4 that makes VMs."""

    def __init__(self, calls: V4Calls, names: Names) -> None:
        self._calls = calls
        self._names = names

    async def subnets(self, cluster: str) -> list[Subnet]:
        """As ``RestorePrism.subnets``."""
        found = await self._names.subnets()
        return [each for each in found if not each.clusters or cluster in each.clusters]

    async def containers(self, cluster: str) -> list[Container]:
        """As ``RestorePrism.containers``."""
        return [each for each in await self._names.containers() if each.cluster == cluster]

    async def macs(self) -> frozenset[str]:
        """As ``RestorePrism.macs``."""
        vms = await self._calls.listed("vmm", _VMS)
        return frozenset(mac_of(nic) for vm in vms for nic in vm.nodes("nics")) - {""}

    async def create(self, new: NewVm, request_id: UUID) -> str:
        """As ``RestorePrism.create_vm``."""
        minor = await self._calls.versions.minor("vmm")
        state = await self._calls.submit(
            "vmm",
            "POST",
            _VMS,
            _body(new, old_nics=minor == 0),
            what="create a VM",
            timeout_s=self._calls.waits.image_s,
            request_id=request_id,
        )
        uuid = state.entity(_VM_REL)
        if uuid is None:
            raise PrismAnswerError(
                f"{self._calls.central.where}: task {state.uuid} made a VM, but does not say which"
            )
        return uuid

    async def rename(self, uuid: str, name: str) -> None:
        """As ``RestorePrism.rename_vm``. v4 takes the object whole, so it is read again where it was changed meanwhile."""
        path = f"{_VMS}/{segment(uuid)}"
        what = "rename a VM"
        for _ in range(_CONFLICTS_MAX):
            node, etag = await self._calls.get_tagged("vmm", path)
            if node.text("name", "") == name:
                return
            body = {**node.raw, "name": name}
            try:
                await self._calls.submit(
                    "vmm",
                    "PUT",
                    path,
                    body,
                    what=what,
                    timeout_s=self._calls.waits.delete_s,
                    etag=etag,
                )
            except PrismConflictError:
                pass
            except PrismTaskError as error:
                if STALE_WORDS.isdisjoint(error.words):
                    raise
            else:
                return
            await trio.sleep(self._calls.waits.conflict_s)
        raise PrismConflictError(
            f"{self._calls.central.where}: {what}: it was changed meanwhile, {_CONFLICTS_MAX} times in a row"
        )

    async def power_on(self, uuid: str) -> None:
        """As ``RestorePrism.power_on``."""
        path = f"{_VMS}/{segment(uuid)}"
        node: Node = await self._calls.get("vmm", path)
        if node.text("powerState", "") == "ON":
            return
        await self._calls.change(
            "vmm",
            "POST",
            f"{path}/$actions/power-on",
            of=path,
            what="power a VM on",
            timeout_s=self._calls.waits.delete_s,
        )

    async def delete(self, uuid: str) -> None:
        """As ``RestorePrism.delete_vm``."""
        with suppress(PrismNotFoundError):
            await self._calls.change(
                "vmm",
                "DELETE",
                f"{_VMS}/{segment(uuid)}",
                what="delete a VM",
                timeout_s=self._calls.waits.delete_s,
            )


def _ahv(kind: str, **fields: Any) -> dict[str, Any]:
    return typed(_AHV + kind, **fields)


def _body(new: NewVm, *, old_nics: bool) -> dict[str, Any]:
    hardware = new.hardware
    body = _ahv(
        "Vm",
        name=new.name,
        description=new.description,
        cluster=_ahv("ClusterReference", extId=new.cluster),
        numSockets=hardware.sockets,
        numCoresPerSocket=hardware.cores_per_socket,
        numThreadsPerCore=hardware.threads_per_core,
        memorySizeBytes=hardware.memory_mib << 20,
        bootConfig=(
            _ahv("UefiBoot", isSecureBootEnabled=hardware.secure_boot)
            if hardware.firmware is Firmware.UEFI
            else _ahv("LegacyBoot")
        ),
        disks=[_disk(disk) for disk in new.disks],
        cdRoms=[
            _ahv("CdRom", diskAddress=_ahv("CdRomAddress", busType=bus, index=index))
            for bus, index in drive_places(new)
        ],
        nics=[(_old_nic if old_nics else _nic)(nic) for nic in hardware.nics],
    )
    machine = machine_of(hardware)
    if machine:
        body["machineType"] = machine
    if hardware.timezone:
        body["hardwareClockTimezone"] = hardware.timezone
    return body


def _disk(disk: NewDisk) -> dict[str, Any]:
    image = _ahv("ImageReference", imageExtId=disk.image)
    backing = _ahv(
        "VmDisk",
        dataSource=_ahv("DataSource", reference=image),
        storageContainer=_ahv("VmDiskContainerReference", extId=disk.container),
    )
    address = _ahv("DiskAddress", busType=disk.bus, index=disk.index)
    return _ahv("Disk", diskAddress=address, backingInfo=backing)


def _card(nic: Nic) -> dict[str, Any]:
    card: dict[str, Any] = {"isConnected": nic.connected}
    if nic.model in {"VIRTIO", "E1000"}:
        card["model"] = nic.model
    if nic.mac:
        card["macAddress"] = nic.mac
    return card


def _network(nic: Nic) -> dict[str, Any]:
    subnet = _ahv("SubnetReference", extId=nic.subnet)
    return {"nicType": "NORMAL_NIC", "vlanMode": "ACCESS", "subnet": subnet}


def _nic(nic: Nic) -> dict[str, Any]:
    """As from 4.1 on."""
    return _ahv(
        "Nic",
        nicBackingInfo=_ahv("VirtualEthernetNic", **_card(nic)),
        nicNetworkInfo=_ahv("VirtualEthernetNicNetworkInfo", **_network(nic)),
    )


def _old_nic(nic: Nic) -> dict[str, Any]:
    """As 4.0 has it."""
    return _ahv(
        "Nic",
        backingInfo=_ahv("EmulatedNic", **_card(nic)),
        networkInfo=_ahv("NicNetworkInfo", **_network(nic)),
    )


__all__ = ["Restoring"]
