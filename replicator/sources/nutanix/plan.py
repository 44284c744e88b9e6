# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is to be done, from what Prism says: no input or output, so that every case can be tested.

Facts: nutanix-data-path.md, A1.2, A1.3, A2.1 and the pitfalls of part C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from replicator.errors import SourceError
from replicator.prism.types import Capability, Consistency, DiskSnapshot, Vm, VmDisk, VmSnapshot
from replicator.sources.nutanix.ledger import Entry

#: What is logged, and what an operator looks for, where a cycle cannot build on the last point.
REFERENCE_LOST: Final = "reference_snapshot not found"
#: What is nowhere written down may be of a process that we do not know of: it is let alone while it is young.
UNKNOWN_AGE_US: Final = 3_600_000_000
#: What was begun, and is not there, may still come: tasks of Prism take that long. Then it is taken for never made.
UNCERTAIN_AGE_US: Final = 3_600_000_000
_US: Final = 1_000_000


def disks_of(vm: Vm) -> tuple[VmDisk, ...]:
    """The disks that a snapshot of the VM holds. Raises SourceError where none can be made now, or none would be in it."""
    if vm.migrating:
        raise SourceError(
            f"{vm.name} is on its way to another cluster: no snapshot is made until that migration has ended"
        )
    disks = tuple(disk for disk in vm.disks if disk.volume_group is None)
    if not disks:
        raise SourceError(f"{vm.name} has no disk of its own that could be protected")
    return disks


def left_out(vm: Vm) -> str | None:
    """Which disks are in no snapshot of the VM, in words; None if all are."""
    others = [disk for disk in vm.disks if disk.volume_group is not None]
    if not others:
        return None
    shown = ", ".join(
        f"{disk.bus}.{disk.index} of volume group {disk.volume_group}" for disk in others
    )
    return f"{vm.name}: not protected, because no snapshot of the VM holds them: {shown}"


def choose_consistency(wanted: str, vm: Vm) -> tuple[Consistency, str | None]:
    """What snapshot to ask for, and why it is less than was wanted.

    ``wanted`` is application_consistent: true, try or false. Raises SourceError where it is true, and cannot be had.
    """
    if wanted == "false":
        return Consistency.CRASH, None
    if vm.quiesce or vm.power == "OFF":
        # Nothing runs in a VM that is off: its disks are as the guest left them.
        return (
            (Consistency.APPLICATION, None)
            if vm.quiesce and vm.power != "OFF"
            else (Consistency.CRASH, None)
        )
    why = f"{vm.name} has no guest tools that could make an application-consistent snapshot"
    if wanted == "true":
        raise SourceError(
            f"{why}: install or mend Nutanix Guest Tools in it, or set application_consistent = try"
        )
    return Consistency.CRASH, why


def expiry_us(now_us: int, interval_s: int, outage_s: int) -> int:
    """When a snapshot expires: it is the reference of the next cycle, also after the longest outage that is tolerated."""
    return now_us + (2 * interval_s + outage_s) * _US


def is_expiring(entry: Entry, now_us: int, interval_s: int) -> bool:
    """Whether a reference would not live through the next two intervals."""
    return 0 < entry.expires_at_us < now_us + 2 * interval_s * _US


def out_of_reach(entry: Entry, spoken: Capability) -> str | None:
    """Why Prism does not know the object though it is there, in words; None where it can be asked for."""
    if not entry.is_out_of_reach(spoken):
        return None
    return f"it was made through {entry.capability}, and Prism is spoken to by {spoken} now"


def why_lost(
    reference: Entry | None, push_id: str, snapshot: VmSnapshot, spoken: Capability
) -> str | None:
    """Why nothing can be compared with the reference; None if it can be tried."""
    if reference is None or reference.uuid is None:
        return f"{REFERENCE_LOST}: no snapshot of push {push_id} is known here"
    if (why := out_of_reach(reference, spoken)) is not None:
        return f"{REFERENCE_LOST}: {why}"
    if reference.vm != snapshot.vm:
        return f"{REFERENCE_LOST}: that of push {push_id} is of another VM"
    if reference.cluster != snapshot.cluster:
        return f"{REFERENCE_LOST}: that of push {push_id} is on cluster {reference.cluster}, the VM on {snapshot.cluster} now"
    return None


def reference_disk(reference: Entry, disk: DiskSnapshot) -> DiskSnapshot | str:
    """The disk as it is in the reference; or why its changes since then cannot be told."""
    older = next((each for each in reference.disks if each.disk == disk.disk), None)
    what = f"{REFERENCE_LOST} for disk {disk.disk}"
    if older is None:
        return f"{what}: it was added since push {reference.push_id}"
    if older.backing != disk.backing:
        return (
            f"{what}: another virtual disk ({disk.backing}) has taken the place of that of push {reference.push_id}"
            f" ({older.backing}), as after a restore or a migration"
        )
    if older.size > disk.size:
        return f"{what}: it shrank from {older.size} to {disk.size} bytes since push {reference.push_id}"
    return older


def in_order(vm: Vm, disks: Sequence[DiskSnapshot]) -> tuple[DiskSnapshot, ...]:
    """The snapshot's disks in the order of the VM's: that of buses and numbers, the same in each cycle."""
    places = {disk.identity: (disk.bus, disk.index) for disk in vm.disks}
    return tuple(sorted(disks, key=lambda disk: (places.get(disk.disk, ("~", 0)), disk.disk)))


def check_disks(wanted: Sequence[VmDisk], snapshot: VmSnapshot) -> None:
    """Raise SourceError unless the snapshot holds these disks, each once: a disk that is left out would be lost silently."""
    there = [disk.disk for disk in snapshot.disks]
    missing = [disk.identity for disk in wanted if disk.identity not in there]
    if missing:
        raise SourceError(
            f"snapshot {snapshot.name} lacks the VM's disk {missing[0]}: no point is made of it"
        )
    if len(set(there)) != len(there):
        raise SourceError(f"snapshot {snapshot.name} holds a disk twice")


__all__ = [
    "REFERENCE_LOST",
    "UNCERTAIN_AGE_US",
    "UNKNOWN_AGE_US",
    "check_disks",
    "choose_consistency",
    "disks_of",
    "expiry_us",
    "in_order",
    "is_expiring",
    "left_out",
    "reference_disk",
    "why_lost",
]
