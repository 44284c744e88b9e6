# SPDX-License-Identifier: AGPL-3.0-or-later
"""A snapshot in QEMU as it is read: one NBD export a disk, with allocation and dirty bitmap."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable

from replicator.disk import Extent
from replicator.errors import ReferenceLostError
from replicator.nbd.client import NbdClient
from replicator.nbd.protocol import (
    BASE_ALLOCATION,
    DIRTY_BITMAP,
    STATE_DIRTY,
    STATE_ZERO,
    StatusExtent,
)
from replicator.sources.base import SourceDisk

#: Block status is asked for windows of this size: bounds the memory whatever the disk's size.
WINDOW = 1 << 30
#: To read so much takes no longer than to ask whether it reads as zeros.
READ_RATHER_MAX = 1 << 20


class QemuDiskView:
    """A ``DiskView`` over an NBD export of a scratch node.

    ``reference``: the push whose bitmap is exported along, None if there is none. ``lost``: why
    not. ``known_size``: how long the disk was at the reference; what lies beyond has no history.
    ``guard`` runs before each read.
    """

    def __init__(
        self,
        client: NbdClient,
        *,
        reference: str | None,
        bitmap: str | None,
        known_size: int,
        lost: str | None,
        guard: Callable[[], Awaitable[None]],
    ) -> None:
        self._client = client
        self._reference = reference
        self._context = DIRTY_BITMAP + bitmap if bitmap is not None else None
        self._known_size = known_size
        self._lost = lost
        self._guard = guard

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._client.size

    async def read(self, offset: int, length: int) -> bytes:
        """Read exactly ``length`` bytes; many reads may be under way at once. Raises SourceError."""
        await self._guard()
        return await self._client.read(offset, length)

    async def extents(self, since: str | None = None) -> AsyncGenerator[Extent, None]:
        """See ``DiskView``: allocated data, or what the reference's bitmap has marked."""
        if since is not None:
            self._check_reference(since)
        held: Extent | None = None
        for start in range(0, self.size, WINDOW):
            length = min(WINDOW, self.size - start)
            if since is None:
                found = await self._allocation(start, length, keep_zero=False)
            else:
                found = await self._changes(start, length)
            for extent in found:
                if held is None:
                    held = extent
                elif held.end == extent.offset and held.zero == extent.zero:
                    held = Extent(held.offset, held.length + extent.length, held.zero)
                else:
                    yield held
                    held = extent
        if held is not None:
            yield held

    def _check_reference(self, since: str) -> None:
        if self._lost is not None:
            raise ReferenceLostError(self._lost)
        if since != self._reference or self._context not in self._client.contexts:
            raise ReferenceLostError(f"changes since push {since} are not recorded")

    async def _allocation(self, start: int, length: int, *, keep_zero: bool) -> list[Extent]:
        statuses = await self._client.block_status(start, length, BASE_ALLOCATION)
        extents = (
            Extent(status.offset, status.length, zero=bool(status.flags & STATE_ZERO))
            for status in statuses
        )
        return [extent for extent in extents if keep_zero or not extent.zero]

    async def _changes(self, start: int, length: int) -> list[Extent]:
        assert self._context is not None
        result: list[Extent] = []
        statuses = await self._client.block_status(start, length, self._context)
        for changed in self._with_growth(statuses, start, length):
            if changed.length <= READ_RATHER_MAX:
                result.append(changed)
            else:
                result += await self._allocation(changed.offset, changed.length, keep_zero=True)
        return result

    def _with_growth(
        self, statuses: Iterable[StatusExtent], start: int, length: int
    ) -> list[Extent]:
        """Dirty ranges, and all that the disk has grown by: a bitmap calls the new part clean."""
        border = min(max(self._known_size, start), start + length)
        result = [
            Extent(status.offset, min(status.offset + status.length, border) - status.offset)
            for status in statuses
            if status.flags & STATE_DIRTY and status.offset < border
        ]
        if border < start + length:
            result.append(Extent(border, start + length - border))
        return result


class QemuSnapshot:
    """All disks of a VM in one QEMU process at one instant."""

    def __init__(
        self,
        *,
        taken_at_us: int,
        disks: list[SourceDisk],
        lost_tracking: str | None,
        clients: list[NbdClient],
        check: Callable[[], Awaitable[None]],
    ) -> None:
        self._taken_at_us = taken_at_us
        self._disks = disks
        self._lost_tracking = lost_tracking
        self._clients = clients
        self._check = check

    @property
    def taken_at_us(self) -> int:
        """The instant, in microseconds since the epoch, UTC."""
        return self._taken_at_us

    @property
    def disks(self) -> list[SourceDisk]:
        """Every disk, by identity."""
        return self._disks

    @property
    def lost_tracking(self) -> str | None:
        """Why changes since the reference are not known for every disk, or None."""
        return self._lost_tracking

    async def check(self) -> None:
        """Raise SnapshotGoneError if QEMU has ended it, or if its scratch space has run out."""
        await self._check()

    async def aclose(self) -> None:
        """Close the connections; can be repeated."""
        for client in self._clients:
            await client.aclose()
