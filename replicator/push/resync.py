# SPDX-License-Identifier: AGPL-3.0-or-later
"""Comparing all disks of a snapshot with the receiver's newest point, whatever this side knows of it (docs/wire.md, 4.9).

Each disk is read once, and a map of its digests made; then the receiver's map is walked down from its top, only where the
two differ. What comes out is this side's map of the receiver's point, as if nothing had been lost. Every page that the
receiver sends must fit the node above it, up to the root of the disk, which must fit the root of the point.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import msgspec
import trio

from replicator import durable
from replicator.disk import DiskView, Extent, ReadsNow
from replicator.domain.model import Point, PointDisk
from replicator.errors import WireError
from replicator.imagemap import FANOUT, ImageMap, disk_root, vm_root
from replicator.imagemap.compare import differing_slots
from replicator.imagemap.tree import (
    NODE_SIZE,
    ZERO_NODE,
    grain_count,
    height_of,
    node_of,
    page_size,
    slots_in,
)
from replicator.phcbt.format import Algorithm, GrainRun, StreamHeader
from replicator.push.connection import Connection
from replicator.push.files import PushFiles
from replicator.push.journal import PushEntry
from replicator.push.naming import check_size
from replicator.push.pipeline import DEPTH, chunks, ordered
from replicator.sources.base import Snapshot, SourceDisk
from replicator.wire import messages as m
from replicator.wire.buffers import Buffers

_logger = logging.getLogger(__name__)

#: Digested chunks that go into a map in one go.
_PUT_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Described:
    """The receiver's newest point, and the shape of each disk's map."""

    point: Point
    maps: dict[str, m.DiskMap]

    def pairs(self, snapshot: Snapshot) -> list[tuple[SourceDisk, PointDisk]]:
        """The disks that both have, by identity."""
        there = {disk.identity: disk for disk in self.point.disks}
        return [(disk, there[disk.identity]) for disk in snapshot.disks if disk.identity in there]


async def describe(connection: Connection, vm: UUID, name: str, entry: PushEntry) -> Described:
    """What the receiver has. Raises PeerRefusedError, WireError if it does not fit together, or is not the entry's parent."""
    answer = await connection.ask(m.Describe(str(vm), name), m.Described)
    return check_described(answer, entry.parent, entry.parent_root)


def check_described(answer: m.Described, number: int, root: bytes | None) -> Described:
    """The receiver's answer, if it is one point of which all parts fit. Raises WireError."""
    try:
        content = vm_root([(disk.disk, disk.size, disk.root) for disk in answer.disks])
    except ValueError as error:
        raise WireError(f"the receiver describes a point that cannot be: {error}") from error
    if (answer.number, answer.root) != (number, root) or content != root:
        raise WireError(f"the receiver describes another point than its newest, {number}")
    if len({disk.identity for disk in answer.disks}) != len(answer.disks):
        raise WireError("the receiver describes a point with one disk twice")
    for disk in answer.disks:
        if not 1 <= disk.since <= number or disk.grain & (disk.grain - 1):
            raise WireError(f"the receiver describes {disk.disk} as it cannot be")
    disks = tuple(
        PointDisk(disk.disk, disk.identity, disk.size, disk.root, disk.since)
        for disk in answer.disks
    )
    fields: dict[str, Any] = msgspec.structs.asdict(answer)
    point = Point(**(fields | {"disks": disks}))
    return Described(point, {disk.disk: disk for disk in answer.disks})


class Comparer:
    """Compares the disks of one snapshot in one session. ``report``: what is being read, bytes done, bytes in all."""

    def __init__(
        self,
        connection: Connection,
        files: PushFiles,
        vm: UUID,
        name: str,
        *,
        chunk: int,
        cpus: trio.CapacityLimiter,
        report: Callable[[str, int, int], None],
    ) -> None:
        self._connection = connection
        self._files = files
        self._vm = vm
        self._name = name
        self._chunk = chunk
        self._cpus = cpus
        self._report = report

    async def scan(self, entry: PushEntry, snapshot: Snapshot, there: Described) -> None:
        """Read each disk once, and make its map; the maps are durable on return.

        Raises RefusedError for a disk that shrank, what the views raise, OSError. Can be repeated.
        """
        pairs = there.pairs(snapshot)
        for disk, old in pairs:
            check_size(old, disk.view.size)
        for disk, old in pairs:
            shape = there.maps[old.disk]
            header = StreamHeader(
                algorithm=Algorithm(shape.algorithm),
                grain=shape.grain,
                chunk=max(self._chunk, shape.grain),
                disk_size=disk.view.size,
                vm=self._vm,
                base_point=0,
                target_point=entry.point,
                base_root=bytes(32),
                disk_id=old.disk,
            )
            path = self._files.scan(entry, old)
            await trio.to_thread.run_sync(durable.unlink, path)
            image = await trio.to_thread.run_sync(
                ImageMap.create, path, header.algorithm, header.grain, header.disk_size, 0
            )
            with image:
                await self._scan(image, disk.view, header)

    async def _scan(self, image: ImageMap, view: DiskView, header: StreamHeader) -> None:
        writer = image.write(view.size, 0)
        digester = _Digester(view, header, self._cpus)
        waiting: list[GrainRun] = []

        def put() -> None:
            for run in waiting:
                writer.put(run)

        todo = chunks(view, header, None, 0)
        async with ordered(todo, digester.digest, DEPTH) as results:
            async for end, run in results:
                if run is not None:
                    waiting.append(run)
                if len(waiting) >= _PUT_AT_ONCE:
                    await trio.to_thread.run_sync(put)
                    waiting.clear()
                self._report(header.disk_id, end, view.size)
        await trio.to_thread.run_sync(put)
        await trio.to_thread.run_sync(writer.finish)

    async def fetch(
        self, entry: PushEntry, snapshot: Snapshot, there: Described
    ) -> dict[str, bytes]:
        """Make the maps of the receiver's point out of those that ``scan`` has made, and take them for ours.

        Returns the root that each disk was read to have, by identity. Raises PeerRefusedError, ConnectionLostError, WireError
        for pages that do not fit, DamageError and StateError for our own maps. Can be repeated.
        """
        scans: dict[str, bytes] = {}
        done: list[PointDisk] = []
        for disk, old in there.pairs(snapshot):
            with await trio.to_thread.run_sync(ImageMap.open, self._files.scan(entry, old)) as scan:
                await self._fetch(entry, scan, there.maps[old.disk], there.point)
                scans[disk.identity] = scan.root()
            done.append(old)
        await trio.to_thread.run_sync(self._files.install, entry, done)
        return scans

    async def _fetch(
        self, entry: PushEntry, scan: ImageMap, there: m.DiskMap, point: Point
    ) -> None:
        path = self._files.fresh(
            entry, PointDisk(there.disk, there.identity, there.size, there.root, there.since)
        )
        with await trio.to_thread.run_sync(_copy, scan, path, there.size) as known:
            writer = known.write(there.size, point.number)
            walk = _Walk(self._connection, str(self._vm), self._name, there, scan)
            grains = grain_count(there.size, there.grain)
            width = scan.algorithm.digest_size

            def put(found: Sequence[tuple[int, bytes]]) -> None:
                for index, theirs in found:
                    ours, slots = scan.page(0, index), slots_in(0, index, grains)
                    for first, end in differing_slots(theirs, ours, width, slots):
                        digests = theirs[first * width : end * width]
                        writer.put(GrainRun(index * FANOUT + first, end - first, digests))

            async with aclosing(walk.pages(0)) as leaves:
                async for found in leaves:
                    await trio.to_thread.run_sync(put, found)
            await trio.to_thread.run_sync(writer.finish, there.root)


def _copy(scan: ImageMap, path: durable.StrPath, disk_size: int) -> ImageMap:
    """A new map with the digests of ``scan``, as far as a disk of that size reaches."""
    durable.unlink(path)
    known = ImageMap.create(path, scan.algorithm, scan.grain, disk_size, 0)
    try:
        width = scan.algorithm.digest_size
        writer = known.write(disk_size, 0)
        for run in scan.iter_nonzero_runs():
            count = min(run.count, known.grains - run.first)
            if count <= 0:
                break
            assert run.digests is not None
            writer.put(GrainRun(run.first, count, run.digests[: count * width]))
        writer.finish()
    except BaseException:
        known.close()
        raise
    return known


class _Digester:
    """The digests of one disk's chunks, read and digested by worker threads."""

    def __init__(self, view: DiskView, header: StreamHeader, cpus: trio.CapacityLimiter) -> None:
        self._view = view
        self._reads_now = view if isinstance(view, ReadsNow) else None
        self._header = header
        self._cpus = cpus
        self._buffers = Buffers(header.chunk)

    async def digest(self, extent: Extent) -> tuple[int, GrainRun | None]:
        """Where the chunk ends, and its digests; None for zeros."""
        if extent.zero:
            return extent.end, None
        if self._reads_now is not None:
            run = await trio.to_thread.run_sync(
                self._read, self._reads_now, extent, limiter=self._cpus
            )
        else:
            plain = await self._view.read(extent.offset, extent.length)
            run = await trio.to_thread.run_sync(
                self._digest, extent, memoryview(plain), limiter=self._cpus
            )
        return extent.end, run

    def _read(self, view: ReadsNow, extent: Extent) -> GrainRun:
        buffer = self._buffers.take()
        plain = buffer[: extent.length]
        view.read_now(extent.offset, plain)
        run = self._digest(extent, plain)
        self._buffers.give(buffer)
        return run

    def _digest(self, extent: Extent, plain: memoryview) -> GrainRun:
        header = self._header
        digests = header.algorithm.digest_grains(plain, header.grain)
        return GrainRun(extent.offset // header.grain, len(digests) // header.digest_size, digests)


class _Walk:
    """The pages of the receiver's map that are not as in ours, each proven by the node above it."""

    def __init__(
        self, connection: Connection, vm: str, name: str, there: m.DiskMap, scan: ImageMap
    ) -> None:
        self._connection = connection
        self._vm = vm
        self._name = name
        self._there = there
        self._scan = scan
        self._algorithm = scan.algorithm
        self._grains = grain_count(there.size, there.grain)
        self._height = height_of(self._grains)

    async def pages(self, level: int) -> AsyncGenerator[list[tuple[int, bytes]], None]:
        """Pages of a level in ascending order, with their indexes, in batches; no more than one batch a level is held."""
        scan, there = self._scan, self._there
        if (scan.disk_size, scan.root()) == (there.size, there.root):
            return
        if level + 1 == self._height:
            yield [(0, await self._top())]
            return
        wanted: list[tuple[int, bytes]] = []
        async with aclosing(self.pages(level + 1)) as above:
            async for batch in above:
                for index, page in batch:
                    wanted += await trio.to_thread.run_sync(self._below, level + 1, index, page)
                    while len(wanted) >= m.PAGES_ASKED_MAX:
                        yield await self._ask(level, wanted[: m.PAGES_ASKED_MAX])
                        del wanted[: m.PAGES_ASKED_MAX]
        if wanted:
            yield await self._ask(level, wanted)

    def _below(self, level: int, index: int, page: bytes) -> list[tuple[int, bytes]]:
        """The pages below one whose nodes are not ours, and these nodes."""
        ours = self._scan.page(level, index)
        slots = slots_in(level, index, self._grains)
        return [
            (index * FANOUT + slot, page[slot * NODE_SIZE : (slot + 1) * NODE_SIZE])
            for first, end in differing_slots(page, ours, NODE_SIZE, slots)
            for slot in range(first, end)
        ]

    async def _top(self) -> bytes:
        level = self._height - 1
        (page,) = await self._receive(level, [0])
        there = self._there
        root = disk_root(self._algorithm, there.grain, there.size, node_of(level, page))
        if root != there.root:
            raise self._lie(level, 0)
        return page

    async def _ask(self, level: int, wanted: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        """Pages by index and node; those of zeros need not be asked for."""
        asked = [(index, node) for index, node in wanted if node != ZERO_NODE]
        found = await self._receive(level, [index for index, _ in asked]) if asked else []
        pages = {index: bytes(page_size(self._algorithm, level)) for index, _ in wanted}
        for (index, node), page in zip(asked, found, strict=True):
            if node_of(level, page) != node:
                raise self._lie(level, index)
            pages[index] = page
        return list(pages.items())

    async def _receive(self, level: int, indexes: list[int]) -> list[bytes]:
        """The pages as they come; their content is not proven yet."""
        asked = m.AskPages(
            self._vm, self._name, self._there.disk, self._there.root, level, tuple(indexes)
        )
        size = page_size(self._algorithm, level)
        found: list[bytes] = []
        answer = await self._connection.ask(asked, m.Pages, m.PagesEnd)
        while isinstance(answer, m.Pages):
            found += answer.pages
            if len(found) > len(indexes) or any(len(page) > size for page in answer.pages):
                raise WireError("the receiver sent other pages of a map than those asked for")
            answer = await self._connection.reply(m.Pages, m.PagesEnd)
        if len(found) != len(indexes):
            raise WireError("the receiver sent other pages of a map than those asked for")
        return [page.ljust(size, b"\0") for page in found]

    def _lie(self, level: int, index: int) -> WireError:
        return WireError(
            f"the receiver's map of {self._there.disk} does not fit its root: page {index} of level {level}"
        )


__all__ = ["Comparer", "Described", "check_described", "describe"]
