# SPDX-License-Identifier: AGPL-3.0-or-later
"""The map of a disk's grain digests and the root above it, in a sparse file.

The root names the content: equal roots, equal disks (docs/image-root.md). Keeping it costs what
changed, not what the disk holds. The map knows nothing of where digests come from, and never reads
the disk. All calls block: callers run them in worker threads, one at a time for each map.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Self

from replicator import durable
from replicator.durable import DurableFile, StrPath
from replicator.errors import DamageError, StateError
from replicator.imagemap.check import HEADER_LEVEL, Checker, Finding
from replicator.imagemap.layout import (
    HEADER_SIZE,
    REGIONS,
    AppliedPages,
    MapHeader,
    RebuiltNodes,
    StoredPages,
    read_page,
)
from replicator.imagemap.tree import (
    FANOUT,
    HEIGHT_MAX,
    NODE_SIZE,
    ZERO_NODE,
    Fold,
    PageStore,
    RootBuilder,
    check_shape,
    disk_root,
    grain_count,
    node_of,
    page_size,
    vm_root,
)
from replicator.phcbt.format import Algorithm, GrainRun

__all__ = [
    "FANOUT",
    "HEADER_LEVEL",
    "RUN_MAX",
    "Finding",
    "ImageMap",
    "MapWriter",
    "RootBuilder",
    "disk_root",
    "vm_root",
]

#: The longest run, in grains, that ``iter_nonzero_runs`` gives.
RUN_MAX = 4096


class ImageMap:
    """The digests of every grain of one disk at one recovery point.

    ``root()``, ``point`` and ``disk_size`` always belong together, also after an apply was cut
    short; ``digests`` may then be those of either point until the same apply is repeated.
    """

    def __init__(self, file: DurableFile, header: MapHeader) -> None:
        """Use ``create`` or ``open``."""
        self._file = file
        self._header = header

    @classmethod
    def create(
        cls, path: StrPath, algorithm: Algorithm, grain: int, disk_size: int, point: int
    ) -> ImageMap:
        """Make the map of a disk of zeros, durably, whole or not at all, and open it.

        A crash may leave ``path + ".new"``, which sweeps remove. Raises StateError if there is
        a map already, ValueError if grain or size (bytes) are out of bounds.
        """
        check_shape(grain, disk_size)
        _check_point(point)
        header = MapHeader(algorithm, grain, disk_size, point, ZERO_NODE)
        try:
            with DurableFile(path):
                raise StateError(f"there is an image map at {path} already")
        except FileNotFoundError:
            durable.write_file(path, header.encode())
        return cls.open(path)

    @classmethod
    def open(cls, path: StrPath) -> ImageMap:
        """Open a map; raises StateError if it is none or of another version, DamageError if its
        header is damaged. Pages are not looked at.
        """
        try:
            file = DurableFile(path)
        except OSError as error:
            raise StateError(f"cannot open the image map {path}: {error.strerror}") from error
        try:
            return cls(file, MapHeader.decode(file.read_at(HEADER_SIZE, 0), file.path))
        except BaseException:
            file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        self._file.close()

    @property
    def algorithm(self) -> Algorithm:
        """How the grains were digested."""
        return self._header.algorithm

    @property
    def grain(self) -> int:
        """Bytes of a grain."""
        return self._header.grain

    @property
    def disk_size(self) -> int:
        """Size of the disk in bytes."""
        return self._header.disk_size

    @property
    def grains(self) -> int:
        """How many grains the disk has."""
        return self._header.grains

    @property
    def point(self) -> int:
        """The recovery point whose content this is."""
        return self._header.point

    @property
    def height(self) -> int:
        """How many levels of pages there are, the leaves included."""
        return self._header.height

    def root(self) -> bytes:
        """The disk root at ``point``, 32 bytes; reads nothing."""
        return self._header.root

    def digests(self, first: int, count: int) -> bytes:
        """The digests of ``count`` grains from ``first`` on, one after the other; zeros for grains
        of zeros. Not verified: ``check`` does that. Raises ValueError outside the disk.
        """
        if first < 0 or count <= 0 or first + count > self.grains:
            raise ValueError(f"{count} grains from {first} are not within {self.grains}")
        size = self.algorithm.digest_size
        return self._file.read_at(count * size, REGIONS[0] + first * size).ljust(
            count * size, b"\0"
        )

    def page_fits(self, index: int, digests: bytes) -> bool:
        """Whether the node above page ``index`` of 256 grains is that of these digests.

        So a digest that does not fit a grain can be told from a grain that does not fit its digest.
        """
        page = digests.ljust(page_size(self.algorithm, 0), b"\0")
        node = node_of(0, page)
        if self._header.height == 1:
            return node == self._header.top
        above = read_page(self._file, self.algorithm, 1, index // FANOUT)
        at = index % FANOUT * NODE_SIZE
        return above[at : at + NODE_SIZE] == node

    def page(self, level: int, index: int) -> bytes:
        """A whole page (docs/image-root.md): 256 digests at level 0, 256 nodes above. Zeros outside the map; above its top
        what the levels would hold that it may grow to.

        Raises DamageError if the page is not the one that the node above it stands for.
        """
        if not 0 <= level < HEIGHT_MAX or index < 0:
            raise ValueError(f"page {index} of level {level}")
        header = self._header
        if index and index * FANOUT ** (level + 1) >= header.grains:
            return bytes(page_size(header.algorithm, level))
        if level < header.height:
            return StoredPages(self._file, header).load(level, index)
        node = header.top
        for below in range(header.height, level):
            node = node_of(below, node.ljust(page_size(header.algorithm, below), b"\0"))
        return node.ljust(page_size(header.algorithm, level), b"\0")

    def iter_nonzero_runs(self, start: int = 0) -> Iterator[GrainRun]:
        """The grains that are not zeros, from ``start`` on, ascending, in runs of at most RUN_MAX;
        two runs may touch. Holes of the file are skipped unread. Not verified, as ``digests``.
        """
        size = self.algorithm.digest_size
        at = start
        while at < self.grains:
            data = self._file.next_data(REGIONS[0] + at * size)
            if data is None:
                return
            at = max(at, (data - REGIONS[0]) // size)
            count = min(RUN_MAX, self.grains - at)
            if count > 0:
                yield from _nonzero_runs(at, self.digests(at, count), size)
            at += RUN_MAX

    def preview(self, runs: Iterable[GrainRun], disk_size: int) -> bytes:
        """The root that ``apply`` would lead to; writes nothing.

        Costs what the pages of 256 grains cost that the runs touch, and holds one page a level.
        Raises ValueError if the runs are not ascending and inside, StateError if the disk would
        shrink, DamageError if a page that is needed does not fit the node above it (which is so
        as well after an apply was cut short: repeat that first).
        """
        fold = self._fold(disk_size, StoredPages(self._file, self._header))
        for run in runs:
            fold.put(run)
        top = fold.finish()
        top = self._header.top if top is None else top
        return disk_root(self.algorithm, self.grain, disk_size, top)

    def apply(
        self,
        runs: Iterable[GrainRun],
        disk_size: int,
        point: int,
        expected_root: bytes | None = None,
    ) -> bytes:
        """Write the runs' digests, make them durable, and only then stand at ``point``; the root.

        Cut short at any step, it is to be repeated with the same runs, and leads to the same
        file. With ``expected_root``, raises DamageError before the header is written if the map
        comes to another one. Raises ValueError and StateError as ``preview``; the runs before the
        wrong one have been written then, as in an apply cut short.
        """
        writer = self.write(disk_size, point)
        for run in runs:
            writer.put(run)
        return writer.finish(expected_root)

    def write(self, disk_size: int, point: int) -> MapWriter:
        """An apply whose runs come one by one, as they are made. Raises ValueError and StateError as ``preview``."""
        _check_point(point)
        return MapWriter(self, disk_size, point)

    def check(self) -> Iterator[Finding]:
        """Read the whole map and find every damaged page, from the top down. Writes nothing.

        Mend a page of digests by applying the grains' true digests again, as a run over the whole
        page, to the same point with ``expected_root=root()``; pages of nodes by ``rebuild_nodes``.
        """
        return Checker(self._file, self._header).findings()

    def rebuild_nodes(self) -> bool:
        """Make every node anew from the digests, durably. True if they come to the root of
        ``point`` again; if not, digests are damaged as well. Can be repeated after a crash.
        """
        store = RebuiltNodes(self._file, self._header)
        store.clear_nodes()
        fold = Fold(self.algorithm, self.grains, store)
        for run in self.iter_nonzero_runs():
            fold.put(run)
        top = fold.finish()
        self._file.sync()
        return (top or ZERO_NODE) == self._header.top

    def _fold(self, disk_size: int, store: PageStore) -> Fold:
        check_shape(self.grain, disk_size)
        if disk_size < self.disk_size:
            raise StateError(
                f"the disk has {self.disk_size} bytes and cannot shrink to {disk_size}"
            )
        grains = grain_count(disk_size, self.grain)
        return Fold(self.algorithm, grains, store, grown_from=self._header.height)


class MapWriter:
    """See ``ImageMap.write``. Until ``finish`` the map is as after an apply that was cut short."""

    def __init__(self, image: ImageMap, disk_size: int, point: int) -> None:
        self._map = image
        self._header = replace(image._header, disk_size=disk_size, point=point)
        self._fold = image._fold(disk_size, AppliedPages(image._file, image._header))

    def put(self, run: GrainRun) -> None:
        """Set the digests of a run. Raises ValueError if it is not after the last or not inside the disk."""
        self._fold.put(run)

    def finish(self, expected_root: bytes | None = None) -> bytes:
        """Make everything durable, then let the map stand at the point; the root. Raises DamageError as ``apply``."""
        top, file = self._fold.finish(), self._map._file
        header = self._header if top is None else replace(self._header, top=top)
        if expected_root is not None and header.root != expected_root:
            raise DamageError(f"the image map {file.path} does not come to the root expected")
        file.sync()
        file.write_at(header.encode(), 0)
        file.sync()
        self._map._header = header
        return header.root


def _check_point(point: int) -> None:
    if not 0 <= point < 1 << 64:
        raise ValueError(f"{point} is no recovery point")


def _nonzero_runs(first: int, digests: bytes, size: int) -> Iterator[GrainRun]:
    zero = bytes(size)
    if zero not in digests:
        yield GrainRun(first, len(digests) // size, digests)
        return
    start = -1  # offset in ``digests`` where the run began that is open
    for at in range(0, len(digests), size):
        if digests[at : at + size] != zero:
            start = at if start < 0 else start
        elif start >= 0:
            yield GrainRun(first + start // size, (at - start) // size, digests[start:at])
            start = -1
    if start >= 0:
        yield GrainRun(first + start // size, (len(digests) - start) // size, digests[start:])
