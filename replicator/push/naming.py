# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which disk of a snapshot is which disk of the points, and how its changes are found."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable, Mapping

from replicator.disk import Extent
from replicator.domain.model import PointDisk, PushKind, next_disk_name
from replicator.domain.vm import ProtectedVm
from replicator.errors import ReferenceLostError, RefusedError
from replicator.push.journal import EntryDisk, PushEntry
from replicator.sources.base import Snapshot

_logger = logging.getLogger(__name__)


async def name_disks(
    vm: ProtectedVm, entry: PushEntry, snapshot: Snapshot, scans: Mapping[str, bytes]
) -> tuple[EntryDisk, ...]:
    """Which disk is which, from its identity; raises RefusedError for one that shrank.

    ``scans``: the root that a disk was read to have for a resync, by its identity.
    """
    names = vm.disk_names()
    all_names = disk_names(names, [disk.identity for disk in snapshot.disks])
    lost = snapshot.lost_tracking is not None
    result: list[EntryDisk] = []
    for disk in snapshot.disks:
        name = all_names[disk.identity]
        if disk.identity not in names and vm.newest is not None:
            _logger.info("%s: %s (%s) is new", vm.name, name, disk.identity)
        old = vm.newest.disk(name) if vm.newest and disk.identity in names else None
        size = disk.view.size
        if entry.kind is PushKind.SEED or old is None:
            result.append(EntryDisk(name, disk.identity, size, entry.point, False, bytes(32)))
            continue
        check_size(old, size)
        scan = scans.get(disk.identity)
        compare = lost or scan is not None or not await _tracks(disk.view.extents(entry.reference))
        result.append(EntryDisk(name, disk.identity, size, old.since, compare, old.root, scan))
    return tuple(result)


def disk_names(known: Mapping[str, str], identities: Iterable[str]) -> dict[str, str]:
    """``disk-N`` by identity: the ``known`` names, and one for each identity that has none yet, in their order."""
    names = dict(known)
    for identity in identities:
        if identity not in names:
            taken = list(names.values())
            wanted = identity if _is_disk_name(identity) else None
            names[identity] = wanted if wanted and wanted not in taken else next_disk_name(taken)
    return names


def check_size(old: PointDisk, size: int) -> None:
    """Raise RefusedError if a disk is smaller than it was."""
    if size < old.size:
        raise RefusedError(
            f"{old.disk} ({old.identity}) shrank from {old.size} to {size} bytes, which a cycle cannot"
            " carry: give it back its size, or run replctl seed --again"
        )


def tell_gone_disks(vm: ProtectedVm, entry: PushEntry, snapshot: Snapshot) -> None:
    """Log which disks go with this push."""
    there = {disk.identity for disk in snapshot.disks}
    for old in vm.newest.disks if vm.newest is not None else ():
        if old.identity not in there:
            _logger.warning(
                "%s: %s (%s) is gone: it is not protected any more from point %d on",
                vm.name,
                old.disk,
                old.identity,
                entry.point,
            )


async def _tracks(extents: AsyncGenerator[Extent, None]) -> bool:
    """Whether change tracking can answer for this disk."""
    try:
        async for _ in extents:
            break
    except ReferenceLostError:
        return False
    finally:
        await extents.aclose()
    return True


def _is_disk_name(identity: str) -> bool:
    return identity.startswith("disk-") and identity[5:].isdigit()


__all__ = ["check_size", "disk_names", "name_disks", "tell_gone_disks"]
