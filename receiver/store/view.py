# SPDX-License-Identifier: AGPL-3.0-or-later
"""A recovery point's disk as a ``DiskView``: the replica under a stack of deltas, forward or reverse.

The first delta in the stack that holds a grain wins; what none holds comes from the replica, or is zero. A view that is
open stays exact while the replica moves on: before a delta is applied, every view that needs the old content gains the
reverse delta at the bottom of its stack, at a moment when no read is under way (``Gate``).
"""

from __future__ import annotations

import errno
import heapq
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from replicator.disk import Extent
from replicator.errors import DamageError, StateError
from replicator.imagemap import ImageMap
from replicator.phcbt.format import Algorithm, Kind, StreamHeader
from replicator.phcbt.read import StoredDelta

#: Ranges asked of the file system at once when looking for data.
_EXTENTS_PER_CALL = 4096


@dataclass(frozen=True, slots=True)
class Shape:
    """How a disk's grains are cut and digested."""

    algorithm: Algorithm
    grain: int

    @classmethod
    def of(cls, header: StreamHeader) -> Shape:
        """As a delta has it."""
        return cls(header.algorithm, header.grain)


class Gate:
    """Reads hold it shared; changing stacks holds it alone, after the reads under way have ended."""

    def __init__(self) -> None:
        self._readers = 0
        self._idle = trio.Event()
        self._idle.set()
        self._open = trio.Event()
        self._open.set()
        self._lock = trio.Lock()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Held by a read."""
        while not self._open.is_set():
            await self._open.wait()
        if self._readers == 0:
            self._idle = trio.Event()
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1
            if self._readers == 0:
                self._idle.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Held while stacks change: new reads wait, and those under way have ended."""
        async with self._lock:
            self._open = trio.Event()
            try:
                await self._idle.wait()
                yield
            finally:
                self._open.set()


class Replica:
    """The replica file of a disk's chain, open for reading, with the map of its digests if that can be used."""

    def __init__(self, path: Path, map_path: Path | None) -> None:
        self.path = path
        self.map_path = map_path
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.map: ImageMap | None = None
        if map_path is not None:
            with suppress(DamageError, StateError):  # content is read without it; verify reports it
                self.map = ImageMap.open(map_path)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes at ``offset``; past the end of the file there are zeros. Blocks."""
        data = os.pread(self.fd, length, offset)
        while len(data) < length:
            more = os.pread(self.fd, length - len(data), offset + len(data))
            if not more:
                return data + bytes(length - len(data))
            data += more
        return data

    def extents(self, start: int, end: int) -> list[Extent]:
        """Up to a bounded number of ranges with data from ``start``. Blocks."""
        found: list[Extent] = []
        at = start
        while at < end and len(found) < _EXTENTS_PER_CALL:
            try:
                begin = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data from here on
                    break
                raise
            if begin >= end:
                break
            stop = min(os.lseek(self.fd, begin, os.SEEK_HOLE), end)
            found.append(Extent(begin, stop - begin))
            at = stop
        return found

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self.fd)
        if self.map is not None:
            self.map.close()


class PointView:
    """One disk of a recovery point. Open until ``close``; reads are cancellable and have no effect."""

    def __init__(
        self,
        size: int,
        shape: Shape,
        stack: list[StoredDelta],
        replica: Replica | None,
        gate: Gate,
    ) -> None:
        self._size = size
        self.algorithm = shape.algorithm
        self.grain = shape.grain
        self.stack = stack
        self.replica = replica
        self._gate = gate
        self._closed = False

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._size

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes. Raises DamageError or PhcbtError where a delta is not what it was."""
        if offset < 0 or length < 0 or offset + length > self._size:
            raise ValueError(f"read of {length} bytes at {offset} of a disk of {self._size}")
        async with self._gate.shared():
            return await trio.to_thread.run_sync(self._read, offset, length)

    async def digest(self, offset: int, length: int) -> tuple[bytes, list[int]]:
        """The digests of whole grains as they read now, and the numbers of those that the replica's map has otherwise.

        What a delta holds is held against the delta's own digests by reading it. Raises as ``read``.
        """
        async with self._gate.shared():
            return await trio.to_thread.run_sync(self._digest, offset, length)

    def _read(self, offset: int, length: int) -> bytes:
        return self._read_over(offset, length)[0]

    def _read_over(self, offset: int, length: int) -> tuple[bytes, list[tuple[int, int]]]:
        """The bytes, and the ranges (offset, length) of them that no delta holds."""
        self._check_open()
        gaps = [(offset, length)]
        pieces: list[tuple[int, bytes | int]] = []
        for delta in self.stack:
            gaps = _fill(delta, gaps, pieces)
            if not gaps:
                break
        for at, count in gaps:
            pieces.append((at, self.replica.read(at, count) if self.replica else count))
        if len(pieces) == 1 and isinstance(pieces[0][1], bytes):
            return pieces[0][1], gaps
        data = bytearray(length)
        for at, piece in pieces:
            if not isinstance(piece, int):
                data[at - offset : at - offset + len(piece)] = piece
        return bytes(data), gaps

    def _digest(self, offset: int, length: int) -> tuple[bytes, list[int]]:
        plain, gaps = self._read_over(offset, length)
        digests = self.algorithm.digest_grains(plain, self.grain)
        if self.replica is None or self.replica.map is None:
            return digests, []
        size, base = self.algorithm.digest_size, offset // self.grain
        differing: list[int] = []
        for at, count in gaps:
            # A grain that a delta holds in part (the disk ended in it then) is as that delta says.
            first = -(-at // self.grain)
            end = at + count
            last = -(-end // self.grain) if end == self._size else end // self.grain
            known = _known_digests(self.replica.map, first, last)
            if known != digests[(first - base) * size : (last - base) * size]:
                differing += [
                    grain
                    for grain in range(first, last)
                    if known[(grain - first) * size : (grain - first + 1) * size]
                    != digests[(grain - base) * size : (grain - base + 1) * size]
                ]
        return digests, differing

    def holder(self, grain: int) -> Path:
        """The file that holds a grain's content; an empty path if none does. Blocks."""
        for delta in self.stack:
            if delta.find(grain * self.grain) is not None:
                return Path(delta.path)
        return self.replica.path if self.replica is not None else Path()

    async def extents(self, since: str | None = None) -> AsyncGenerator[Extent, None]:
        """Ranges that may hold data: those of the replica and of every delta, joined."""
        del since  # a stored point has no change tracking of its own
        at = 0
        while at < self._size:
            async with self._gate.shared():
                batch = await trio.to_thread.run_sync(self._extents_from, at)
            if not batch:
                return
            for extent in batch:
                yield extent
            at = batch[-1].end

    def _extents_from(self, start: int) -> list[Extent]:
        self._check_open()
        sources: list[Iterator[Extent]] = [_extents_of(delta, start) for delta in self.stack]
        limit = self._size
        if self.replica is not None:
            found = self.replica.extents(start, self._size)
            if len(found) == _EXTENTS_PER_CALL:
                limit = found[-1].end  # beyond this the replica has not been asked
            sources.append(iter(found))
        joined: list[Extent] = []
        for extent in heapq.merge(*sources, key=lambda extent: extent.offset):
            begin, end = max(extent.offset, start), min(extent.end, limit)
            if begin >= limit:
                break
            if extent.zero or begin >= end:
                continue
            if joined and begin <= joined[-1].end:
                last = joined[-1]
                joined[-1] = Extent(last.offset, max(last.end, end) - last.offset)
            elif len(joined) == _EXTENTS_PER_CALL:
                break
            else:
                joined.append(Extent(begin, end - begin))
        return joined

    def _check_open(self) -> None:
        if self._closed:
            raise DamageError("the view of a recovery point was used after it was closed")

    def close(self) -> None:
        """Let go of all files; the space of what is unlinked comes back."""
        if not self._closed:
            self._closed = True
            for delta in self.stack:
                delta.close()
            if self.replica is not None:
                with suppress(OSError):
                    self.replica.close()


def _known_digests(digests: ImageMap, first: int, last: int) -> bytes:
    """The map's digests of grains ``first`` to ``last`` (not included); zeros past its end."""
    count = max(0, last - first)
    inside = min(count, max(0, digests.grains - first))
    known = digests.digests(first, inside) if inside else b""
    return known.ljust(count * digests.algorithm.digest_size, b"\0")


def _extents_of(delta: StoredDelta, start: int) -> Iterator[Extent]:
    """The data extents of a delta that end after ``start``."""
    at = start
    while (entry := delta.find_next(at)) is not None:
        if entry.kind is Kind.DATA:
            yield Extent(entry.offset, entry.length)
        at = entry.end


def _fill(
    delta: StoredDelta, gaps: list[tuple[int, int]], pieces: list[tuple[int, bytes | int]]
) -> list[tuple[int, int]]:
    """Take from ``delta`` what it has of ``gaps``; returns the gaps that are left."""
    left: list[tuple[int, int]] = []
    for offset, length in gaps:
        at = offset
        inside = min(length, delta.header.disk_size - offset)  # an older delta of a disk that grew
        for begin, piece in delta.read(offset, inside) if inside > 0 else ():
            if begin > at:
                left.append((at, begin - at))
            pieces.append((begin, piece))
            at = begin + (piece if isinstance(piece, int) else len(piece))
        if at < offset + length:
            left.append((at, offset + length - at))
    return left
