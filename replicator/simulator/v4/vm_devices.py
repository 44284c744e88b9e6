# SPDX-License-Identifier: AGPL-3.0-or-later
"""Namespace vmm: disks, CD-ROM drives and NICs of a VM. Their tag is the VM's."""

from __future__ import annotations

from replicator.simulator.model import Disk, Nic, Vm
from replicator.simulator.v4.api import PAGED, Api, Call, Namespace
from replicator.simulator.v4.vmm import find_vm
from replicator.simulator.v4.vms import (
    CDROM,
    DISK,
    NIC,
    cdrom_body,
    disk_body,
    new_cdrom,
    new_disk,
    new_nic,
    nic_body,
)
from replicator.simulator.web import HttpError, Reply, Router

_AHV = "vmm.v4.ahv.config."


def _disk(vm: Vm, uuid: str, *, cdrom: bool) -> Disk:
    for disk in vm.disks:
        if disk.uuid == uuid and disk.cdrom is cdrom:
            return disk
    raise HttpError(404, f"VM {vm.uuid} has no {'CD-ROM' if cdrom else 'disk'} {uuid}", "not_found")


def _nic(vm: Vm, uuid: str) -> Nic:
    for nic in vm.nics:
        if nic.uuid == uuid:
            return nic
    raise HttpError(404, f"VM {vm.uuid} has no NIC {uuid}", "not_found")


async def _list_disks(call: Call, vm: str) -> Reply:
    disks = [disk for disk in find_vm(call, vm).disks if not disk.cdrom]
    return call.many(disks, disk_body, DISK)


async def _get_disk(call: Call, vm: str, disk: str) -> Reply:
    found = find_vm(call, vm)
    return call.one(disk_body(_disk(found, disk, cdrom=False)), DISK, found)


async def _create_disk(call: Call, vm: str) -> Reply:
    found = find_vm(call, vm)
    body = call.body(DISK)
    call.match(found)
    disk, source = new_disk(call.core, found.cluster, body, found.disks)
    return call.task(call.core.add_disk(vm, disk, source, **call.common))


async def _update_disk(call: Call, vm: str, disk: str) -> Reply:
    found = find_vm(call, vm)
    old = _disk(found, disk, cdrom=False)
    body = call.body(DISK)
    call.match(found)
    size = (body.get("backingInfo") or {}).get("diskSizeBytes", old.size)
    return call.task(call.core.resize_disk(vm, disk, size, **call.common))


async def _delete_disk(call: Call, vm: str, disk: str) -> Reply:
    found = find_vm(call, vm)
    _disk(found, disk, cdrom=False)
    call.match(found)
    return call.task(call.core.remove_disk(vm, disk, **call.common))


async def _list_drives(call: Call, vm: str) -> Reply:
    drives = [disk for disk in find_vm(call, vm).disks if disk.cdrom]
    return call.many(drives, cdrom_body, CDROM)


async def _get_drive(call: Call, vm: str, drive: str) -> Reply:
    found = find_vm(call, vm)
    return call.one(cdrom_body(_disk(found, drive, cdrom=True)), CDROM, found)


async def _create_drive(call: Call, vm: str) -> Reply:
    found = find_vm(call, vm)
    body = call.body(CDROM)
    call.match(found)
    drive, source = new_cdrom(call.core, body, found.disks)
    return call.task(call.core.add_disk(vm, drive, source, **call.common))


async def _delete_drive(call: Call, vm: str, drive: str) -> Reply:
    found = find_vm(call, vm)
    _disk(found, drive, cdrom=True)
    call.match(found)
    return call.task(call.core.remove_disk(vm, drive, **call.common))


async def _list_nics(call: Call, vm: str) -> Reply:
    return call.many(find_vm(call, vm).nics, nic_body, NIC)


async def _get_nic(call: Call, vm: str, nic: str) -> Reply:
    found = find_vm(call, vm)
    return call.one(nic_body(_nic(found, nic)), NIC, found)


async def _create_nic(call: Call, vm: str) -> Reply:
    found = find_vm(call, vm)
    body = call.body(NIC)
    call.match(found)
    return call.task(call.core.add_nic(vm, new_nic(call.world, body), **call.common))


async def _update_nic(call: Call, vm: str, nic: str) -> Reply:
    found = find_vm(call, vm)
    old = _nic(found, nic)
    body = call.body(NIC)
    call.match(found)
    changed = new_nic(call.world, body, old.uuid)
    changed.mac = changed.mac or old.mac
    return call.task(call.core.update_nic(vm, changed, **call.common))


async def _delete_nic(call: Call, vm: str, nic: str) -> Reply:
    found = find_vm(call, vm)
    _nic(found, nic)
    call.match(found)
    return call.task(call.core.remove_nic(vm, nic, **call.common))


def add(api: Api, router: Router) -> None:
    """The endpoints."""
    space = Namespace(api, router, "vmm")
    vm = "/ahv/config/vms/{vm}"
    disks, disk = vm + "/disks", vm + "/disks/{disk}"
    drives, drive = vm + "/cd-roms", vm + "/cd-roms/{drive}"
    nics, nic = vm + "/nics", vm + "/nics/{nic}"
    view, update = "View_Virtual_Machine", "Update_Virtual_Machine"
    space.get(disks, _list_disks, _AHV + "ListDisksApiResponse", permission=view, query=PAGED)
    space.get(disk, _get_disk, _AHV + "GetDiskApiResponse", permission=view)
    space.post(disks, _create_disk, _AHV + "CreateDiskApiResponse", permission=update)
    space.put(disk, _update_disk, _AHV + "UpdateDiskApiResponse", permission=update)
    space.delete(disk, _delete_disk, _AHV + "DeleteDiskApiResponse", permission=update)
    space.get(drives, _list_drives, _AHV + "ListCdRomsApiResponse", permission=view, query=PAGED)
    space.get(drive, _get_drive, _AHV + "GetCdRomApiResponse", permission=view)
    space.post(drives, _create_drive, _AHV + "CreateCdRomApiResponse", permission=update)
    space.delete(drive, _delete_drive, _AHV + "DeleteCdRomApiResponse", permission=update)
    listed = (*PAGED, "$filter")
    space.get(nics, _list_nics, _AHV + "ListNicsApiResponse", permission=view, query=listed)
    space.get(nic, _get_nic, _AHV + "GetNicApiResponse", permission=view)
    space.post(nics, _create_nic, _AHV + "CreateNicApiResponse", permission=update)
    space.put(nic, _update_nic, _AHV + "UpdateNicApiResponse", permission=update)
    space.delete(nic, _delete_nic, _AHV + "DeleteNicApiResponse", permission=update)
