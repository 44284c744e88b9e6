# SPDX-License-Identifier: AGPL-3.0-or-later
"""Reading a disk and encoding what is to be sent: ahead of the line, in order, with bounded memory."""

from __future__ import annotations

import math
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
)
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

import trio

from replicator.disk import DiskView, Extent, ReadsNow, split, widen
from replicator.imagemap import ImageMap
from replicator.nursery import flat_nursery
from replicator.phcbt.encode import encode_chunk, zero_record
from replicator.phcbt.format import Codec, EncodedRecord, StreamHeader
from replicator.push.compression import Compression
from replicator.wire.buffers import Buffers

T = TypeVar("T")
R = TypeVar("R")

#: Groups of chunks being read or encoded at once. With the chunk size and the group it bounds a push's memory.
DEPTH = 6
#: Chunks that one thread reads and encodes before it hands them on: to go to a thread and back costs as much as a chunk.
GROUP = 3
#: Extents looked at together before they are widened to grains.
_BATCH = 1024


#: To digest so much, unpacked, takes less time than to give it to another thread.
_INLINE_MAX = 256 << 10
#: Records that need less than this part of a chunk's buffer are copied out of it, so that few buffers wait to be sent.
_WORTH_KEEPING = 4


class _Slot(Generic[R]):
    __slots__ = ("ready", "result")

    def __init__(self) -> None:
        self.ready = trio.Event()
        self.result: R | None = None


@asynccontextmanager
async def ordered(
    items: AsyncGenerator[T, None], work: Callable[[T], Awaitable[R]], depth: int | trio.Semaphore
) -> AsyncIterator[AsyncIterator[R]]:
    """Results of ``work`` in the order of ``items``, up to ``depth`` of them being made at once; a semaphore may be given more
    places while it goes on.

    An error in one ends all; leaving the block early cancels what is under way. ``items`` is closed in any case.
    """
    send, receive = trio.open_memory_channel[_Slot[R]](math.inf)
    room = depth if isinstance(depth, trio.Semaphore) else trio.Semaphore(depth)

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


async def grouped(
    extents: AsyncGenerator[Extent, None], count: int
) -> AsyncGenerator[list[Extent], None]:
    """The extents in groups of ``count``; the last may be smaller."""
    group: list[Extent] = []
    async with aclosing(extents):
        async for extent in extents:
            group.append(extent)
            if len(group) == count:
                yield group
                group = []
    if group:
        yield group


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


async def chunks_of(
    extents: AsyncIterable[Extent], header: StreamHeader, size: int, start: int
) -> AsyncGenerator[Extent, None]:
    """These ascending extents from byte ``start`` on: whole grains, cut at chunk borders."""
    async for extent in extents:
        for piece in _from(widen([extent], header.grain, size), start, header.chunk):
            yield piece


def _own(record: EncodedRecord) -> EncodedRecord:
    """The record with a payload of its own."""
    return (
        record
        if isinstance(record.payload, bytes)
        else replace(record, payload=bytes(record.payload))
    )


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


@dataclass(slots=True)
class Encoded:
    """A chunk's records, up to disk byte ``end``; ``buffer`` holds the bytes of those that are not compressed. ``seconds``:
    what it took to encode them.
    """

    end: int
    records: list[EncodedRecord]
    buffer: memoryview | None = None
    seconds: float = 0.0


class Encoder:
    """Makes the records of one disk; ``known`` is given when changes must be found by comparing."""

    def __init__(
        self,
        view: DiskView,
        header: StreamHeader,
        compression: Compression,
        known: ImageMap | None,
        cpus: trio.CapacityLimiter,
    ) -> None:
        self._view = view
        self._reads_now = view if isinstance(view, ReadsNow) else None
        self._header = header
        self._compression = compression
        self._known = known
        self._cpus = cpus
        self._buffers = Buffers(header.chunk)

    def group_of(self, most: int) -> int:
        """How many chunks to give to ``encode`` together, at most ``most``: many where one thread reads and encodes them, else
        one, so that many reads are under way.
        """
        return most if self._reads_now is not None else 1

    async def encode(self, extents: list[Extent]) -> list[Encoded]:
        """The records of some chunks; none of one in which nothing changed."""
        if self._reads_now is None:
            return [await self._encode_one(extent) for extent in extents]
        work = [(extent, self._compression.next_level()) for extent in extents]
        read = partial(self._read_all, self._reads_now, work)
        found = await trio.to_thread.run_sync(read, limiter=self._cpus)
        for (_, level), encoded in zip(work, found, strict=True):
            self._note(level, encoded)
        return found

    def _read_all(self, view: ReadsNow, work: list[tuple[Extent, int | None]]) -> list[Encoded]:
        return [
            Encoded(extent.end, self._zeros(extent))
            if extent.zero
            else self._read_and_encode(view, extent, level)
            for extent, level in work
        ]

    async def _encode_one(self, extent: Extent) -> Encoded:
        if extent.zero:
            return Encoded(extent.end, self._zeros(extent))
        level = self._compression.next_level()
        plain = await self._view.read(extent.offset, extent.length)
        if level is None and extent.length <= _INLINE_MAX:
            encoded = self._encode(extent, plain, level)
        else:
            work = partial(self._encode, extent, plain, level)
            encoded = await trio.to_thread.run_sync(work, limiter=self._cpus)
        self._note(level, encoded)
        return encoded

    def _note(self, level: int | None, encoded: Encoded) -> None:
        data = [record for record in encoded.records if not record.is_zero]
        payload = sum(len(record.payload) for record in data)
        self._compression.packed(level, sum(r.length for r in data), payload, encoded.seconds)

    def sent(self, encoded: Encoded) -> None:
        """Nothing of it is needed any more."""
        if encoded.buffer is not None:
            self._buffers.give(encoded.buffer)

    def _read_and_encode(self, view: ReadsNow, extent: Extent, level: int | None) -> Encoded:
        buffer = self._buffers.take()
        view.read_now(extent.offset, buffer[: extent.length])
        plain = buffer.obj
        assert isinstance(plain, bytearray)
        encoded = self._encode(extent, plain, level)
        kept = [r for r in encoded.records if r.payload and r.head.codec is Codec.NONE]
        if sum(len(record.payload) for record in kept) <= len(buffer) // _WORTH_KEEPING:
            encoded.records = [_own(record) for record in encoded.records]
            self._buffers.give(buffer)
        else:
            encoded.buffer = buffer
        return encoded

    def _zeros(self, extent: Extent) -> list[EncodedRecord]:
        # Without a base everything is zeros to begin with.
        if self._header.is_full:
            return []
        return [zero_record(self._header, extent.offset, extent.length)]

    def _encode(self, extent: Extent, plain: bytes | bytearray, level: int | None) -> Encoded:
        records: list[EncodedRecord] = []
        offset, started = extent.offset, time.perf_counter()
        for begin, end in self._changed(offset, memoryview(plain)[: extent.length]):
            records += encode_chunk(self._header, offset, plain, level, start=begin, end=end)
        if self._header.is_full:
            records = [record for record in records if not record.is_zero]
        return Encoded(extent.end, records, seconds=time.perf_counter() - started)

    def _changed(self, offset: int, plain: memoryview) -> list[tuple[int, int]]:
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
