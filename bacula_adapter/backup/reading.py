# SPDX-License-Identifier: AGPL-3.0-or-later
"""Reading a disk for a backup: which chunks, their bytes and their grains' digests, some of them ahead, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import trio

from replicator.disk import DiskView, Extent, ReadsNow
from replicator.phcbt.format import StreamHeader
from replicator.wire.buffers import Buffers

#: Bytes of the disk that is being written out that are read, or being read, at once.
_DEPTH: Final = 12 << 20
#: The same of a disk whose turn has not come.
_DEPTH_AHEAD: Final = 2 << 20
#: Bytes that one thread reads before it hands them on: to go to a thread and back costs as much as a chunk.
GROUP: Final = 3 << 20
#: Disks of a job that are read ahead of their turn.
AHEAD_MAX: Final = 8
#: Threads that read and digest, beside one for each processor.
_READERS: Final = 2


class Lookahead:
    """How much of a disk may be read before it is written out: little until ``now``."""

    def __init__(self, unit: int) -> None:
        """``unit``: bytes that are read in one go."""
        self._later = max(1, _DEPTH // unit)
        self._first = max(1, min(self._later, _DEPTH_AHEAD // unit))
        self.room = trio.Semaphore(self._first)

    def now(self) -> None:
        """Its turn has come."""
        for _ in range(self._later - self._first):
            self.room.release()
        self._first = self._later


def make_limiter() -> trio.CapacityLimiter:
    """For the threads that read and digest, of all disks of a job."""
    return trio.CapacityLimiter((os.cpu_count() or 1) + _READERS)


@dataclass(slots=True)
class Piece:
    """A chunk that was read: its bytes, and the digests of its grains one after the other."""

    extent: Extent
    data: memoryview
    digests: bytes
    lent: memoryview | None = None


class PieceReader:
    """Reads the chunks of one disk."""

    def __init__(self, view: DiskView, header: StreamHeader, cpus: trio.CapacityLimiter) -> None:
        self._view = view
        self._reads_now = view if isinstance(view, ReadsNow) else None
        self._header = header
        self._cpus = cpus
        self._buffers = Buffers(header.chunk)
        #: Chunks in a group: many where one thread reads them, else one, so that many reads are under way.
        self.group = max(1, GROUP // header.chunk) if self._reads_now is not None else 1

    async def read(self, extents: list[Extent]) -> list[Piece]:
        """The chunks, those that are known to be zeros left out. Raises what the view does."""
        wanted = [extent for extent in extents if not extent.zero]
        if self._reads_now is not None:
            return await trio.to_thread.run_sync(
                self._read_now, self._reads_now, wanted, limiter=self._cpus
            )
        pieces = []
        for extent in wanted:
            plain = await self._view.read(extent.offset, extent.length)
            digests = await trio.to_thread.run_sync(self._digest, plain, limiter=self._cpus)
            pieces.append(Piece(extent, memoryview(plain), digests))
        return pieces

    def _read_now(self, view: ReadsNow, wanted: list[Extent]) -> list[Piece]:
        pieces = []
        for extent in wanted:
            lent = self._buffers.take()
            data = lent[: extent.length]
            view.read_now(extent.offset, data)
            pieces.append(Piece(extent, data, self._digest(data), lent))
        return pieces

    def _digest(self, data: bytes | memoryview) -> bytes:
        return self._header.algorithm.digest_grains(data, self._header.grain)

    def done(self, piece: Piece) -> None:
        """Nobody needs its bytes any more."""
        if piece.lent is not None:
            self._buffers.give(piece.lent)


def data_runs(piece: Piece, grain: int, digest_size: int) -> Iterator[tuple[int, memoryview]]:
    """The stretches of a piece whose grains are not zeros: byte of the disk, and bytes."""
    zero, digests, length = bytes(digest_size), piece.digests, piece.extent.length
    if zero not in digests:
        yield piece.extent.offset, piece.data
        return
    start = -1
    for index in range(len(digests) // digest_size):
        at = index * grain
        if digests[index * digest_size : (index + 1) * digest_size] != zero:
            start = at if start < 0 else start
        elif start >= 0:
            yield piece.extent.offset + start, piece.data[start:at]
            start = -1
    if start >= 0:
        yield piece.extent.offset + start, piece.data[start:length]


__all__ = [
    "AHEAD_MAX",
    "GROUP",
    "Lookahead",
    "Piece",
    "PieceReader",
    "data_runs",
    "make_limiter",
]
