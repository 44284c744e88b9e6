# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where things lie in a map's file, and the stores that a fold reads and writes it through.

The file is sparse: a header, then each level's pages in a region large enough for the largest disk
in the smallest grains, upper levels first, the digests last. So a page's place never moves.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from replicator.durable import DurableFile
from replicator.errors import DamageError, StateError
from replicator.imagemap.tree import (
    FANOUT,
    HEIGHT_MAX,
    NODE_SIZE,
    ZERO_NODE,
    check_shape,
    disk_root,
    grain_count,
    height_of,
    node_of,
    page_size,
)
from replicator.phcbt.format import Algorithm

HEADER_SIZE = 4096
VERSION = 1
_MAGIC = b"RCTLMAP\n"
_FIELDS = struct.Struct(">8sHBxIQQ32s")
_CHECK = struct.Struct(">Q")

#: First byte of each level's region, and of what would come after the last.
REGIONS = (64 << 30, 1 << 30, 128 << 20, 1 << 20, 8 << 10)
REGION_ENDS = ((64 << 30) + (8 << 40), 33 << 30, 256 << 20, 2 << 20, 16 << 10)
assert len(REGIONS) == HEIGHT_MAX


@dataclass(frozen=True, slots=True)
class MapHeader:
    """What a map is of, which recovery point it stands at, and the top node at that point.

    The fields and their check lie in the file's first sector, so a torn write leaves the old or
    the new header.
    """

    algorithm: Algorithm
    grain: int
    disk_size: int
    point: int
    top: bytes

    @property
    def grains(self) -> int:
        """How many grains the disk has."""
        return grain_count(self.disk_size, self.grain)

    @property
    def height(self) -> int:
        """How many levels of pages the map has."""
        return height_of(self.grains)

    @property
    def root(self) -> bytes:
        """The disk root at the point."""
        return disk_root(self.algorithm, self.grain, self.disk_size, self.top)

    def encode(self) -> bytes:
        """The header as it stands in the file, 4 KiB."""
        fields = _FIELDS.pack(
            _MAGIC, VERSION, self.algorithm, self.grain, self.disk_size, self.point, self.top
        )
        check = _CHECK.pack(xxhash.xxh3_64_intdigest(fields))
        return (fields + check).ljust(HEADER_SIZE, b"\0")

    @classmethod
    def decode(cls, data: bytes, path: str) -> MapHeader:
        """Raises StateError if this is no map that we can read, DamageError if it was one."""
        if len(data) != HEADER_SIZE or not data.startswith(_MAGIC):
            raise StateError(f"{path} is not an image map")
        fields = data[: _FIELDS.size]
        (check,) = _CHECK.unpack_from(data, _FIELDS.size)
        if check != xxhash.xxh3_64_intdigest(fields) or any(data[_FIELDS.size + _CHECK.size :]):
            raise DamageError(f"the header of the image map {path} is damaged")
        _, version, algorithm, grain, disk_size, point, top = _FIELDS.unpack(fields)
        if version != VERSION:
            raise StateError(f"the image map {path} has version {version}, not {VERSION}")
        try:
            check_shape(grain, disk_size)
            known = Algorithm(algorithm)
        except ValueError as error:
            raise DamageError(f"the header of the image map {path} is impossible") from error
        return cls(known, grain, disk_size, point, top)


def page_offset(algorithm: Algorithm, level: int, index: int) -> int:
    """Where a page begins in the file."""
    return REGIONS[level] + index * page_size(algorithm, level)


def read_page(file: DurableFile, algorithm: Algorithm, level: int, index: int) -> bytes:
    """A whole page; what lies beyond the file's end is zeros."""
    size = page_size(algorithm, level)
    return file.read_at(size, page_offset(algorithm, level, index)).ljust(size, b"\0")


class StoredPages:
    """A fold's store that only reads: for a preview. What is loaded must fit the node above it."""

    def __init__(self, file: DurableFile, header: MapHeader) -> None:
        self._file = file
        self._header = header
        self._height = header.height

    def load(self, level: int, index: int) -> bytes:
        """The page; raises DamageError if it is not the one that the node above stands for."""
        page = self._read(level, index)
        if level < self._height and node_of(level, page) != self._expected(level, index):
            raise DamageError(
                f"page {index} of level {level} of the image map {self._file.path} does not fit "
                "the node above it: damaged, or an apply was cut short and must be repeated"
            )
        return page

    def store(self, level: int, index: int, page: bytes | bytearray) -> None:
        """Nothing."""

    def clear(self, level: int, index: int) -> None:
        """Nothing."""

    def _read(self, level: int, index: int) -> bytes:
        """Levels that the disk has only grown to hold nothing yet but the old top."""
        if level >= self._height:
            old = self._header.top if (level, index) == (self._height, 0) else b""
            return old.ljust(FANOUT * NODE_SIZE, b"\0")
        return read_page(self._file, self._header.algorithm, level, index)

    def _expected(self, level: int, index: int) -> bytes:
        if level + 1 == self._height:
            return ZERO_NODE if index else self._header.top
        at = REGIONS[level + 1] + index * NODE_SIZE
        return self._file.read_at(NODE_SIZE, at).ljust(NODE_SIZE, b"\0")


class AppliedPages(StoredPages):
    """A fold's store that writes in place.

    Nothing is verified on the way in: after a crash the pages of the apply that was cut short do
    not fit, and repeating it must mend them. Every page touched is written, also if it looks the
    same: the page cache may know more than the disk.
    """

    def load(self, level: int, index: int) -> bytes:
        """The page as it is."""
        return self._read(level, index)

    def store(self, level: int, index: int, page: bytes | bytearray) -> None:
        """Write the page; one of zeros becomes a hole if there is anything to be removed."""
        at = page_offset(self._header.algorithm, level, index)
        if page != bytes(len(page)):
            self._file.write_at(page, at)
        elif self._file.has_data(at, len(page)):
            self._file.punch(at, len(page))

    def clear(self, level: int, index: int) -> None:
        """Make holes of a page and of all below it."""
        for below in range(level + 1):
            pages = FANOUT ** (level - below)
            size = page_size(self._header.algorithm, below)
            at = REGIONS[below] + index * pages * size
            # Where there are no holes, zeros are written: no more than the file is long.
            length = min(pages * size, self._file.size - at)
            if length > 0 and self._file.has_data(at, length):
                self._file.punch(at, length)


class RebuiltNodes(AppliedPages):
    """A fold's store that makes the nodes anew from the digests, and leaves these alone."""

    def load(self, level: int, index: int) -> bytes:
        """Only digests are taken from the file: the nodes are what is in doubt."""
        if level:
            return bytes(page_size(self._header.algorithm, level))
        return self._read(level, index)

    def store(self, level: int, index: int, page: bytes | bytearray) -> None:
        """Write pages of nodes only."""
        if level:
            super().store(level, index, page)

    def clear_nodes(self) -> None:
        """Forget every node."""
        for start, end in zip(REGIONS[1:], REGION_ENDS[1:], strict=True):
            if self._file.has_data(start, end - start):
                self._file.punch(start, end - start)
