# SPDX-License-Identifier: AGPL-3.0-or-later
"""A VM as v4 shows it, and what a body of v4 makes of one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from replicator.simulator.model import Disk, Nic, Vm, World
from replicator.simulator.v4.envelope import when
from replicator.simulator.v4.parts import categories, category_id, check_cluster
from replicator.simulator.web import HttpError

if TYPE_CHECKING:
    from replicator.simulator.core import Core
    from replicator.simulator.sources import DiskSource

_AHV = "vmm.v4.ahv.config."
VM = _AHV + "Vm"
DISK = _AHV + "Disk"
CDROM = _AHV + "CdRom"
NIC = _AHV + "Nic"
#: What a client gives and reads back, and nothing here interprets.
_KEPT = (
    "isVcpuHardPinningEnabled",
    "isCpuPassthroughEnabled",
    "enabledCpuFeatures",
    "isMemoryOvercommitEnabled",
    "isGpuConsoleEnabled",
    "isCpuHotplugEnabled",
    "isScsiControllerEnabled",
    "numNumaNodes",
    "hardwareClockTimezone",
    "isBrandingEnabled",
    "isVgaConsoleEnabled",
    "vtpmConfig",
    "isAgentVm",
    "apcConfig",
    "customAttributes",
    "project",
    "projectExtId",
    "biosUuid",
    "generationUuid",
)
_REFUSED = ("gpus", "pcieDevices", "serialPorts")
SOURCE = "v4"


def vm_body(vm: Vm) -> dict[str, Any]:
    """The whole of it."""
    return {
        **{name: vm.v4.get(name) for name in _KEPT},
        "extId": vm.uuid,
        "name": vm.name,
        "description": vm.description or None,
        "createTime": when(vm.created_at),
        "updateTime": when(vm.updated_at),
        "numSockets": vm.sockets,
        "numCoresPerSocket": vm.cores,
        "numThreadsPerCore": vm.threads,
        "memorySizeBytes": vm.memory,
        "machineType": vm.machine,
        "powerState": vm.power,
        "cluster": {"extId": vm.cluster},
        "categories": [{"extId": category_id(*pair)} for pair in vm.categories.items()],
        "hardwareClockTimezone": vm.v4.get("hardwareClockTimezone", "UTC"),
        "bootConfig": _boot_body(vm),
        "guestTools": tools_body(vm),
        "protectionType": "UNPROTECTED",
        "isCrossClusterMigrationInProgress": vm.migrating,
        "disks": [disk_body(disk) for disk in vm.disks if not disk.cdrom],
        "cdRoms": [cdrom_body(disk) for disk in vm.disks if disk.cdrom],
        "nics": [nic_body(nic) for nic in vm.nics],
    }


def _boot_body(vm: Vm) -> dict[str, Any]:
    kind = str(vm.boot.get("type", "LEGACY"))
    kept = vm.boot.get(SOURCE, {})
    if kind == "LEGACY":
        return {**kept, "$objectType": _AHV + "LegacyBoot"}
    secure = kind == "SECURE_BOOT"
    return {**kept, "$objectType": _AHV + "UefiBoot", "isSecureBootEnabled": secure}


def tools_body(vm: Vm) -> dict[str, Any]:
    """Guest tools of a VM."""
    return {
        "isInstalled": vm.tools,
        "isEnabled": vm.tools,
        "isReachable": vm.tools and vm.power == "ON",
        "isVssSnapshotCapable": vm.tools,
        "capabilities": ["VSS_SNAPSHOT"] if vm.tools else [],
    }


def disk_body(disk: Disk) -> dict[str, Any]:
    """A disk; one that is a volume group shows that and no size."""
    backing: dict[str, Any]
    if disk.volume_group is not None:
        backing = {
            "$objectType": _AHV + "ADSFVolumeGroupReference",
            "volumeGroupExtId": disk.volume_group,
        }
    else:
        backing = _backing(disk)
    return {
        "extId": disk.uuid,
        "diskAddress": {"busType": disk.bus, "index": disk.index},
        "backingInfo": backing,
    }


def _backing(disk: Disk) -> dict[str, Any]:
    return {
        "$objectType": _AHV + "VmDisk",
        "diskExtId": disk.backing,
        "diskSizeBytes": disk.size,
        "storageContainer": {"extId": disk.container} if disk.container else None,
        "dataSource": disk.source.get(SOURCE),
        "isMigrationInProgress": False,
    }


def cdrom_body(disk: Disk) -> dict[str, Any]:
    """A CD-ROM drive."""
    return {
        "extId": disk.uuid,
        "diskAddress": {"busType": disk.bus, "index": disk.index},
        "backingInfo": _backing(disk) if disk.backing is not None else None,
        "isoType": "OTHER",
    }


def nic_body(nic: Nic) -> dict[str, Any]:
    """A NIC, in the old form and in that of 4.1."""
    card = {"model": nic.model, "macAddress": nic.mac, "isConnected": nic.connected}
    network = {
        "nicType": "NORMAL_NIC",
        "vlanMode": "ACCESS",
        "subnet": {"extId": nic.subnet},
        **nic.v4,
    }
    return {
        "extId": nic.uuid,
        "backingInfo": card,
        "networkInfo": network,
        "nicBackingInfo": {"$objectType": _AHV + "VirtualEthernetNic", **card},
        "nicNetworkInfo": {"$objectType": _AHV + "VirtualEthernetNicNetworkInfo", **network},
    }


# Bodies


def refuse_devices(body: dict[str, Any]) -> None:
    """Raises HttpError 501 for what is not simulated."""
    for name in _REFUSED:
        if body.get(name):
            raise HttpError(501, f"{name} are not simulated", "not_supported")


def new_vm(core: Core, body: dict[str, Any]) -> tuple[Vm, list[tuple[Disk, DiskSource | None]]]:
    """The VM that a body asks for, and where its disks come from. Raises HttpError."""
    refuse_devices(body)
    cluster = (body.get("cluster") or {}).get("extId")
    for name, value in (
        ("name", body.get("name")),
        ("cluster.extId", cluster),
        ("memorySizeBytes", body.get("memorySizeBytes")),
    ):
        if not value:
            raise HttpError(400, f"{name} is needed to create a VM")
    check_cluster(core.world, str(cluster))
    vm = Vm(uuid=str(uuid4()), cluster=str(cluster))
    apply(core.world, vm, body)
    vm.nics = [new_nic(core.world, nic) for nic in body.get("nics", [])]
    disks: list[tuple[Disk, DiskSource | None]] = []
    for part in body.get("disks", []):
        disks.append(new_disk(core, vm.cluster, part, [disk for disk, _ in disks]))
    for part in body.get("cdRoms", []):
        disks.append(new_cdrom(core, part, [disk for disk, _ in disks]))
    fits = vm.machine == "Q35" and all(disk.bus != "IDE" for disk, _ in disks)
    if vm.boot.get("type") == "SECURE_BOOT" and not fits:
        raise HttpError(422, "secure boot needs machineType Q35 and no IDE disk")
    return vm, disks


def apply(world: World, vm: Vm, body: dict[str, Any]) -> None:
    """Everything of a body but disks and NICs. Raises HttpError for categories that are not there."""
    vm.name = body.get("name", vm.name)
    vm.description = body.get("description", vm.description)
    vm.sockets = body.get("numSockets", vm.sockets)
    vm.cores = body.get("numCoresPerSocket", vm.cores)
    vm.threads = body.get("numThreadsPerCore", vm.threads)
    vm.memory = body.get("memorySizeBytes", vm.memory)
    vm.machine = body.get("machineType", vm.machine)
    boot = body.get("bootConfig")
    if boot is not None:
        kind = "LEGACY"
        if boot["$objectType"] == _AHV + "UefiBoot":
            kind = "SECURE_BOOT" if boot.get("isSecureBootEnabled") else "UEFI"
        kept = {
            name: boot[name] for name in ("bootDevice", "bootOrder", "nvramDevice") if name in boot
        }
        vm.boot = {"type": kind, SOURCE: kept}
    if "categories" in body:
        ids = [reference.get("extId") for reference in body["categories"]]
        vm.categories = chosen_categories(world, ids)
    vm.v4 = {**vm.v4, **{name: body[name] for name in _KEPT if name in body}}


def chosen_categories(world: World, ids: list[str | None]) -> dict[str, str]:
    """Keys and values of categories by their ids. Raises HttpError 404."""
    known = categories(world)
    chosen = {}
    for uuid in ids:
        if uuid not in known:
            raise HttpError(404, f"no category with the id {uuid}", "not_found")
        chosen[known[uuid].name] = known[uuid].value
    return chosen


def changed_vm(world: World, vm: Vm, body: dict[str, Any]) -> Vm:
    """A copy of a VM, changed as a body asks."""
    refuse_devices(body)
    changed = copy.deepcopy(vm)
    apply(world, changed, body)
    return changed


def _address(part: dict[str, Any], taken: list[Disk], bus: str) -> tuple[str, int]:
    given = part.get("diskAddress") or {}
    bus = given.get("busType", bus)
    if "index" in given:
        return bus, int(given["index"])
    used = {disk.index for disk in taken if disk.bus == bus}
    return bus, next(index for index in range(len(used) + 1) if index not in used)


def new_disk(
    core: Core, cluster: str, part: dict[str, Any], taken: list[Disk]
) -> tuple[Disk, DiskSource | None]:
    """A disk that a body describes, among the disks ``taken``. Raises HttpError."""
    bus, index = _address(part, taken, "SCSI")
    backing = part.get("backingInfo")
    if backing is None:
        raise HttpError(400, "a disk needs backingInfo")
    disk = Disk(uuid=str(uuid4()), backing=None, bus=bus, index=index)
    if backing["$objectType"] == _AHV + "ADSFVolumeGroupReference":
        disk.volume_group = core.get("volume_groups", backing["volumeGroupExtId"]).uuid
        return disk, None
    size = backing.get("diskSizeBytes", 0)
    container = (backing.get("storageContainer") or {}).get("extId")
    if container is not None:
        found = core.get("containers", container)
        if found.cluster != cluster:
            raise HttpError(422, f"storage container {container} is on another cluster")
        disk.container = container
    source = backing.get("dataSource")
    if source is None:
        if not size:
            raise HttpError(400, "a disk needs diskSizeBytes or a dataSource")
        disk.size = size
        return disk, core.sources.blank(size)
    found_source = disk_source(core, source["reference"])
    if size and size < found_source.size:
        raise HttpError(422, f"diskSizeBytes {size} is less than the source's {found_source.size}")
    disk.size = size
    disk.source = {SOURCE: source}
    return disk, found_source


def disk_source(core: Core, reference: dict[str, Any]) -> DiskSource:
    """What a reference of a data source means. Raises HttpError."""
    kind = reference["$objectType"].removeprefix(_AHV)
    if kind == "ImageReference":
        return core.sources.image(reference["imageExtId"])
    if kind == "VmDiskRecoveryPointReference":
        return core.sources.snapshot_disk(_needed(reference, "diskRecoveryPointExtId"))
    if kind == "VolumeDiskReference":
        disk = _needed(reference, "diskExtId")
        groups = core.world.volume_groups.values()
        if all(each.uuid != disk for group in groups for each in group.disks):
            raise HttpError(404, f"no volume disk with the id {disk}", "not_found")
        return core.sources.group_disk(disk)
    if "diskExtId" in reference:
        return core.sources.vm_disk(reference["diskExtId"])
    address = reference.get("diskAddress") or {}
    vm: Vm = core.get("vms", (reference.get("vmReference") or {}).get("extId", ""))
    for each in vm.disks:
        if (each.bus, each.index) == (address.get("busType"), address.get("index")):
            return core.sources.vm_disk(each.uuid)
    raise HttpError(404, f"VM {vm.uuid} has no disk at this address", "not_found")


def _needed(reference: dict[str, Any], name: str) -> str:
    if name not in reference:
        raise HttpError(400, f"the reference needs {name}")
    return str(reference[name])


def new_cdrom(
    core: Core, part: dict[str, Any], taken: list[Disk]
) -> tuple[Disk, DiskSource | None]:
    """A CD-ROM drive, with a disc if the body has one. Raises HttpError."""
    bus, index = _address(part, taken, "SATA")
    drive = Disk(uuid=str(uuid4()), backing=None, bus=bus, index=index, cdrom=True)
    source = (part.get("backingInfo") or {}).get("dataSource")
    if source is None:
        return drive, None
    drive.source = {SOURCE: source}
    return drive, disk_source(core, source["reference"])


def new_nic(world: World, part: dict[str, Any], uuid: str | None = None) -> Nic:
    """A NIC that a body describes, in either form. Raises HttpError."""
    card = part.get("nicBackingInfo") or part.get("backingInfo") or {}
    network = part.get("nicNetworkInfo") or part.get("networkInfo") or {}
    subnet = (network.get("subnet") or {}).get("extId")
    if subnet not in world.subnets:
        raise HttpError(404, f"no subnet with the id {subnet}", "not_found")
    kept = ("nicType", "vlanMode", "trunkedVlans", "shouldAllowUnknownMacs", "ipv4Config")
    return Nic(
        uuid=uuid or str(uuid4()),
        subnet=str(subnet),
        mac=card.get("macAddress", ""),
        connected=card.get("isConnected", True),
        model=card.get("model", "VIRTIO"),
        v4={name: network[name] for name in kept if name in network},
    )
