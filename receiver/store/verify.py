# SPDX-License-Identifier: AGPL-3.0-or-later
"""Reading a recovery point in full and holding it against what was recorded.

Every grain is read and digested; the digests build the disk's root, and are compared with those stored beside the data,
so that damage is located to the grain and the file. If the root is the recorded one, the content is right, whatever a map says.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from receiver.store.view import PointView
from receiver.store.vm_store import VmStore
from replicator.disk import Extent, split, widen
from replicator.domain.model import Damage, Point, PointDisk
from replicator.errors import DamageError, PhcbtError, StateError
from replicator.imagemap import ImageMap, RootBuilder
from replicator.phcbt.format import Algorithm

#: Findings kept per run; beyond that a disk is simply bad.
FINDINGS_MAX = 1000
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What a verification found. ``bytes_read`` counts plain bytes; holes are known to be zeros."""

    point: int
    bytes_read: int
    damages: list[Damage]
    map_faults: list[str]

    @property
    def good(self) -> bool:
        """Whether the point reads back as it was recorded."""
        return not self.damages


async def verify_point(
    store: VmStore, number: int | None, progress: Callable[[int, int], None] = lambda _d, _t: None
) -> VerifyResult:
    """Verify one point, and record the outcome as an event. Cancellation leaves no trace.

    ``progress`` is called with bytes done and in all (disk sizes). Raises RefusedError if the point is not kept.
    """
    async with store.hold(number) as point:
        total = sum(disk.size for disk in point.disks)
        done = read = 0
        damages: list[Damage] = []
        faults: list[str] = []
        for disk in point.disks:
            check = _DiskCheck(store, point, disk, partial(_report, progress, done, total))
            try:
                await check.run()
            except DamageError as error:
                damages.append(Damage(point.number, disk.disk, 0, disk.size, "", str(error)))
            damages += check.damages
            faults += check.map_faults
            read += check.bytes_read
            done += disk.size
    async with store.changing() as vm:
        for damage in damages[:FINDINGS_MAX]:
            vm.damaged(damage)
        if not damages:
            vm.point_verified(point.number, read)
    return VerifyResult(point.number, read, damages, faults)


def _report(progress: Callable[[int, int], None], before: int, total: int, at: int) -> None:
    progress(before + at, total)


class _DiskCheck:
    def __init__(
        self, store: VmStore, point: Point, disk: PointDisk, progress: Callable[[int], None]
    ) -> None:
        self._store = store
        self._point = point
        self._disk = disk
        self._progress = progress
        self.bytes_read = 0
        self.damages: list[Damage] = []
        self.map_faults: list[str] = []

    async def run(self) -> None:
        """Read the whole disk. Raises DamageError if it cannot be opened at all."""
        async with self._store.open_disk(self._point, self._disk) as view:
            algorithm = view.algorithm
            builder = RootBuilder(algorithm, view.grain, self._disk.size)
            suspects: list[Damage] = []
            async for extent in _chunks(view):
                suspects += await self._check_chunk(view, algorithm, builder, extent)
                self._progress(extent.end)
            self._progress(self._disk.size)
            right = builder.root() == self._disk.root and not self.damages
            if right:
                # The content is what was recorded: a digest that differs is the map's own damage.
                self.map_faults += [
                    f"{d.file}: grain at byte {d.offset}: {d.reason}" for d in suspects
                ]
            else:
                self.damages += suspects
                if not self.damages:
                    await self._find_lost_grains(view)
            await self._check_maps(view)

    async def _check_chunk(
        self, view: PointView, algorithm: Algorithm, builder: RootBuilder, extent: Extent
    ) -> list[Damage]:
        try:
            plain = await view.read(extent.offset, extent.length)
        except (DamageError, PhcbtError, OSError) as error:
            return await self._check_grains(view, extent, error)
        self.bytes_read += len(plain)
        return await trio.to_thread.run_sync(
            self._compare, view, algorithm, builder, extent.offset, plain
        )

    def _compare(
        self, view: PointView, algorithm: Algorithm, builder: RootBuilder, offset: int, plain: bytes
    ) -> list[Damage]:
        digests = algorithm.digest_grains(plain, view.grain)
        first, size = offset // view.grain, algorithm.digest_size
        builder.add(first, digests, len(digests) // size)
        found: list[Damage] = []
        for index in range(len(digests) // size):
            expected, file = view.digest(first + index)
            if (expected or bytes(size)) != digests[index * size : (index + 1) * size]:
                name = str(file.relative_to(self._store.paths.root)) if file.name else "(zeros)"
                at = (first + index) * view.grain
                length = min(view.grain, self._disk.size - at)
                found.append(self._damage(at, length, name, "the content does not have its digest"))
        return found

    async def _check_grains(
        self, view: PointView, extent: Extent, error: Exception
    ) -> list[Damage]:
        """A chunk that cannot be read as a whole, grain by grain: only what is damaged is named."""
        for piece in split([extent], view.grain):
            try:
                await view.read(piece.offset, piece.length)
            except (DamageError, PhcbtError, OSError) as cause:
                file = await trio.to_thread.run_sync(view.holder, piece.offset // view.grain)
                name = str(file.relative_to(self._store.paths.root)) if file.name else "?"
                self.damages.append(self._damage(piece.offset, piece.length, name, str(cause)))
        if not self.damages:
            self.damages.append(self._damage(extent.offset, extent.length, "?", str(error)))
        return []

    async def _find_lost_grains(self, view: PointView) -> None:
        """The root is wrong and no grain that was read differs: grains that read as zeros are recorded otherwise."""
        damage = await trio.to_thread.run_sync(self._lost_grain, view)
        self.damages.append(damage)

    def _lost_grain(self, view: PointView) -> Damage:
        digests = view.replica.map if view.replica is not None else None
        if digests is not None:
            size = digests.algorithm.digest_size
            for run in digests.iter_nonzero_runs():
                for grain in range(run.first, run.first + run.count):
                    at = grain * view.grain
                    if at >= self._disk.size:
                        break
                    length = min(view.grain, self._disk.size - at)
                    expected, file = view.digest(grain)
                    if any(expected) and not any(view.read_blocking(at, length)):
                        name = str(file.relative_to(self._store.paths.root))
                        return self._damage(
                            at, length, name, f"zeros instead of content ({size * 8} bit digest)"
                        )
        return self._damage(0, self._disk.size, "?", "the disk does not have the recorded root")

    async def _check_maps(self, view: PointView) -> None:
        """The trees beside the replica and of the newest point, node by node."""
        paths = [self._store.paths.head_map(self._disk)] if self._is_newest() else []
        if view.replica is not None:
            paths.append(self._store.paths.replica_map(self._disk))
        for path in paths:
            for fault in await trio.to_thread.run_sync(_map_faults, path):
                self.map_faults.append(f"{path.relative_to(self._store.paths.root)}: {fault}")

    def _is_newest(self) -> bool:
        newest = self._store.vm.newest
        return newest is not None and newest.number == self._point.number

    def _damage(self, offset: int, length: int, file: str, reason: str) -> Damage:
        return Damage(self._point.number, self._disk.disk, offset, length, file, reason)


def _map_faults(path: Path) -> list[str]:
    try:
        digests = ImageMap.open(path)
    except (DamageError, StateError, OSError) as error:
        return [str(error)]
    try:
        return [str(finding) for finding in digests.check()]
    finally:
        digests.close()


async def _chunks(view: PointView) -> AsyncIterator[Extent]:
    """The view's extents in whole grains, cut at chunk borders."""
    at = 0
    async for extent in view.extents():
        for wide in widen([extent], view.grain, view.size):
            start = max(wide.offset, at)
            if start < wide.end:
                for piece in split([Extent(start, wide.end - start)], _CHUNK):
                    yield piece
                at = wide.end
