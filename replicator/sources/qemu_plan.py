# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a snapshot in QEMU will consist of, worked out before anything is made. No input or output."""

from __future__ import annotations

from typing import Any

from replicator.sources import snapshot_names as names
from replicator.sources.base import SnapshotName
from replicator.sources.qemu_inventory import Disk
from replicator.sources.snapshot_names import DiskRecord, SnapshotRecord


def plan_record(
    name: SnapshotName, disks: list[Disk], earlier: SnapshotRecord | None
) -> SnapshotRecord:
    """The record of the snapshot to be; ``earlier`` is the reference's, None if it is missing."""
    sizes = {disk.identity: disk.size for disk in earlier.disks} if earlier else {}
    planned: list[DiskRecord] = []
    for disk in disks:
        known = sizes.get(disk.identity)
        lost = _why_lost(disk, name.reference, known)
        record = DiskRecord(disk.identity, disk.node.name, disk.node.size, known or 0, lost)
        planned.append(record)
    return SnapshotRecord(name.push_id, name.reference, 0, tuple(planned))


def useless_bitmaps(record: SnapshotRecord, disks: list[Disk]) -> list[dict[str, Any]]:
    """Actions that remove the reference's bitmap where it does not tell all: it never will again."""
    if record.reference is None:
        return []
    bitmap = names.bitmap_name(record.reference)
    return [
        {"type": "block-dirty-bitmap-remove", "data": {"node": planned.node, "name": bitmap}}
        for disk, planned in zip(disks, record.disks, strict=True)
        if planned.lost and bitmap in disk.node.bitmaps
    ]


def instant(record: SnapshotRecord, disks: list[Disk], grain: int) -> list[dict[str, Any]]:
    """The transaction's actions: QEMU does all of them, on all disks, between two guest writes."""
    actions: list[dict[str, Any]] = []
    for index, (disk, planned) in enumerate(zip(disks, record.disks, strict=True)):
        bitmap: dict[str, Any] = {
            "node": planned.node,
            "name": names.bitmap_name(record.push_id),
            "granularity": grain,
        }
        if disk.node.keeps_bitmaps:
            bitmap["persistent"] = True
        actions.append({"type": "block-dirty-bitmap-add", "data": bitmap})
        actions.extend(
            {"type": "block-dirty-bitmap-disable", "data": {"node": planned.node, "name": old}}
            for old in reference_bitmaps(record, planned)
        )
        backup = {
            "job-id": names.object_id(record.push_id, index),
            "device": planned.node,
            "target": names.node_name(record.push_id, index),
            "sync": "none",
        }
        actions.append({"type": "blockdev-backup", "data": backup})
    return actions


def reference_bitmaps(record: SnapshotRecord, disk: DiskRecord) -> list[str]:
    """The reference's bitmap on this disk, as a list of one; empty if it is of no use."""
    if record.reference is None or disk.lost is not None:
        return []
    return [names.bitmap_name(record.reference)]


def _why_lost(disk: Disk, reference: str | None, known_size: int | None) -> str | None:
    """Why changes to a disk since the reference cannot be told; None if they can, or nobody asks."""
    if reference is None:
        return None
    since = f"changes of disk {disk.identity} since push {reference}"
    bitmap = disk.node.bitmaps.get(names.bitmap_name(reference))
    if bitmap is None:
        return f"{since} were not recorded"
    if bitmap.inconsistent:
        return f"{since}: QEMU was not shut down cleanly, the record is inconsistent"
    if not bitmap.recording:
        return f"{since}: the record was stopped before this snapshot"
    if known_size is None:
        return f"{since}: the record of the disk's size is missing"
    if known_size > disk.node.size:
        return f"{since}: the disk has shrunk"
    return None
