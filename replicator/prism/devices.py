# SPDX-License-Identifier: AGPL-3.0-or-later
"""What AHV asks of a VM's devices, whichever interface makes it. Pure."""

from __future__ import annotations

from typing import Final

from replicator.hardware import Hardware
from replicator.prism.types import NewVm

#: Places on the buses that a CD-ROM drive can be on.
_PLACES: Final = {"IDE": 4, "SATA": 6}
Q35: Final = "Q35"


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


__all__ = ["Q35", "drive_places", "machine_of"]
