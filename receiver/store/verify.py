# SPDX-License-Identifier: AGPL-3.0-or-later
"""Reading a recovery point in full and holding it against what was recorded.

Every grain is read and digested, and the digests make the disk's root. If that is the recorded root the content is right,
whatever a map or an index says: what differs there is a fault of that file, and a map is made again. If it is not, the
grains that differ from what is recorded beside the data are the damage.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import trio

from receiver.store.maps import map_faults
from receiver.store.view import PointView
from receiver.store.vm_store import VmStore
from replicator.disk import Extent, split
from replicator.domain.model import Damage, Point, PointDisk
from replicator.errors import DamageError, PhcbtError
from replicator.imagemap import ImageMap, RootBuilder
from replicator.phcbt.read import StoredDelta
from replicator.phcbt.verify import Finding

#: Findings kept of a disk; the last one then stands for the rest of it.
FINDINGS_MAX = 100
#: Bytes read at once: a multiple of every grain.
_WINDOW = 1 << 20
_UNREADABLE = (DamageError, PhcbtError, OSError)


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What a verification found. ``bytes_read`` counts plain bytes; what no file holds is known to be zeros.

    ``damages`` is where the content is not what was recorded. ``map_faults`` is damage that costs no content: in maps, and
    in the indexes of deltas.
    """

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
        result = VerifyResult(point.number, 0, [], [])
        done = 0
        for disk in point.disks:
            found = await _verify_disk(store, point, disk, partial(_report, progress, done, total))
            result = replace(
                result,
                bytes_read=result.bytes_read + found.bytes_read,
                damages=result.damages + found.damages,
                map_faults=result.map_faults + found.map_faults,
            )
            done += disk.size
        await store.report_shared_damage(result.damages)
        if result.good:
            async with store.changing() as vm:
                vm.point_verified(point.number, result.bytes_read)
    return result


def _report(progress: Callable[[int, int], None], before: int, total: int, at: int) -> None:
    progress(before + at, total)


async def _verify_disk(
    store: VmStore, point: Point, disk: PointDisk, progress: Callable[[int], None]
) -> VerifyResult:
    try:
        async with store.open_disk(point, disk) as view:
            check = _DiskCheck(store.paths.root, point, disk, view)
            await check.read_all(progress)
            await check.read_structure()
            replica_map = view.replica.map_path if view.replica is not None else None
    except DamageError as error:
        damage = Damage(point.number, disk.disk, 0, disk.size, "", str(error))
        return VerifyResult(point.number, 0, [damage], [])
    async with store.still():
        newest = store.vm.newest
        paths = [replica_map] if replica_map is not None else []
        if newest is not None and newest.number == point.number:
            paths.append(store.paths.head_map(disk))
        for path in paths:
            name = path.relative_to(store.paths.root)
            check.faults += [
                f"{name}: {fault}" for fault in await trio.to_thread.run_sync(map_faults, path)
            ]
    if check.faults and not check.damages:
        await store.remake_maps(point, disk)
    return VerifyResult(point.number, check.bytes_read, check.damages, check.faults)


class _DiskCheck:
    """One disk of one point: its content, then the structure of what holds it."""

    def __init__(self, root: Path, point: Point, disk: PointDisk, view: PointView) -> None:
        self._root = root
        self._point = point
        self._disk = disk
        self._view = view
        self._builder = RootBuilder(view.algorithm, view.grain, disk.size)
        self._suspects: list[Damage] = []
        self.bytes_read = 0
        self.damages: list[Damage] = []
        self.faults: list[str] = []

    async def read_all(self, progress: Callable[[int], None]) -> None:
        """Read the whole disk, and decide what is damaged."""
        reached = 0
        try:
            async for window in _windows(self._view):
                await self._check(window)
                reached = window.end
                progress(reached)
        except _UNREADABLE as error:
            # Not even what the files hold can be told from here on.
            self._add(self.damages, reached, self._disk.size - reached, "", str(error))
        progress(self._disk.size)
        if not self.damages and self._builder.root() == self._disk.root:
            self.faults += [
                f"{_map_name(d.file)}: the digest of {d.length} bytes at {d.offset} is wrong"
                for d in self._suspects
            ]
            return
        for suspect in self._suspects:
            self._add(
                self.damages, suspect.offset, suspect.length, suspect.file, "not what was recorded"
            )
        if not self.damages:
            reason = "the disk does not have the recorded root"
            self._add(self.damages, 0, self._disk.size, "", reason)

    async def _check(self, window: Extent) -> None:
        try:
            await self._check_piece(window)
        except _UNREADABLE:
            # Grain by grain, so that only what is damaged is named.
            for piece in split([window], self._view.grain):
                try:
                    await self._check_piece(piece)
                except _UNREADABLE as error:
                    file = await trio.to_thread.run_sync(self._holder, piece.offset)
                    self._add(self.damages, piece.offset, piece.length, file, _reason(error))

    async def _check_piece(self, piece: Extent) -> None:
        grain = self._view.grain
        digests, differing = await self._view.digest(piece.offset, piece.length)
        first, count = piece.offset // grain, -(-piece.length // grain)
        await trio.to_thread.run_sync(self._builder.add, first, digests, count)
        self.bytes_read += piece.length
        for number in differing:
            assert self._view.replica is not None
            file = self._name(self._view.replica.path)
            length = min(grain, self._disk.size - number * grain)
            self._add(self._suspects, number * grain, length, file, "differs from its digest")

    async def read_structure(self) -> None:
        """Heads and indexes of every delta, of which reading the content needs only a part."""
        for delta in list(self._view.stack):
            for finding in await trio.to_thread.run_sync(_structure, delta):
                await trio.to_thread.run_sync(self._judge, delta, finding)

    def _judge(self, delta: StoredDelta, finding: Finding) -> None:
        """Damage where this point's content comes from the record; otherwise the file's own."""
        file = self._name(Path(delta.path))
        at, end = finding.disk_offset, (finding.disk_offset or 0) + finding.length
        if at is not None:
            if any(d.offset < end and at < d.offset + d.length for d in self.damages):
                return
            grains = range(at // self._view.grain, -(-end // self._view.grain))
            if any(self._holder(grain * self._view.grain) == file for grain in grains):
                self._add(self.damages, at, finding.length, file, finding.reason)
                return
        self.faults.append(f"{file}: at byte {finding.stream_offset}: {finding.reason}")

    def _holder(self, offset: int) -> str:
        try:
            return self._name(self._view.holder(offset // self._view.grain))
        except _UNREADABLE:
            return ""  # what would say so is what is damaged

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._root)) if path.name else ""

    def _add(self, to: list[Damage], offset: int, length: int, file: str, reason: str) -> None:
        """Add a finding; neighbours of one kind are one, and the last that fits stands for all that follow."""
        last = to[-1] if to else None
        if last is not None and len(to) >= FINDINGS_MAX:
            reason = "many grains are damaged from here on"
            to[-1] = msgspec.structs.replace(
                last, length=self._disk.size - last.offset, reason=reason
            )
        elif (
            last is not None
            and (last.file, last.reason) == (file, reason)
            and last.offset + last.length == offset
        ):
            to[-1] = msgspec.structs.replace(last, length=last.length + length)
        else:
            to.append(Damage(self._point.number, self._disk.disk, offset, length, file, reason))


def _map_name(replica: str) -> str:
    return replica.removesuffix(".raw") + ".map"


def _reason(error: Exception) -> str:
    return error.reason if isinstance(error, PhcbtError) else str(error)


def _structure(delta: StoredDelta) -> list[Finding]:
    """What is damaged in a delta's heads, digests and indexes. Payloads are verified by reading the content."""
    try:
        for _ in delta.runs():
            pass
        if delta.index_damage is None:
            return []
        return list(delta.verify())
    except PhcbtError:
        return list(delta.verify())


async def _windows(view: PointView) -> AsyncIterator[Extent]:
    """Ascending windows of the disk that hold anything, by the files or by the map of what they held once."""
    digests = view.replica.map if view.replica is not None else None
    recorded = _recorded(digests) if digests is not None else iter(())
    ahead = next(recorded, None)
    at = -1
    async for extent in view.extents():
        for window in range(extent.offset // _WINDOW, (extent.end - 1) // _WINDOW + 1):
            while ahead is not None and ahead < window:
                if ahead > at:
                    at = ahead
                    yield _window(at, view.size)
                ahead = next(recorded, None)
            if window > at:
                at = window
                yield _window(at, view.size)
    while ahead is not None:
        if ahead > at and ahead * _WINDOW < view.size:
            at = ahead
            yield _window(at, view.size)
        ahead = next(recorded, None)


def _window(number: int, size: int) -> Extent:
    return Extent(number * _WINDOW, min(_WINDOW, size - number * _WINDOW))


def _recorded(digests: ImageMap) -> Iterator[int]:
    """The windows in which the map has a grain that is not zeros, ascending, some more than once."""
    for run in digests.iter_nonzero_runs():
        first = run.first * digests.grain
        end = first + run.count * digests.grain
        yield from range(first // _WINDOW, (end - 1) // _WINDOW + 1)


__all__ = ["FINDINGS_MAX", "VerifyResult", "verify_point"]
