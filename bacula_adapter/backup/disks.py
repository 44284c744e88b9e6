# SPDX-License-Identifier: AGPL-3.0-or-later
"""One disk of a backup: read ahead until its turn comes, then written out as an image or as a delta, with its new map."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, aclosing, closing
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import trio

from bacula_adapter.backend.interface import BackupOutput, FileEntry
from bacula_adapter.backup.base import DiskPlan, Way
from bacula_adapter.backup.maps import ChainMaps, MapFeed
from bacula_adapter.backup.reading import GROUP, Lookahead, PieceReader, data_runs
from bacula_adapter.description import PartDisk
from bacula_adapter.names import VirtualName
from replicator.disk import Extent
from replicator.imagemap import ImageMap
from replicator.phcbt.encode import StreamWriter
from replicator.phcbt.format import Algorithm, EncodedRecord, GrainRun, StreamHeader
from replicator.push.compression import Compression
from replicator.push.differing import Differing
from replicator.push.files import GRAIN
from replicator.push.pipeline import Encoder, chunks, chunks_of, chunks_to_compare, grouped, ordered

#: Pieces of a stream that are larger are handed on as they are; smaller ones are gathered first.
_LARGE: Final = 32 << 10
_GATHERED: Final = 128 << 10

#: Returns when it is the disk's turn to be written out.
Turn = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartShape:
    """What the disks of a part have in common. ``base``: number and id of the part that deltas start from; ``last``: the id of the
    newest part, whose snapshot is the ``reference``.

    ``root`` and ``folder``: the first two components of names. Sizes in bytes.
    """

    root: str
    folder: str
    uuid: UUID
    number: int
    part: str
    base: tuple[int, str] | None
    last: str | None
    reference: str | None
    algorithm: Algorithm
    chunk: int
    mtime_s: int

    def file(self, disk: str, *, full: bool) -> str:
        """What a disk's file is called."""
        if full:
            return str(VirtualName(self.root, self.folder, "raw", disk))
        return str(VirtualName(self.root, self.folder, "delta", disk, self.number, self.part))


@dataclass(frozen=True, slots=True)
class DiskBackup:
    """The backup of one disk. ``run`` reads ahead as far as it may, and writes when ``turn`` says so."""

    shape: PartShape
    plan: DiskPlan
    maps: ChainMaps
    cpus: trio.CapacityLimiter
    turn: Turn

    async def run(self, output: BackupOutput) -> PartDisk:
        """Read the disk and write it out; what it is in this part. Raises what the view, the maps and the output raise."""
        if self.plan.way is Way.FULL:
            return await self._full(output)
        return await self._delta(output)

    def _header(self) -> StreamHeader:
        shape, plan = self.shape, self.plan
        base = plan.base
        return StreamHeader(
            algorithm=shape.algorithm,
            grain=GRAIN,
            chunk=max(shape.chunk, GRAIN),
            disk_size=plan.view.size,
            vm=shape.uuid,
            base_point=0 if base is None or shape.base is None else shape.base[0],
            target_point=shape.number,
            base_root=bytes(32) if base is None else base.root,
            disk_id=plan.disk,
        )

    # An image

    async def _full(self, output: BackupOutput) -> PartDisk:
        shape, plan, header = self.shape, self.plan, self._header()
        reader = PieceReader(plan.view, header, self.cpus)
        ahead = Lookahead(reader.group * header.chunk)
        todo = grouped(chunks(plan.view, header, None, 0), reader.group)
        name, stored = shape.file(plan.disk, full=True), 0
        image = await trio.to_thread.run_sync(
            self.maps.create, shape.part, plan.disk, shape.algorithm, GRAIN, plan.view.size
        )
        with closing(MapFeed(image, plan.view.size, shape.number)) as feed:
            async with ordered(todo, reader.read, ahead.room) as results:
                await self.turn()
                ahead.now()
                entry = FileEntry(
                    name=name, size=plan.view.size, mtime_s=shape.mtime_s, addressed=True
                )
                await output.begin(entry)
                async for group in results:
                    for piece in group:
                        for offset, data in data_runs(piece, GRAIN, header.digest_size):
                            await output.data(offset, data)
                            stored += len(data)
                        first, count = piece.extent.offset // GRAIN, len(piece.digests)
                        run = GrainRun(first, count // header.digest_size, piece.digests)
                        await feed.put(run)
                        reader.done(piece)
                await output.end()
            root = await feed.finish()
        return PartDisk(
            disk=plan.disk,
            identity=plan.identity,
            size=plan.view.size,
            kind="full",
            file=name,
            root=root,
            bytes=stored,
        )

    # A delta

    async def _delta(self, output: BackupOutput) -> PartDisk:
        shape, plan, header = self.shape, self.plan, self._header()
        assert plan.base is not None
        assert shape.base is not None
        name = shape.file(plan.disk, full=False)
        with ExitStack() as stack:
            known, feed, between = await trio.to_thread.run_sync(self._open_maps, stack)
            encoder = Encoder(
                plan.view,
                header,
                Compression.of("off", workers=1, clock=trio.current_time),
                known,
                self.cpus,
            )
            group = encoder.group_of(max(1, GROUP // header.chunk))
            ahead = Lookahead(group * header.chunk)
            todo = grouped(self._todo(header, known, between), group)
            stream = _Stream(output, header)
            async with ordered(todo, encoder.encode, ahead.room) as results:
                await self.turn()
                ahead.now()
                await output.begin(FileEntry(name=name, size=0, mtime_s=shape.mtime_s))
                await stream.start()
                async for made in results:
                    for encoded in made:
                        for record in encoded.records:
                            await stream.add(record)
                            await feed.put(_run(record, header))
                        encoder.sent(encoded)
                await stream.finish()
                await output.end()
            root = await feed.finish()
        return PartDisk(
            disk=plan.disk,
            identity=plan.identity,
            size=plan.view.size,
            kind="delta",
            file=name,
            root=root,
            base_root=plan.base.root,
            bytes=stream.position,
        )

    def _open_maps(self, stack: ExitStack) -> tuple[ImageMap, MapFeed, Differing | None]:
        """The base's map, the new one, and where the last part differs from the base. Blocks."""
        shape, plan, maps = self.shape, self.plan, self.maps
        assert shape.base is not None
        base = shape.base[1]
        between = None
        if plan.between is not None:
            assert shape.last is not None
            paths = maps.path(base, plan.disk), maps.path(shape.last, plan.disk)
            between = stack.enter_context(Differing(*paths))
        known = stack.enter_context(ImageMap.open(maps.path(base, plan.disk)))
        image = maps.copy(base, shape.part, plan.disk)
        feed = stack.enter_context(closing(MapFeed(image, plan.view.size, shape.number)))
        return known, feed, between

    def _todo(
        self, header: StreamHeader, known: ImageMap, between: Differing | None
    ) -> AsyncGenerator[Extent, None]:
        """The chunks that are to be looked at."""
        view = self.plan.view
        if self.plan.way is Way.COMPARE:
            return chunks_to_compare(view, header, known, 0)
        changes = chunks(view, header, self.shape.reference, 0)
        if between is None:
            return changes
        return merged(changes, chunks_of(between(), header, view.size, 0))


async def merged(
    first: AsyncGenerator[Extent, None], second: AsyncGenerator[Extent, None]
) -> AsyncGenerator[Extent, None]:
    """Two ascending rows of extents as one, disjoint; where they overlap, ``first`` says what is zeros."""
    async with aclosing(first), aclosing(second):
        one, other = await _next(first), await _next(second)
        while one is not None or other is not None:
            if other is None or (one is not None and one.offset <= other.offset):
                assert one is not None
                yield one
                other = await _after(one.end, other, second)
                one = await _next(first)
                continue
            end = other.end if one is None else min(other.end, one.offset)
            yield Extent(other.offset, end - other.offset, other.zero)
            other = await _after(end, other, second)


async def _next(extents: AsyncIterator[Extent]) -> Extent | None:
    return await anext(extents, None)


async def _after(end: int, extent: Extent | None, more: AsyncIterator[Extent]) -> Extent | None:
    """What is left of ``extent``, and of those that follow, from byte ``end`` on."""
    while extent is not None and extent.end <= end:
        extent = await _next(more)
    if extent is None or extent.offset >= end:
        return extent
    return Extent(end, extent.end - end, extent.zero)


def _run(record: EncodedRecord, header: StreamHeader) -> GrainRun:
    count = header.grains(record.length)
    return GrainRun(record.offset // header.grain, count, record.digests or None)


class _Stream:
    """Hands a delta's stream to Bacula in pieces that are worth their way."""

    def __init__(self, output: BackupOutput, header: StreamHeader) -> None:
        self._output = output
        self._writer = StreamWriter(header)
        self._gathered = bytearray()
        self.position = 0

    async def start(self) -> None:
        self._gathered += self._writer.start()

    async def add(self, record: EncodedRecord) -> None:
        for piece in self._writer.add(record):
            if len(piece) > _LARGE:
                await self._flush()
                await self._write(piece)
            else:
                self._gathered += piece
        if len(self._gathered) >= _GATHERED:
            await self._flush()

    async def finish(self) -> None:
        self._gathered += self._writer.finish()
        await self._flush()

    async def _flush(self) -> None:
        if self._gathered:
            gathered, self._gathered = self._gathered, bytearray()
            await self._write(gathered)

    async def _write(self, data: bytes | bytearray | memoryview) -> None:
        await self._output.data(self.position, data)
        self.position += len(data)


__all__ = ["DiskBackup", "PartShape", "Turn", "merged"]
