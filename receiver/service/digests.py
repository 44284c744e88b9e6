# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a source that lost its reference is told: the newest point, and pages of the maps of its disks (docs/wire.md, 4.9).

Pages are read while no push can be committed, and only of the map whose root the source names: so all that a source gets
is of one point, or it is refused and begins anew.
"""

from __future__ import annotations

import logging

import trio

from receiver.store.admission import PushRefusedHereError, no_base
from receiver.store.vm_store import VmStore
from replicator.domain.model import Point, PointDisk, Suspicion
from replicator.errors import DamageError, StateError
from replicator.imagemap import ImageMap
from replicator.wire import messages as m

_logger = logging.getLogger(__name__)


async def describe(store: VmStore) -> m.Described:
    """The newest point, and the shape of each disk's map.

    Raises PushRefusedHereError if there is none, or if a map is lost and cannot be made again.
    """
    point = _newest(store)
    await store.ensure_heads()
    async with store.no_commit():
        if store.vm.newest != point:
            raise _moved()
        return await trio.to_thread.run_sync(_describe, store, point)


def _describe(store: VmStore, point: Point) -> m.Described:
    disks = []
    for disk in point.disks:
        with _open(store, disk, point) as known:
            shape = {"grain": known.grain, "algorithm": int(known.algorithm)}
        disks.append(
            m.DiskMap(
                disk=disk.disk,
                identity=disk.identity,
                size=disk.size,
                root=disk.root,
                since=disk.since,
                grain=shape["grain"],
                algorithm=1 if shape["algorithm"] == 1 else 2,
            )
        )
    return m.Described(
        number=point.number,
        parent=point.parent,
        push_id=point.push_id,
        kind=point.kind,
        epoch=point.epoch,
        taken_at_us=point.taken_at_us,
        committed_at_us=point.committed_at_us,
        duration_us=point.duration_us,
        bytes_pushed=point.bytes_pushed,
        root=point.root,
        sampled=point.sampled,
        compared=point.compared,
        disks=tuple(disks),
    )


async def pages(store: VmStore, asked: m.AskPages) -> list[m.Pages]:
    """The pages, in answers that fit the protocol's bound; every page fits the node above it.

    Raises PushRefusedHereError if the newest point's disk is another one now, or its map is damaged beyond mending.
    """
    try:
        found = await _read(store, asked)
    except DamageError as error:
        _logger.warning("%s: the map of %s is mended: %s", store.vm.name, asked.disk, error)
        await store.ensure_heads(thorough=True)
        try:
            found = await _read(store, asked)
        except DamageError as again:
            raise no_base(again) from again
    at_once = m.PAGES_SENT_MAX
    return [m.Pages(tuple(found[at : at + at_once])) for at in range(0, len(found), at_once)]


async def _read(store: VmStore, asked: m.AskPages) -> list[bytes]:
    async with store.no_commit():
        point = _newest(store)
        disk = point.disk(asked.disk)
        if disk is None or disk.root != asked.root:
            raise _moved()
        return await trio.to_thread.run_sync(_pages, store, disk, point, asked)


def _pages(store: VmStore, disk: PointDisk, point: Point, asked: m.AskPages) -> list[bytes]:
    with _open(store, disk, point) as known:
        if asked.level >= known.height:
            raise PushRefusedHereError("bad-request", f"the map has no level {asked.level}")
        return [known.page(asked.level, index).rstrip(b"\0") for index in asked.indexes]


def _open(store: VmStore, disk: PointDisk, point: Point) -> ImageMap:
    """The map of the newest point's disk. Raises PushRefusedHereError if it is not that."""
    try:
        known = ImageMap.open(store.paths.head_map(disk))
    except (DamageError, StateError) as error:
        raise no_base(error) from error
    if known.point != point.number or known.root() != disk.root:
        known.close()
        raise no_base(DamageError(f"the map of {disk.disk} is not at point {point.number}"))
    return known


async def doubt(store: VmStore, said: m.Doubt) -> None:
    """Mark the points that may lack changes."""
    missed = Suspicion(said.disk, said.offset, said.point)
    async with store.changing() as vm:
        if vm.suspect is None and vm.newest is not None:
            _logger.error(
                "%s: change tracking at the source missed a change (%s, byte %d): points since the last one that was"
                " read in full may lack changes",
                vm.name,
                said.disk,
                said.offset,
            )
            vm.miss_changes(missed)


def _newest(store: VmStore) -> Point:
    point = store.vm.newest
    if point is None:
        raise PushRefusedHereError("wrong-parent", "there is no point of this VM here")
    return point


def _moved() -> PushRefusedHereError:
    return PushRefusedHereError("wrong-parent", "the newest point here is another one now")


__all__ = ["describe", "doubt", "pages"]
