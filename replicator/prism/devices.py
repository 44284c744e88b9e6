# SPDX-License-Identifier: AGPL-3.0-or-later
"""What AHV asks of a VM's devices, whichever interface makes it. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from replicator.hardware import DiskSlot, Hardware
from replicator.prism.types import NewVm, Vm

#: Places on the buses that a CD-ROM drive can be on.
_PLACES: Final = {"IDE": 4, "SATA": 6}
Q35: Final = "Q35"


def disk_slots(vm: Vm, container_name: Callable[[str], str]) -> tuple[DiskSlot, ...]:
    """Where the VM's own disks sit; those of volume groups are left out. ``container_name``: of a container's id, "" for none."""
    return tuple(
        DiskSlot(
            identity=disk.identity,
            bus=disk.bus.lower(),
            index=disk.index,
            size=disk.size,
            container=disk.container or "",
            container_name=container_name(disk.container or ""),
        )
        for disk in vm.disks
        if disk.volume_group is None
    )


def machine_of(hardware: Hardware) -> str:
    """The machine's type as Prism calls it; empty: Prism's default. Secure boot has one only (nutanix-v4.md, 4)."""
    if hardware.secure_boot:
        return Q35
    return hardware.machine_type if hardware.machine_type in {"PC", "PSERIES", Q35} else ""


def drive_places(new: NewVm) -> list[tuple[str, int]]:
    """Where the empty CD-ROM drives go: bus and index, beside the disks; fewer than there were where there is no room.

    Q35 has no IDE.
    """
    taken = {(disk.bus, disk.index) for disk in new.disks}
    buses = ["SATA"] if machine_of(new.hardware) == Q35 else ["IDE", "SATA"]
    free = [
        (bus, index) for bus in buses for index in range(_PLACES[bus]) if (bus, index) not in taken
    ]
    return free[: new.hardware.cdroms]


__all__ = ["Q35", "disk_slots", "drive_places", "machine_of"]
