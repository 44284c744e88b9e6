# SPDX-License-Identifier: AGPL-3.0-or-later
"""A disk of a snapshot as a ``DiskView``: made readable when it is read for the first time, until the snapshot is closed."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import trio

from replicator.disk import Extent
from replicator.errors import ReferenceLostError, SnapshotGoneError
from replicator.prism.types import DiskSnapshot
from replicator.sources.nutanix.regions import RegionMap

_logger = logging.getLogger(__name__)


class Reader(Protocol):
    """Reads bytes of a disk."""

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes."""
        ...


class Lane:
    """Holds one disk readable, in a task of its own in ``nursery``: whoever reads first has it made so.

    ``opening`` bounds how many disks of the VM are made readable at once.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        expose: Callable[[], AbstractAsyncContextManager[Reader]],
        opening: trio.Semaphore,
        what: str,
    ) -> None:
        self._nursery = nursery
        self._expose = expose
        self._opening = opening
        self._what = what
        self._lock = trio.Lock()
        self._reader: Reader | None = None
        self._leave = trio.Event()
        self._ended = trio.Event()
        self._ended.set()

    async def read(self, offset: int, length: int) -> bytes:
        """As ``DiskView.read``. Raises SnapshotGoneError once it is closed."""
        reader = self._reader
        if reader is None:
            async with self._lock:
                reader = self._reader
                if reader is None:
                    reader = self._reader = await self._open()
        if self._leave.is_set():
            raise SnapshotGoneError(f"{self._what} is closed")
        return await reader.read(offset, length)

    async def _open(self) -> Reader:
        if self._leave.is_set():
            raise SnapshotGoneError(f"{self._what} is closed")
        async with self._opening:
            reader: Reader = await self._nursery.start(self._hold)
        return reader

    async def _hold(self, task_status: trio.TaskStatus[Reader] = trio.TASK_STATUS_IGNORED) -> None:
        started = False
        self._ended = trio.Event()
        try:
            async with self._expose() as reader:
                task_status.started(reader)
                started = True
                await self._leave.wait()
        except Exception as error:
            # Whoever reads meets it too, and tells it: here it must not take other VMs' disks down.
            if not started:
                raise
            _logger.warning("%s: %s", self._what, error)
        finally:
            self._ended.set()

    def leave(self) -> None:
        """Have it taken down; does not wait."""
        self._leave.set()

    async def wait(self) -> None:
        """Until it is taken down."""
        await self._ended.wait()


class NutanixView:
    """Implements ``DiskView``.

    ``reference``: the push that ``changes`` are since; ``lost``: why there are none. ``full``: the map of what was ever written,
    None where Prism has none; it is fetched by ``fetch_full`` when it is needed, unless it was ``asked`` for already.
    """

    def __init__(
        self,
        disk: DiskSnapshot,
        lane: Lane,
        *,
        reference: str | None,
        changes: RegionMap | None,
        lost: str | None,
        full: RegionMap | None,
        asked: bool,
        fetch_full: Callable[[], Awaitable[RegionMap | None]],
    ) -> None:
        self.disk = disk
        self.lost = lost
        self._lane = lane
        self._reference = reference
        self._changes = changes
        self._full = full
        self._fetch_full = fetch_full
        self._asked = asked
        self._lock = trio.Lock()

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.disk.size

    @property
    def changes(self) -> RegionMap | None:
        """What changed since the reference, if that is known."""
        return self._changes

    @property
    def must_be_read(self) -> bool:
        """See ``MadeReadable``."""
        return self._changes is None or any(not extent.zero for extent in self._changes)

    async def extents(self, since: str | None = None) -> AsyncGenerator[Extent, None]:
        """See ``DiskView``. What changed is known whole before any of it is given."""
        if since is None:
            found = await self._whole_map()
            if found is None:
                yield Extent(0, self.size)
                return
        elif since != self._reference:
            raise ReferenceLostError(f"the snapshot was not compared with push {since}")
        elif self._changes is None:
            raise ReferenceLostError(self.lost or "nothing is known of what changed")
        else:
            found = self._changes
        await trio.lowlevel.checkpoint()
        for extent in found:
            yield extent

    async def _whole_map(self) -> RegionMap | None:
        async with self._lock:
            if not self._asked:
                self._full = await self._fetch_full()
                self._asked = True
            return self._full

    async def read(self, offset: int, length: int) -> bytes:
        """See ``DiskView``. The first read makes the disk readable. Raises PrismError, IscsiError, SnapshotGoneError."""
        if offset < 0 or length <= 0 or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset} of a disk of {self.size} bytes")
        return await self._lane.read(offset, length)


__all__ = ["Lane", "NutanixView", "Reader"]
