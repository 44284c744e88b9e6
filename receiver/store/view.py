# SPDX-License-Identifier: AGPL-3.0-or-later
"""A recovery point's disk as a ``DiskView``: the replica under a stack of deltas, forward or reverse.

The first delta in the stack that holds a grain wins; what none holds comes from the replica, or is zero. A view that is
open stays exact while the replica moves on: before a delta is applied, every view that needs the old content gains the
reverse delta at the bottom of its stack, at a moment when no read is under way (``Gate``).

What is read is verified: a delta's grains by the delta's digests, the replica's by its map. An apply changes digests of
the map only for grains that the delta touches, and those come from the stack of every view for as long as it goes on;
so the digests of all others hold at any moment, also after a crash between the replica's content and its map.
"""

from __future__ import annotations

import errno
import heapq
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from replicator.disk import Extent
from replicator.errors import DamageError, StateError
from replicator.imagemap import FANOUT, ImageMap
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
        """Bytes at ``offset`` as they lie there, unverified; past the end of the file there are zeros. Blocks."""
        data = os.pread(self.fd, length, offset)
        while len(data) < length:
            more = os.pread(self.fd, length - len(data), offset + len(data))
            if not more:
                return data + bytes(length - len(data))
            data += more
        return data

    def known(self, first: int, count: int) -> bytes | None:
        """The map's digests of grains, zeros past its end; None if there is no map to be used. Blocks."""
        if self.map is None:
            return None
        return _known_digests(self.map, first, first + count)

    def differing(self, first: int, digests: bytes) -> list[int]:
        """The grains from ``first`` on whose content, which has these digests, is not what the map says.

        Where the map's own nodes say that the content is right and the map's digest wrong, the content is. Blocks.
        """
        known = self.known(first, len(digests) // self._digest_size) if self.map else None
        if known is None or known == digests:
            return []
        size = self._digest_size
        found = [
            first + at // size
            for at in range(0, len(digests), size)
            if known[at : at + size] != digests[at : at + size]
        ]
        found = [
            grain
            for grain in found
            if not self._digest_fits(grain, digests[(grain - first) * size :][:size])
        ]
        wrong = {page for page in {g // FANOUT for g in found} if not self._content_fits(page)}
        return [grain for grain in found if grain // FANOUT in wrong]

    @property
    def _digest_size(self) -> int:
        return self.map.algorithm.digest_size if self.map is not None else 0

    def _digest_fits(self, grain: int, digest: bytes) -> bool:
        """Whether a page of the map fits its node if this digest is put in the place of the stored one."""
        if self.map is None or grain >= self.map.grains:
            return False
        page, slot = divmod(grain, FANOUT)
        digests = bytearray(_known_digests(self.map, page * FANOUT, (page + 1) * FANOUT))
        digests[slot * len(digest) : (slot + 1) * len(digest)] = digest
        return self.map.page_fits(page, bytes(digests))

    def _content_fits(self, page: int) -> bool:
        """Whether the content below a page of the map is what the page's node says. Reads 256 grains."""
        if self.map is None or page * FANOUT >= self.map.grains:
            return False
        grain = self.map.grain
        digests = [
            self.map.algorithm.digest_grains(self.read(number * grain, grain), grain)
            for number in range(page * FANOUT, min((page + 1) * FANOUT, self.map.grains))
        ]
        return self.map.page_fits(page, b"".join(digests))

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

    def forget_map(self) -> None:
        """Read without the map from now on."""
        if self.map is not None:
            self.map.close()
            self.map = None

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self.fd)
        self.forget_map()


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
        # The grain of the replica verified last: small reads come in rows. It is only asked for while no delta holds
        # it, so it has not changed since.
        self._verified: tuple[int, bytes] | None = None

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._size

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes, verified. Raises DamageError or PhcbtError where they are not what was recorded."""
        if offset < 0 or length < 0 or offset + length > self._size:
            raise ValueError(f"read of {length} bytes at {offset} of a disk of {self._size}")
        async with self._gate.shared():
            return await trio.to_thread.run_sync(self._read, offset, length)

    async def digest(self, offset: int, length: int) -> tuple[bytes, list[int]]:
        """The digests of whole grains as they read now, and the numbers of those that the replica's map has otherwise.

        For verification: what comes from the replica is read as it lies there, for the caller to judge. What a delta
        holds is held against the delta's own digests by reading it. Raises as ``read`` does for that.
        """
        async with self._gate.shared():
            return await trio.to_thread.run_sync(self._digest, offset, length)

    def _read(self, offset: int, length: int) -> bytes:
        if not length:
            return b""
        start = offset - offset % self.grain
        end = min(offset + length + -(offset + length) % self.grain, self._size)
        found, _ = self._read_over(start, end - start, self._from_replica)
        return found[offset - start : offset - start + length]

    def _read_over(
        self, offset: int, length: int, read: Callable[[int, int], bytes | int]
    ) -> tuple[bytes, list[tuple[int, int]]]:
        """The bytes, and the ranges (offset, length) of them that no delta holds, which ``read`` reads."""
        self._check_open()
        gaps = [(offset, length)]
        pieces: list[tuple[int, bytes | int]] = []
        for delta in self.stack:
            gaps = _fill(delta, gaps, pieces)
            if not gaps:
                break
        for at, count in gaps:
            pieces.append((at, read(at, count)))
        if len(pieces) == 1 and isinstance(pieces[0][1], bytes):
            return pieces[0][1], gaps
        data = bytearray(length)
        for at, piece in pieces:
            if not isinstance(piece, int):
                data[at - offset : at - offset + len(piece)] = piece
        return bytes(data), gaps

    def _unverified(self, offset: int, length: int) -> bytes | int:
        return self.replica.read(offset, length) if self.replica is not None else length

    def _from_replica(self, offset: int, length: int) -> bytes | int:
        """Verified content of what no delta holds: whole grains, but for the disk's last, and for the rest of a first
        that a delta holds up to where the disk ended then: nothing was ever written there.
        """
        if self.replica is None:
            return length
        rest = min(-offset % self.grain, length)
        head = self.replica.read(offset, rest)
        if any(head):
            raise self._damaged(offset - offset % self.grain)
        if rest == length:
            return head
        first, end = (offset + rest) // self.grain, offset + length
        plain = self._grains(self.replica, first, -(-end // self.grain) - first)
        if len(plain) == length:
            return plain
        return head + plain[: length - rest]

    def _grains(self, replica: Replica, first: int, count: int) -> bytes:
        """Whole grains, also where this view ends inside the last."""
        verified = self._verified
        if count == 1 and verified is not None and verified[0] == first:
            return verified[1]
        plain = replica.read(first * self.grain, count * self.grain)
        if replica.map is not None:
            differing = replica.differing(first, self.algorithm.digest_grains(plain, self.grain))
            if differing:
                raise self._damaged(differing[0] * self.grain)
            if count == 1:
                self._verified = (first, plain)
        return plain

    def _damaged(self, at: int) -> DamageError:
        assert self.replica is not None
        length = min(self.grain, self._size - at)
        return DamageError(
            f"{self.replica.path}: {length} bytes at disk byte {at} are not what was recorded"
        )

    def _digest(self, offset: int, length: int) -> tuple[bytes, list[int]]:
        plain, gaps = self._read_over(offset, length, self._unverified)
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
