# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which parts of a snapshot's disk must be read: all pages of Prism's answer, put together and kept small.

The whole map is there before any of it is used: a map that breaks off half-way would be no map.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import aclosing
from typing import Final

from replicator.disk import Extent
from replicator.prism.api import Prism
from replicator.prism.errors import PrismAnswerError
from replicator.prism.types import DiskSnapshot, VmSnapshot

#: Extents of one map. Beyond, neighbours are joined over the gap between them: more is read than must be, never less.
COUNT_MAX: Final = 1 << 20
_GAP_MIN: Final = 64 << 10
_PAGES_MAX: Final = 1_000_000


class RegionMap:
    """Ascending, disjoint extents in 17 bytes each. ``file_size``: of the disk, as Prism said with them."""

    def __init__(self, file_size: int, *, count_max: int = COUNT_MAX) -> None:
        self.file_size = file_size
        self._count_max = count_max
        self._gap = _GAP_MIN
        self._starts: array[int] = array("Q")
        self._ends: array[int] = array("Q")
        self._zero = bytearray()

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, extent: Extent) -> None:
        """One more, after all others and inside the disk; joined with the last where they touch. Raises PrismAnswerError."""
        reached = self._ends[-1] if self._ends else 0
        if extent.offset < reached or extent.end > self.file_size:
            raise PrismAnswerError(
                f"changed regions out of order: {extent.length} bytes at {extent.offset} after {reached}, in a disk of"
                f" {self.file_size}"
            )
        if self._ends and extent.offset == reached and bool(self._zero[-1]) == extent.zero:
            self._ends[-1] = extent.end
            return
        self._append(extent.offset, extent.end, extent.zero)
        while len(self._starts) > self._count_max:
            self._thin()

    def _append(self, start: int, end: int, zero: bool) -> None:
        self._starts.append(start)
        self._ends.append(end)
        self._zero.append(zero)

    def _thin(self) -> None:
        """Join what lies closer than a gap, which grows each time. What was zero is read with the data beside it."""
        old = list(zip(self._starts, self._ends, self._zero, strict=True))
        self._starts, self._ends, self._zero = array("Q"), array("Q"), bytearray()
        for start, end, zero in old:
            if self._ends and start - self._ends[-1] <= self._gap:
                self._ends[-1] = end
                self._zero[-1] = 0
            else:
                self._append(start, end, bool(zero))
        self._gap *= 2

    def __iter__(self) -> Iterator[Extent]:
        for start, end, zero in zip(self._starts, self._ends, self._zero, strict=True):
            yield Extent(start, end - start, bool(zero))

    def data_bytes(self) -> int:
        """How many bytes must be read."""
        return sum(extent.length for extent in self if not extent.zero)


async def fetch_map(
    prism: Prism,
    snapshot: VmSnapshot,
    disk: DiskSnapshot,
    since: tuple[VmSnapshot, DiskSnapshot] | None,
) -> RegionMap:
    """The whole map. With ``since`` what is zero now is kept as zero extents, and what the disk grew by is in it, told or not;
    without, only what may hold data.

    ``file_size`` may differ from ``disk.size`` where the disk was resized while the snapshot was made. Raises RegionsLostError,
    PrismAnswerError and what else Prism may.
    """
    found: RegionMap | None = None
    reached = since[1].size if since is not None else 0
    pages = 0
    async with aclosing(prism.regions(snapshot, disk, since)) as answers:
        async for page in answers:
            pages += 1
            if found is None:
                found = RegionMap(page.file_size)
            if page.file_size != found.file_size or pages > _PAGES_MAX:
                raise PrismAnswerError(f"changed regions of disk {disk.disk} contradict each other")
            for extent in page.regions:
                if since is None:
                    if not extent.zero:
                        found.add(extent)
                    continue
                if extent.offset > reached:
                    found.add(Extent(reached, extent.offset - reached))
                found.add(extent)
                reached = max(reached, extent.end)
    if found is None:
        found = RegionMap(disk.size)
    if since is not None and reached < found.file_size:
        found.add(Extent(reached, found.file_size - reached))
    return found


__all__ = ["COUNT_MAX", "RegionMap", "fetch_map"]
