# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a VM is made of besides its disks' bytes: enough to make one like it, on this platform or on another. Pure.

Names and ids are those of the platform it came from. Unknown is None, or empty: who makes a VM then takes its own default.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Firmware(StrEnum):
    """How the VM boots."""

    BIOS = "bios"
    UEFI = "uefi"


class Nic(msgspec.Struct, frozen=True, kw_only=True):
    """A network card and the subnet that it is in. ``mac`` as colons have it, lower case."""

    subnet: str
    subnet_name: str = ""
    mac: str = ""
    model: str = ""
    connected: bool = True


class DiskSlot(msgspec.Struct, frozen=True, kw_only=True):
    """Where a disk sits. ``identity`` is VmDisk's; ``bus`` in lower case (scsi, sata, ide, pci, virtio, nvme); size in bytes."""

    identity: str
    bus: str
    index: int
    size: int
    container: str = ""
    container_name: str = ""


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """A VM without its bytes. ``disks`` in the order of the VM; CD-ROMs are counted and not kept."""

    platform: str
    uuid: str
    name: str
    cluster: str = ""
    cluster_name: str = ""
    description: str = ""
    sockets: int = 1
    cores_per_socket: int = 1
    threads_per_core: int = 1
    memory_mib: int = 1024
    firmware: Firmware = Firmware.BIOS
    secure_boot: bool = False
    machine_type: str = ""
    timezone: str = ""
    cdroms: int = 0
    nics: tuple[Nic, ...] = ()
    disks: tuple[DiskSlot, ...] = ()


__all__ = ["DiskSlot", "Firmware", "Hardware", "Nic"]
