# SPDX-License-Identifier: AGPL-3.0-or-later
"""An open snapshot of a VM: its disks' maps, and how each of them is read."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import msgspec
import trio

from replicator.errors import SnapshotGoneError
from replicator.iscsi import PortalUnreachableError, TimedOutError
from replicator.nursery import flat_nursery
from replicator.prism.errors import (
    NoDataServicesError,
    PrismAnswerError,
    PrismError,
    PrismNotFoundError,
    PrismPermissionError,
    PrismRefusedError,
    PrismUnreachableError,
    RegionsLostError,
)
from replicator.prism.types import Capability, DiskSnapshot, VmSnapshot
from replicator.sources.base import SourceDisk
from replicator.sources.nutanix import plan
from replicator.sources.nutanix.expose import NoTargetError, Wanted, expose
from replicator.sources.nutanix.ledger import Entry
from replicator.sources.nutanix.regions import RegionMap, fetch_map
from replicator.sources.nutanix.rest import expose_by_rest
from replicator.sources.nutanix.site import NutanixSite
from replicator.sources.nutanix.view import Lane, NutanixView, Reader

_logger = logging.getLogger(__name__)

#: A map of what was ever written only saves reading: where Prism has none, all is read.
_NO_MAP = (
    RegionsLostError,
    PrismAnswerError,
    PrismNotFoundError,
    PrismPermissionError,
    PrismRefusedError,
    PrismUnreachableError,
)
#: What another way of reading may help against.
_NO_ISCSI = (PortalUnreachableError, TimedOutError, NoDataServicesError, NoTargetError)


class NutanixSnapshot:
    """Implements ``Snapshot``. Made by ``open_snapshot``."""

    def __init__(
        self, taken_at_us: int, push_id: str, views: Sequence[NutanixView], lanes: Sequence[Lane]
    ) -> None:
        self.push_id = push_id
        self._taken_at_us = taken_at_us
        self._views = views
        self._lanes = lanes

    @property
    def taken_at_us(self) -> int:
        """The instant, in microseconds since the epoch, UTC."""
        return self._taken_at_us

    @property
    def disks(self) -> Sequence[SourceDisk]:
        """Every disk, in the order of the VM's buses and numbers."""
        return [SourceDisk(view.disk.disk, view) for view in self._views]

    @property
    def lost_tracking(self) -> str | None:
        """Why nothing is known of any disk's changes. Where it is only some disks', their views say so."""
        lost = [view.lost for view in self._views if view.lost is not None]
        if not lost or any(view.changes is not None for view in self._views):
            return None
        return "; ".join(dict.fromkeys(lost))

    async def check(self) -> None:
        """Nothing to ask: what is read are clones of one snapshot, which nobody writes to."""
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Take down what made the disks readable. Cancelled, it goes on behind the caller's back. Can be repeated."""
        for lane in self._lanes:
            lane.leave()
        for lane in self._lanes:
            await lane.wait()
        await trio.lowlevel.checkpoint()


async def open_snapshot(
    site: NutanixSite,
    entry: Entry,
    reference_push: str | None,
    reference: Entry | None,
    opening: trio.Semaphore,
) -> tuple[NutanixSnapshot, Entry]:
    """Ask what changed, and make the views. Returns the entry with the disks' sizes as the maps have them.

    ``reference``: the ledger's entry of the snapshot of ``reference_push``, if there is one. Nothing is attached yet. Raises
    PrismError where Prism cannot be asked; that a reference is of no use is no error.
    """
    snapshot = entry.as_snapshot()
    lost: str | None = None
    if reference_push is not None:
        lost = plan.why_lost(reference, reference_push, snapshot, site.prism.capability)
        if lost is not None:
            reference = None
    else:
        reference = None
    maps: dict[str, _Maps] = {}

    async def one(disk: DiskSnapshot) -> None:
        async with opening:
            maps[disk.disk] = await _ask(site, snapshot, disk, reference, lost)

    async with flat_nursery() as nursery:
        for disk in snapshot.disks:
            nursery.start_soon(one, disk)
    disks = tuple(maps[disk.disk].disk for disk in snapshot.disks)
    entry = msgspec.structs.replace(entry, disks=disks)
    snapshot = entry.as_snapshot()
    path = _DataPath(site)
    views, lanes = [], []
    for number, disk in enumerate(disks):
        wanted = Wanted(snapshot, disk, number, entry.push_id)
        lane = Lane(
            site.nursery,
            lambda wanted=wanted: path.expose(wanted),  # type: ignore[misc]  # a default argument has no type
            opening,
            f"disk {disk.disk} of snapshot {snapshot.name}",
        )
        found = maps[disk.disk]
        views.append(
            NutanixView(
                disk,
                lane,
                reference=reference_push,
                changes=found.changes,
                lost=found.lost,
                full=found.full,
                asked=found.changes is None,
                fetch_full=lambda disk=disk: _full_map(site, snapshot, disk),  # type: ignore[misc]  # as above
            )
        )
        lanes.append(lane)
    opened = NutanixSnapshot(entry.taken_at_us, entry.push_id, views, lanes)
    if opened.lost_tracking is None:
        for found in maps.values():
            if found.lost is not None:
                _logger.warning("%s; its digests are compared instead", found.lost)
    return opened, entry


class _Maps(msgspec.Struct, frozen=True):
    """What is known of a disk: one of the two maps is asked for at once, as it tells the disk's size in the snapshot."""

    disk: DiskSnapshot
    changes: RegionMap | None = None
    full: RegionMap | None = None
    lost: str | None = None


async def _ask(
    site: NutanixSite,
    snapshot: VmSnapshot,
    disk: DiskSnapshot,
    reference: Entry | None,
    lost: str | None,
) -> _Maps:
    if reference is not None:
        older = plan.reference_disk(reference, disk)
        if isinstance(older, str):
            lost = older
        else:
            try:
                changes = await fetch_map(
                    site.prism, snapshot, disk, (reference.as_snapshot(), older)
                )
            except (RegionsLostError, PrismAnswerError, PrismNotFoundError) as error:
                lost = f"{plan.REFERENCE_LOST} (push {reference.push_id}): {error}"
            else:
                if changes.file_size >= older.size:
                    return _Maps(_resized(disk, changes), changes=changes)
                lost = f"{plan.REFERENCE_LOST} for disk {disk.disk}: it is smaller than it was"
    full = await _full_map(site, snapshot, disk, check=False)
    return _Maps(disk if full is None else _resized(disk, full), full=full, lost=lost)


def _resized(disk: DiskSnapshot, found: RegionMap) -> DiskSnapshot:
    """The disk with the size that it has in the snapshot: the VM's may be newer."""
    if found.file_size == disk.size:
        return disk
    _logger.warning(
        "disk %s is %d bytes in the snapshot; the VM says %d", disk.disk, found.file_size, disk.size
    )
    return msgspec.structs.replace(disk, size=found.file_size)


async def _full_map(
    site: NutanixSite, snapshot: VmSnapshot, disk: DiskSnapshot, *, check: bool = True
) -> RegionMap | None:
    """What was ever written; None where Prism has no such map, which is told."""
    try:
        found = await fetch_map(site.prism, snapshot, disk, None)
    except _NO_MAP as error:
        _logger.warning(
            "disk %s: all of it is read, as its allocation map cannot be had: %s", disk.disk, error
        )
        return None
    except PrismError as error:
        if error.status != 501:
            raise
        _logger.warning(
            "disk %s: all of it is read, Prism has no allocation map: %s", disk.disk, error
        )
        return None
    if check and found.file_size != disk.size:
        raise SnapshotGoneError(
            f"disk {disk.disk} of snapshot {snapshot.name} has {found.file_size} bytes now, not {disk.size}"
        )
    return found


class _DataPath:
    """How the disks of one snapshot are read: what did not work for one is not tried for the next."""

    def __init__(self, site: NutanixSite) -> None:
        self._site = site
        self._without_iscsi = site.settings.data_path == "rest"
        self._limiter = trio.CapacityLimiter(16)

    @asynccontextmanager
    async def expose(self, wanted: Wanted) -> AsyncGenerator[Reader, None]:
        """The disk readable, until the block is left."""
        settings, begun = self._site.settings, False
        if not self._without_iscsi:
            try:
                async with expose(self._site, wanted) as reader:
                    begun = True
                    yield reader
                    return
            except _NO_ISCSI as error:
                if begun or settings.data_path == "iscsi":
                    raise
                if self._site.prism.capability is Capability.V4:
                    raise  # it makes images of live disks only
                _logger.warning(
                    "data_path: reading over REST instead, iSCSI does not work: %s", error
                )
                self._without_iscsi = True
        async with expose_by_rest(self._site, wanted, self._limiter) as file:
            yield file


__all__ = ["NutanixSnapshot", "open_snapshot"]
