# SPDX-License-Identifier: AGPL-3.0-or-later
"""The definition of an image's root: nodes, heights, roots (docs/image-root.md).

``Fold`` is the one algorithm over it: runs of grain digests in ascending order go in, every page
that they touch is folded once, and the top node comes out. It holds one open page a level. Where
pages come from and go to is a ``PageStore``: a file, a file that is only read, or nothing at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol

from replicator.phcbt.format import DISK_SIZE_MAX, GRAIN_MAX, GRAIN_MIN, Algorithm, GrainRun

FANOUT = 256
NODE_SIZE = 32
#: A page of 256 nodes; the size of a leaf page depends on the algorithm.
NODE_PAGE_SIZE = FANOUT * NODE_SIZE
ZERO_NODE = bytes(NODE_SIZE)

#: 2^50 bytes in grains of 4 KiB are 2^38 grains, and 256^5 is the first power above.
HEIGHT_MAX = 5

_LEAF_TAG = b"replctl image leaf v1\0"
_NODE_TAG = b"replctl image node v1\0"
_ROOT_TAG = b"replctl image root v1\0"
_VM_TAG = b"replctl vm root v1\0"


def check_shape(grain: int, disk_size: int) -> None:
    """Raise ValueError unless the grain (bytes) and the disk's size (bytes) are within bounds."""
    if not GRAIN_MIN <= grain <= GRAIN_MAX or grain & (grain - 1):
        raise ValueError(f"a grain of {grain} bytes is not a power of two from 4 KiB to 1 MiB")
    if not 1 <= disk_size <= DISK_SIZE_MAX:
        raise ValueError(f"a disk of {disk_size} bytes is not within 1 byte to 2^50 bytes")


def grain_count(disk_size: int, grain: int) -> int:
    """How many grains the disk has; the last may lie only partly inside."""
    return -(-disk_size // grain)


def height_of(grains: int) -> int:
    """The number of levels of pages: the least h >= 1 with 256^h >= grains."""
    height, reach = 1, FANOUT
    while reach < grains:
        height, reach = height + 1, reach * FANOUT
    return height


def page_size(algorithm: Algorithm, level: int) -> int:
    """Bytes of a page: level 0 holds 256 digests, a level above 256 nodes."""
    return NODE_PAGE_SIZE if level else FANOUT * algorithm.digest_size


def slots_in(level: int, index: int, grains: int) -> int:
    """How many of the 256 slots of page ``index`` of ``level`` are inside the disk."""
    below: int = -(-grains // FANOUT**level)
    return max(0, min(FANOUT, below - index * FANOUT))


def node_of(level: int, page: bytes | bytearray) -> bytes:
    """The node that stands for a whole page: 32 zero bytes for a page of zeros."""
    if page == bytes(len(page)):
        return ZERO_NODE
    return hashlib.sha256((_NODE_TAG if level else _LEAF_TAG) + page).digest()


def disk_root(algorithm: Algorithm, grain: int, disk_size: int, top: bytes) -> bytes:
    """The 32-byte name of a disk's content, from the top node of its map."""
    height = height_of(grain_count(disk_size, grain))
    shape = int(algorithm).to_bytes(1) + grain.to_bytes(4) + disk_size.to_bytes(8)
    return hashlib.sha256(_ROOT_TAG + shape + height.to_bytes(1) + top).digest()


def vm_root(disks: Iterable[tuple[str, int, bytes]]) -> bytes:
    """The 32-byte name of a whole VM's content, from (disk id, size in bytes, disk root) of each.

    The order given does not matter: disks are sorted by the bytes of their ids. Raises ValueError
    if an id occurs twice or a root is not 32 bytes.
    """
    by_id: dict[bytes, tuple[int, bytes]] = {}
    for name, size, root in disks:
        if (key := name.encode()) in by_id:
            raise ValueError(f"disk {name} occurs twice")
        if len(root) != NODE_SIZE:
            raise ValueError(f"the root of disk {name} has {len(root)} bytes")
        by_id[key] = (size, root)
    digest = hashlib.sha256(_VM_TAG + len(by_id).to_bytes(4))
    for key in sorted(by_id):
        size, root = by_id[key]
        digest.update(len(key).to_bytes(2) + key + size.to_bytes(8) + root)
    return digest.digest()


class PageStore(Protocol):
    """Where a fold's pages come from and go to. Levels count from the leaves, 0."""

    def load(self, level: int, index: int) -> bytes:
        """The whole page as it was before this fold."""
        ...

    def store(self, level: int, index: int, page: bytes | bytearray) -> None:
        """Keep the whole page."""
        ...

    def clear(self, level: int, index: int) -> None:
        """Make the page, and every page below it, zeros."""
        ...


class NoPages:
    """A store for an image that is computed from scratch: nothing was there, nothing is kept."""

    def __init__(self, algorithm: Algorithm) -> None:
        self._algorithm = algorithm

    def load(self, level: int, index: int) -> bytes:
        """A page of zeros."""
        del index
        return bytes(page_size(self._algorithm, level))

    def store(self, level: int, index: int, page: bytes | bytearray) -> None:
        """Nothing."""

    def clear(self, level: int, index: int) -> None:
        """Nothing."""


class _OpenPage:
    """A page being filled in ascending order, and which of its slots have been set."""

    __slots__ = ("data", "index", "spans", "width")

    def __init__(self, index: int, width: int) -> None:
        self.index = index
        self.width = width
        self.data = bytearray(FANOUT * width)
        self.spans: list[tuple[int, int]] = []

    def set(self, slot: int, count: int, values: bytes | memoryview) -> None:
        self.data[slot * self.width : (slot + count) * self.width] = values
        if self.spans and self.spans[-1][1] == slot:
            self.spans[-1] = (self.spans[-1][0], slot + count)
        else:
            self.spans.append((slot, slot + count))

    def is_whole(self, slots: int) -> bool:
        return self.spans == [(0, slots)]

    def over(self, old: bytes) -> bytearray:
        """The page as it was, with the slots that have been set on top."""
        merged = bytearray(old)
        for start, end in self.spans:
            at = slice(start * self.width, end * self.width)
            merged[at] = self.data[at]
        return merged


class Fold:
    """Folds ascending runs into the top node; holds one page a level, each touched page once.

    ``grown_from`` is the height before, if the disk has grown: the new levels start with the
    old top at their first slot, so their first pages are folded whatever the runs touch.
    """

    def __init__(
        self, algorithm: Algorithm, grains: int, store: PageStore, grown_from: int | None = None
    ) -> None:
        self._algorithm = algorithm
        self._grains = grains
        self._store = store
        self._height = height_of(grains)
        self._open: list[_OpenPage | None] = [None] * self._height
        self._top: bytes | None = None
        self._next = 0
        for level in range(grown_from or self._height, self._height):
            self._open[level] = _OpenPage(0, NODE_SIZE)

    def put(self, run: GrainRun) -> None:
        """Set the digests of a run. Raises ValueError if it is not after the last or not inside."""
        if run.first < self._next or run.count <= 0 or run.first + run.count > self._grains:
            raise ValueError(
                f"{run.count} grains from {run.first} are not within {self._next} to {self._grains}"
            )
        self._next = run.first + run.count
        if run.digests is None:
            self._put_zeros(run.first, self._next)
            return
        size = self._algorithm.digest_size
        if len(run.digests) != run.count * size:
            raise ValueError(f"{len(run.digests)} bytes are not {run.count} digests")
        digests = memoryview(run.digests)
        at = run.first
        while at < self._next:
            index, slot = divmod(at, FANOUT)
            count = min(FANOUT - slot, self._next - at)
            taken = (at - run.first) * size
            self._page(0, index).set(slot, count, digests[taken : taken + count * size])
            at += count

    def _put_zeros(self, at: int, end: int) -> None:
        """Zeros: the largest subtrees that they cover go as a whole, so a vast run costs little."""
        size = self._algorithm.digest_size
        while at < end:
            level = self._covered_level(at, end)
            if level < 0:
                index, slot = divmod(at, FANOUT)
                count = min(FANOUT - slot, end - at)
                self._page(0, index).set(slot, count, bytes(count * size))
                at += count
                continue
            for below in range(level + 1):
                self._close(below)
            span = FANOUT ** (level + 1)
            index = at // span
            self._store.clear(level, index)
            self._set_node(level, index, ZERO_NODE)
            at = min(at + span, end)

    def _covered_level(self, at: int, end: int) -> int:
        """The highest level of a page that begins at ``at`` and lies inside the run, or -1."""
        level = -1
        while level + 1 < self._height:
            span = FANOUT ** (level + 2)
            if at % span or (at + span > end and end < self._grains):
                break
            level += 1
        return level

    def finish(self) -> bytes | None:
        """Fold what is open; the top node, or None if nothing was touched."""
        for level in range(self._height):
            self._close(level)
        return self._top

    def _page(self, level: int, index: int) -> _OpenPage:
        page = self._open[level]
        if page is not None and page.index == index:
            return page
        for below in range(level + 1):
            self._close(below)
        width = NODE_SIZE if level else self._algorithm.digest_size
        self._open[level] = page = _OpenPage(index, width)
        return page

    def _close(self, level: int) -> None:
        page, self._open[level] = self._open[level], None
        if page is None:
            return
        data = page.data
        if not page.is_whole(slots_in(level, page.index, self._grains)):
            data = page.over(self._store.load(level, page.index))
        self._store.store(level, page.index, data)
        self._set_node(level, page.index, node_of(level, data))

    def _set_node(self, level: int, index: int, node: bytes) -> None:
        """Put a page's node into its slot one level up, or at the top."""
        if level + 1 == self._height:
            self._top = node
            return
        parent, slot = divmod(index, FANOUT)
        self._page(level + 1, parent).set(slot, 1, node)


class RootBuilder:
    """The root of an image from its grains' digests alone, in ascending order; what is not added is
    zeros.
    """

    def __init__(self, algorithm: Algorithm, grain: int, disk_size: int) -> None:
        check_shape(grain, disk_size)
        self._shape = (algorithm, grain, disk_size)
        self._fold = Fold(algorithm, grain_count(disk_size, grain), NoPages(algorithm))

    def add(self, first: int, digests: bytes | None, count: int) -> None:
        """Add ``count`` grains from ``first`` on: their digests, or None for zeros. Raises
        ValueError if they are not after the last ones added or not inside the disk.
        """
        self._fold.put(GrainRun(first, count, digests))

    def root(self) -> bytes:
        """The disk root, 32 bytes. The builder is spent: adding more gives no second root."""
        top = self._fold.finish()
        return disk_root(*self._shape, ZERO_NODE if top is None else top)
