# SPDX-License-Identifier: AGPL-3.0-or-later
"""A disk at a moment, and the algebra of extents.

A snapshot at the source, a recovery point on the receiver and a restored backup are all a
``DiskView``: nothing above this interface knows where bytes come from.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """A range of a disk in bytes. ``zero`` says that it is known to read as zeros."""

    offset: int
    length: int
    zero: bool = False

    def __post_init__(self) -> None:
        if self.offset < 0 or self.length <= 0:
            raise ValueError(f"extent of {self.length} bytes at {self.offset}")

    @property
    def end(self) -> int:
        """First byte after the extent."""
        return self.offset + self.length


class DiskView(Protocol):
    """A disk that does not change: a size, the extents that hold data, and reading."""

    @property
    def size(self) -> int:
        """Size in bytes."""
        ...

    def extents(self, since: str | None = None) -> AsyncGenerator[Extent, None]:
        """Ascending, disjoint extents inside the disk.

        Without ``since``: every range that may hold anything but zeros. With it: every range that
        may differ from the moment of that name. Raises ReferenceLostError if that cannot be said.
        Ranges left out are certain.
        """
        ...

    async def read(self, offset: int, length: int) -> bytes:
        """Read exactly ``length`` bytes; the range must lie inside the disk. Cancellable, without
        effect.
        """
        ...


@runtime_checkable
class ReadsNow(Protocol):
    """A view that can also be read by a thread that waits: then reading and encoding a chunk is one step."""

    def read_now(self, offset: int, room: memoryview) -> None:
        """Fill ``room`` with the disk's bytes from ``offset`` on; the range must lie inside the disk. Blocks; raises what
        ``DiskView.read`` raises. Many threads may read at once.
        """
        ...


@runtime_checkable
class MadeReadable(Protocol):
    """A view that must first be made readable, which costs more than the bytes: a volume group, a login, a download."""

    @property
    def must_be_read(self) -> bool:
        """Whether what changed has data, so that it is made readable anyway. If not, it should seldom be read."""
        ...


async def data_bytes(view: DiskView, since: str | None = None) -> int:
    """How much would be read of a disk, or of what changed since that moment: what is known to be zeros is not. Raises
    ReferenceLostError.
    """
    total = 0
    async with aclosing(view.extents(since)) as extents:
        async for extent in extents:
            total += 0 if extent.zero else extent.length
    return total


def normalise(extents: Iterable[Extent], size: int) -> list[Extent]:
    """Sort, clip to ``size``, resolve overlaps and join neighbours of the same kind.

    Where a zero extent and a data extent overlap, data wins: it is only a claim to be read. Holds
    all extents; what comes out is ascending and disjoint, as ``widen`` needs it.
    """
    edges: list[tuple[int, int, bool]] = []
    for extent in extents:
        end = min(extent.end, size)
        if extent.offset < end:
            edges.append((extent.offset, 1, extent.zero))
            edges.append((end, -1, extent.zero))
    edges.sort(key=lambda edge: edge[0])
    result: list[Extent] = []
    depth = {True: 0, False: 0}
    at = 0
    for position, step, zero in edges:
        if position > at and (depth[True] or depth[False]):
            _append(result, Extent(at, position - at, zero=not depth[False]))
        at = position
        depth[zero] += step
    return result


def _append(result: list[Extent], extent: Extent) -> None:
    last = result[-1] if result else None
    if last is not None and last.end == extent.offset and last.zero == extent.zero:
        result[-1] = Extent(last.offset, last.length + extent.length, last.zero)
    else:
        result.append(extent)


def widen(extents: Iterable[Extent], grain: int, size: int) -> Iterator[Extent]:
    """Widen ascending, disjoint extents to whole grains (the last ends at ``size``), joining
    neighbours of one kind.

    A grain is zero only if zero extents cover all of it that lies inside the disk; any other grain
    that is touched is data, because some of it must be read. Grains that no extent touches are left
    out. Streams: holds one extent. Raises ValueError, at the extent concerned, if the input is not
    ascending and disjoint.
    """
    if grain <= 0:
        raise ValueError(f"grain of {grain} bytes")
    pending: Extent | None = None
    for piece in _whole_grains(extents, grain, size):
        if pending is not None and piece.offset == pending.end and piece.zero == pending.zero:
            pending = Extent(pending.offset, pending.length + piece.length, piece.zero)
            continue
        if pending is not None:
            yield pending
        pending = piece
    if pending is not None:
        yield pending


def _whole_grains(extents: Iterable[Extent], grain: int, size: int) -> Iterator[Extent]:
    """The touched grains in order: stretches that one extent covers whole, and grains that it
    covers in part.
    """
    open_at = -1  # start of a grain covered only in part so far, or -1
    zero_bytes = 0  # how much of it zero extents cover: it is zero if that is all of it
    reached = 0
    for extent in extents:
        if extent.offset < reached:
            raise ValueError(f"extent at {extent.offset} after one that ends at {reached}")
        at, reached = extent.offset, extent.end
        end = min(extent.end, size)
        while at < end:
            start = at // grain * grain
            if open_at not in (-1, start):
                yield _grain_at(open_at, zero_bytes, grain, size)
                open_at = -1
            if at == start and end - at >= grain:
                whole = (end - at) // grain * grain
                yield Extent(at, whole, extent.zero)
                at += whole
                continue
            if open_at == -1:
                open_at, zero_bytes = start, 0
            stop = min(end, start + grain)
            zero_bytes += stop - at if extent.zero else 0
            at = stop
    if open_at != -1:
        yield _grain_at(open_at, zero_bytes, grain, size)


def _grain_at(start: int, zero_bytes: int, grain: int, size: int) -> Extent:
    length = min(grain, size - start)
    return Extent(start, length, zero=zero_bytes == length)


def split(extents: Iterable[Extent], chunk: int) -> Iterator[Extent]:
    """Cut extents at multiples of ``chunk``, so that none crosses a chunk border. Streams."""
    if chunk <= 0:
        raise ValueError(f"chunk of {chunk} bytes")
    for extent in extents:
        at = extent.offset
        while at < extent.end:
            end = min(extent.end, (at // chunk + 1) * chunk)
            yield Extent(at, end - at, extent.zero)
            at = end
