# SPDX-License-Identifier: AGPL-3.0-or-later
"""Finding what is damaged in a map's file, to the page, from the top down.

The header is checked, so its top node is to be trusted; a page that fits a trusted node is to be
trusted as well. A page of nodes that does not fit is made anew from the pages below it: if that
fits, the damage is in this page alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from replicator.durable import DurableFile
from replicator.errors import ReplicatorError
from replicator.imagemap.layout import (
    HEADER_SIZE,
    REGION_ENDS,
    REGIONS,
    MapHeader,
    page_offset,
    read_page,
)
from replicator.imagemap.tree import (
    FANOUT,
    HEIGHT_MAX,
    NODE_PAGE_SIZE,
    NODE_SIZE,
    ZERO_NODE,
    node_of,
    page_size,
    slots_in,
)

#: The level of a finding about the header.
HEADER_LEVEL = -1


@dataclass(frozen=True, slots=True)
class Finding:
    """A damaged page of a map: its level (0 = digests, -1 = header), its index in the level, and
    the grains below it, ``count`` from ``first`` on (none for data outside the map).
    """

    level: int
    index: int
    first: int
    count: int
    reason: str


class Checker:
    """One walk over a map's file; holds one page a level."""

    def __init__(self, file: DurableFile, header: MapHeader) -> None:
        self._file = file
        self._header = header
        self._algorithm = header.algorithm
        self._grains = header.grains
        self._height = header.height

    def findings(self) -> Iterator[Finding]:
        """Every damaged page, from the top down."""
        try:
            stored = MapHeader.decode(self._file.read_at(HEADER_SIZE, 0), self._file.path)
        except ReplicatorError as error:
            yield Finding(HEADER_LEVEL, 0, 0, self._grains, str(error))
        else:
            if stored != self._header:
                yield Finding(HEADER_LEVEL, 0, 0, self._grains, "changed since it was opened")
        if self._header.top == ZERO_NODE:
            yield from self._not_zero(self._height - 1, 0, 1)
        else:
            yield from self._visit(self._height - 1, 0, self._header.top)
        yield from self._outside()

    def _finding(self, level: int, index: int, reason: str) -> Finding:
        span = FANOUT ** (level + 1)
        first = min(index * span, self._grains)
        return Finding(level, index, first, min(span, self._grains - first), reason)

    def _visit(self, level: int, index: int, expected: bytes) -> Iterator[Finding]:
        page = read_page(self._file, self._algorithm, level, index)
        if node_of(level, page) != expected:
            if level == 0:
                yield self._finding(0, index, "the digests do not fit the node above them")
                return
            anew = self._from_below(level, index)
            if node_of(level, anew) == expected:
                yield self._finding(level, index, "nodes are damaged, the level below is whole")
                page = anew
            else:
                yield self._finding(level, index, "nodes do not fit, nor does the level below")
        if level:
            yield from self._visit_below(level, index, page)

    def _from_below(self, level: int, index: int) -> bytes:
        first = index * FANOUT
        nodes = [
            node_of(level - 1, read_page(self._file, self._algorithm, level - 1, first + slot))
            for slot in range(slots_in(level, index, self._grains))
        ]
        return b"".join(nodes).ljust(NODE_PAGE_SIZE, b"\0")

    def _visit_below(self, level: int, index: int, page: bytes) -> Iterator[Finding]:
        zero_from = 0  # slots from here up to the one looked at are zero
        count = slots_in(level, index, self._grains)
        for slot in range(count):
            node = page[slot * NODE_SIZE : (slot + 1) * NODE_SIZE]
            if node == ZERO_NODE:
                continue
            yield from self._not_zero(level - 1, index * FANOUT + zero_from, slot - zero_from)
            zero_from = slot + 1
            yield from self._visit(level - 1, index * FANOUT + slot, node)
        yield from self._not_zero(level - 1, index * FANOUT + zero_from, count - zero_from)

    def _not_zero(self, level: int, index: int, count: int) -> Iterator[Finding]:
        """Pages that are not zeros in subtrees whose nodes say that they are."""
        for below in range(level, -1, -1) if count else ():
            pages = FANOUT ** (level - below)
            start = page_offset(self._algorithm, below, index * pages)
            end = page_offset(self._algorithm, below, (index + count) * pages)
            end = min(end, page_offset(self._algorithm, below, self._pages_at(below)))
            for found in self._pages_with_content(below, start, end):
                yield self._finding(below, found, "not zeros, as the node above says")

    def _pages_at(self, level: int) -> int:
        return -(-self._grains // FANOUT ** (level + 1)) if level < self._height else 0

    def _outside(self) -> Iterator[Finding]:
        """What lies in the regions beyond the disk's last page (a growth cut short leaves it)."""
        for level in range(HEIGHT_MAX - 1, -1, -1):
            start = page_offset(self._algorithm, level, self._pages_at(level))
            for found in self._pages_with_content(level, start, REGION_ENDS[level]):
                yield Finding(level, found, self._grains, 0, "data outside the map")

    def _pages_with_content(self, level: int, start: int, end: int) -> Iterator[int]:
        size = page_size(self._algorithm, level)
        at = start
        while at < end:
            data = self._file.next_data(at)
            if data is None or data >= end:
                return
            index = (data - REGIONS[level]) // size
            if any(read_page(self._file, self._algorithm, level, index)):
                yield index
            at = REGIONS[level] + (index + 1) * size
