# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whether a push may land on what the receiver has, and what it would make. Decides; changes nothing.

A refusal carries the protocol's code (docs/wire.md), by which the source chooses what to do.
"""

from __future__ import annotations

import logging

from receiver.store.landing import Expected, Landing
from receiver.store.layout import VmPaths
from replicator.domain.model import Point, PointDisk, PushKind
from replicator.domain.vm import ProtectedVm
from replicator.errors import DamageError, RefusedError, StateError
from replicator.imagemap import ImageMap, RootBuilder, vm_root
from replicator.phcbt.read import StoredDelta
from replicator.wire.messages import Finish, Open, RefusalCode

_logger = logging.getLogger(__name__)


class PushRefusedHereError(RefusedError):
    """A push that may not be; ``code`` is the protocol's."""

    def __init__(self, code: RefusalCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def check_push(vm: ProtectedVm, paths: VmPaths, opened: Open) -> list[Expected]:
    """What each stream of the push must say. Raises PushRefusedHereError if it may not land. Blocks."""
    newest = vm.newest
    if opened.epoch < vm.epoch:
        raise PushRefusedHereError(
            "stale-epoch",
            f"the VM is in epoch {vm.epoch} here, the push is of epoch {opened.epoch}:"
            " the source was fenced by a failover",
        )
    try:
        vm.check_commit(opened.kind, opened.epoch)
    except RefusedError as error:
        raise PushRefusedHereError("state", str(error)) from None
    number = newest.number if newest else 0
    root = newest.root if newest else None
    parent_fits = opened.kind is PushKind.SEED or opened.parent_root == root
    # Numbers may be left out: those that the source used with a receiver that lost its state, or a part of it.
    point_fits = opened.point > number
    if opened.parent != number or not point_fits or not parent_fits:
        raise PushRefusedHereError(
            "wrong-parent",
            f"the newest point here is {number}, the push makes {opened.point} on {opened.parent}"
            + ("" if parent_fits else " with another content"),
        )
    return [_expect(vm, paths, opened, index) for index in range(len(opened.disks))]


def _expect(vm: ProtectedVm, paths: VmPaths, opened: Open, index: int) -> Expected:
    disk = opened.disks[index]
    if any(disk.disk == other.disk for other in opened.disks[:index]):
        raise PushRefusedHereError("bad-request", f"{disk.disk} stands twice in the push")
    if disk.since == opened.point:
        return Expected(opened, disk, bytes(32), None, None)
    old = vm.newest.disk(disk.disk) if vm.newest else None
    if opened.kind is PushKind.SEED or old is None or old.since != disk.since:
        raise PushRefusedHereError("wrong-parent", f"{disk.disk}: its chain is not the one here")
    if disk.size < old.size:
        raise PushRefusedHereError(
            "shrink",
            f"{disk.disk} shrank from {old.size} to {disk.size} bytes: run replctl seed --again",
        )
    try:
        with ImageMap.open(paths.head_map(old)) as head:
            return Expected(opened, disk, old.root, head.grain, int(head.algorithm))
    except (DamageError, StateError) as error:
        raise no_base(error) from error


def no_base(error: Exception) -> PushRefusedHereError:
    """A cycle cannot be checked against the newest point: the source has to send everything.

    What is wrong is for this side's log: it names a path.
    """
    _logger.error("%s", error)
    return PushRefusedHereError(
        "root-mismatch",
        "the map of the newest point is lost or damaged, no cycle can build on it; run replctl seed --again",
    )


def new_disks(paths: VmPaths, landing: Landing) -> list[PointDisk]:
    """What each disk would be: its root out of the head map and the delta, nothing written. Blocks."""
    result: list[PointDisk] = []
    for disk, landed in zip(landing.opened.disks, landing.disks, strict=True):
        delta = StoredDelta(landed.path)
        try:
            if disk.since == landing.opened.point:
                header = delta.header
                builder = RootBuilder(header.algorithm, header.grain, disk.size)
                for run in delta.runs():
                    builder.add(run.first, run.digests, run.count)
                root = builder.root()
            else:
                shell = PointDisk(disk.disk, disk.identity, disk.size, b"", disk.since)
                with ImageMap.open(paths.head_map(shell)) as head:
                    root = head.preview(delta.runs(), disk.size)
        finally:
            delta.close()
        result.append(PointDisk(disk.disk, disk.identity, disk.size, root, disk.since))
    return result


def new_point(landing: Landing, finish: Finish, disks: list[PointDisk], now_us: int) -> Point:
    """The point that a landed push makes. Raises PushRefusedHereError if the source has come to another content."""
    opened = landing.opened
    for disk, final in zip(disks, finish.disks, strict=True):
        if disk.root != final.root:
            raise PushRefusedHereError(
                "root-mismatch", f"{disk.disk}: the two sides would have different content"
            )
    root = vm_root([(disk.disk, disk.size, disk.root) for disk in disks])
    if root != finish.root:
        raise PushRefusedHereError("root-mismatch", "the two sides would have different disks")
    return Point(
        number=opened.point,
        parent=opened.parent,
        push_id=opened.push_id,
        kind=opened.kind,
        epoch=opened.epoch,
        taken_at_us=opened.taken_at_us,
        committed_at_us=now_us,
        duration_us=finish.duration_us,
        bytes_pushed=sum(disk.received for disk in landing.disks),
        root=root,
        disks=tuple(disks),
        sampled=finish.sampled,
        compared=finish.compared,
    )
