# SPDX-License-Identifier: AGPL-3.0-or-later
"""Reading a disk and encoding what is to be sent: ahead of the line, in order, with bounded memory."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Generic, TypeVar

import trio

from replicator.disk import DiskView, Extent, split, widen
from replicator.imagemap import ImageMap
from replicator.nursery import flat_nursery
from replicator.phcbt.encode import encode_chunk, zero_record
from replicator.phcbt.format import EncodedRecord, StreamHeader

T = TypeVar("T")
R = TypeVar("R")

#: Chunks being read or encoded at once. With the chunk size it bounds a push's memory.
DEPTH = 6
#: Extents looked at together before they are widened to grains.
_BATCH = 1024


class _Slot(Generic[R]):
    __slots__ = ("ready", "result")

    def __init__(self) -> None:
        self.ready = trio.Event()
        self.result: R | None = None


@asynccontextmanager
async def ordered(
    items: AsyncGenerator[T, None], work: Callable[[T], Awaitable[R]], depth: int
) -> AsyncIterator[AsyncIterator[R]]:
    """Results of ``work`` in the order of ``items``, up to ``depth`` of them being made at once.

    An error in one ends all; leaving the block early cancels what is under way. ``items`` is closed in any case.
    """
    send, receive = trio.open_memory_channel[_Slot[R]](math.inf)
    room = trio.Semaphore(depth)

    async def fill(item: T, slot: _Slot[R]) -> None:
        slot.result = await work(item)
        slot.ready.set()

    async def feed(nursery: trio.Nursery) -> None:
        # Not ``async with``: who reads would take an error for the end while that waits.
        with send:
            async for item in items:
                await room.acquire()
                slot: _Slot[R] = _Slot()
                send.send_nowait(slot)
                nursery.start_soon(fill, item, slot)

    async def results() -> AsyncGenerator[R, None]:
        async for slot in receive:
            await slot.ready.wait()
            result = slot.result
            slot.result = None
            room.release()
            yield result  # type: ignore[misc]

    async with aclosing(items), flat_nursery() as nursery, aclosing(results()) as made:
        nursery.start_soon(feed, nursery)
        yield made
        nursery.cancel_scope.cancel()


async def chunks(
    view: DiskView, header: StreamHeader, since: str | None, start: int
) -> AsyncGenerator[Extent, None]:
    """What a push of this view has to look at from byte ``start`` on: whole grains, cut at chunk borders."""
    grain, batch = header.grain, list[Extent]()
    async with aclosing(view.extents(since)) as extents:
        async for extent in extents:
            # A batch ends where the next extent shares no grain with it.
            if len(batch) >= _BATCH and extent.offset // grain > (batch[-1].end - 1) // grain:
                for piece in _from(widen(batch, grain, view.size), start, header.chunk):
                    yield piece
                batch = []
            batch.append(extent)
    for piece in _from(widen(batch, grain, view.size), start, header.chunk):
        yield piece


def _from(extents: Iterator[Extent], start: int, chunk: int) -> Iterator[Extent]:
    """What of ``extents`` lies at or after ``start``, cut at chunk borders."""
    for extent in split(extents, chunk):
        if extent.end > start:
            begin = max(extent.offset, start)
            yield Extent(begin, extent.end - begin, extent.zero)


async def chunks_to_compare(
    view: DiskView, header: StreamHeader, known: ImageMap, start: int
) -> AsyncGenerator[Extent, None]:
    """Where the disk or its last known state holds anything, at most one extent a chunk.

    What is zero in both is left out; what is asked for beside that only costs a read.
    """
    recorded = _from(_recorded(known, header, start, view.size), start, header.chunk)
    ahead = next(recorded, None)
    hull: Extent | None = None
    async with aclosing(chunks(view, header, None, start)) as found:
        async for extent in found:
            window = extent.offset // header.chunk
            while ahead is not None and ahead.offset // header.chunk <= window:
                whole, hull = _join(hull, ahead, header.chunk)
                if whole is not None:
                    yield whole
                ahead = next(recorded, None)
            whole, hull = _join(hull, extent, header.chunk)
            if whole is not None:
                yield whole
    while ahead is not None:
        whole, hull = _join(hull, ahead, header.chunk)
        if whole is not None:
            yield whole
        ahead = next(recorded, None)
    if hull is not None:
        yield hull


def _join(hull: Extent | None, extent: Extent, chunk: int) -> tuple[Extent | None, Extent]:
    """The hull that is complete now, if any, and the one that goes on."""
    if hull is None or hull.offset // chunk != extent.offset // chunk:
        return hull, Extent(extent.offset, extent.length)
    begin = min(hull.offset, extent.offset)
    return None, Extent(begin, max(hull.end, extent.end) - begin)


def _recorded(known: ImageMap, header: StreamHeader, start: int, size: int) -> Iterator[Extent]:
    for run in known.iter_nonzero_runs(start // header.grain):
        offset = run.first * header.grain
        yield Extent(offset, min(offset + run.count * header.grain, size) - offset)


class Encoder:
    """Makes the records of one disk; ``known`` is given when changes must be found by comparing."""

    def __init__(
        self,
        view: DiskView,
        header: StreamHeader,
        level: int | None,
        known: ImageMap | None,
        cpus: trio.CapacityLimiter,
    ) -> None:
        self._view = view
        self._header = header
        self._level = level
        self._known = known
        self._cpus = cpus

    async def encode(self, extent: Extent) -> list[EncodedRecord]:
        """The records for one chunk; none if nothing in it changed."""
        if extent.zero:
            return self._zeros(extent)
        plain = await self._view.read(extent.offset, extent.length)
        return await trio.to_thread.run_sync(self._encode, extent.offset, plain, limiter=self._cpus)

    def _zeros(self, extent: Extent) -> list[EncodedRecord]:
        # Without a base everything is zeros to begin with.
        if self._header.is_full:
            return []
        return [zero_record(self._header, extent.offset, extent.length)]

    def _encode(self, offset: int, plain: bytes) -> list[EncodedRecord]:
        records: list[EncodedRecord] = []
        for begin, end in self._changed(offset, plain):
            part = plain if end - begin == len(plain) else plain[begin:end]
            records += encode_chunk(self._header, offset + begin, part, self._level)
        if self._header.is_full:
            records = [record for record in records if not record.is_zero]
        return records

    def _changed(self, offset: int, plain: bytes) -> list[tuple[int, int]]:
        """The ranges of ``plain`` that differ from what is known, in whole grains."""
        if self._known is None:
            return [(0, len(plain))]
        header = self._header
        size, grain, first = header.digest_size, header.grain, offset // header.grain
        digests = header.algorithm.digest_grains(plain, grain)
        count = len(digests) // size
        inside = min(count, max(0, self._known.grains - first))
        known = self._known.digests(first, inside) if inside else b""
        known = known.ljust(len(digests), b"\0")
        if known == digests:
            return []
        ranges: list[tuple[int, int]] = []
        for index in range(count):
            if (
                digests[index * size : (index + 1) * size]
                == known[index * size : (index + 1) * size]
            ):
                continue
            begin, end = index * grain, min((index + 1) * grain, len(plain))
            if ranges and ranges[-1][1] == begin:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((begin, end))
        return ranges
