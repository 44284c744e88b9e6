# SPDX-License-Identifier: AGPL-3.0-or-later
"""A source of plain images whose change tracking is told by the test: what it says, what it hides, and what is read."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from replicator.disk import DiskView, Extent, normalise
from replicator.errors import ReferenceLostError
from replicator.push.pusher import Pusher
from replicator.sources.base import HeldSnapshot, Snapshot, SnapshotName, SourceDisk, VmIdentity
from replicator.sources.image import ImageSource
from tests.sites import GRAIN, SourceSite


@dataclass
class TrackedView:
    """``changed``: what tracking says of the changes since the reference, None if it cannot say."""

    view: DiskView
    changed: list[Extent] | None
    reads: list[Extent] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.view.size

    async def extents(self, since: str | None = None) -> AsyncGenerator[Extent, None]:
        if since is None:
            async for extent in self.view.extents():
                yield extent
            return
        if self.changed is None:
            raise ReferenceLostError("the test says so")
        for extent in normalise(self.changed, self.size):
            yield extent

    async def read(self, offset: int, length: int) -> bytes:
        self.reads.append(Extent(offset, length))
        return await self.view.read(offset, length)


@dataclass
class TrackedSnapshot:
    inner: Snapshot
    disks: Sequence[SourceDisk]
    taken_at_us: int
    lost_tracking: str | None = None

    async def check(self) -> None:
        await self.inner.check()

    async def aclose(self) -> None:
        await self.inner.aclose()


class TrackedSource:
    """Wraps an image source. ``write`` of ``Tracked`` notes what it writes, unless it is to be hidden."""

    def __init__(self, inner: ImageSource) -> None:
        self._inner = inner
        self.changed: dict[str, list[Extent]] = {}
        self.reference: str | None = None
        self.views: list[TrackedView] = []

    @property
    def bytes_read(self) -> int:
        return sum(extent.length for view in self.views for extent in view.reads)

    async def identify(self) -> VmIdentity:
        return await self._inner.identify()

    async def take(self, name: SnapshotName) -> TrackedSnapshot:
        return self._wrapped(await self._inner.take(name), name)

    async def reopen(self, name: SnapshotName) -> TrackedSnapshot:
        return self._wrapped(await self._inner.reopen(name), name)

    def _wrapped(self, inner: Snapshot, name: SnapshotName) -> TrackedSnapshot:
        known = name.reference is not None and name.reference == self.reference
        disks = []
        for disk in inner.disks:
            changed = list(self.changed.get(disk.identity, [])) if known else None
            view = TrackedView(disk.view, changed)
            self.views.append(view)
            disks.append(SourceDisk(disk.identity, view))
        lost = "the reference is gone" if name.reference is not None and not known else None
        return TrackedSnapshot(inner, disks, inner.taken_at_us, lost)

    async def confirm(self, name: SnapshotName) -> None:
        if self.reference != name.push_id:
            self.reference = name.push_id
            self.changed.clear()
        await self._inner.confirm(name)

    async def abandon(self, name: SnapshotName) -> None:
        await self._inner.abandon(name)

    async def held(self) -> Sequence[HeldSnapshot]:
        return await self._inner.held()

    async def sweep(self, keep: SnapshotName | None, reference: str | None) -> list[str]:
        return await self._inner.sweep(keep, reference)


@dataclass
class Tracked:
    """A source site with such a source."""

    site: SourceSite
    source: TrackedSource

    def write(self, disk: str, offset: int, data: bytes, *, hidden: bool = False) -> None:
        """As the VM would; ``hidden``: tracking misses it."""
        self.site.write(disk, offset, data)
        if not hidden:
            noted = self.source.changed.setdefault(disk, [])
            noted.append(Extent(offset, len(data)))


def tracked(site: SourceSite) -> Tracked:
    """Give a site a source that tracks."""
    inner = site.source
    assert isinstance(inner, ImageSource)
    source = TrackedSource(inner)
    site.source = source
    site.pusher = Pusher(site.config, site.log, source, site.pusher._link)
    return Tracked(site, source)


__all__ = ["GRAIN", "Tracked", "TrackedSource", "TrackedView", "tracked"]
