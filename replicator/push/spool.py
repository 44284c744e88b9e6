# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the source keeps of a push until it is settled: each stream without its payloads, and the maps of digests.

The skeleton lets a push go on after the process died, and brings the map to the new point once it is committed, so
that no memory grows with the disk. All functions block.
"""

from __future__ import annotations

from pathlib import Path

from replicator import durable
from replicator.domain.model import PointDisk
from replicator.errors import DamageError, PhcbtError, StateError
from replicator.imagemap import ImageMap, RootBuilder
from replicator.phcbt.encode import StreamWriter
from replicator.phcbt.format import EncodedRecord, StreamHeader
from replicator.phcbt.resume import SkeletonReader

_FLUSH = 1 << 18


class Spool:
    """The skeleton of one disk's stream in a push, and the writer that stands where it ends."""

    def __init__(self, path: Path, header: StreamHeader) -> None:
        self.path = path
        self.header = header
        self._file = durable.DurableFile(path, create=True)
        self.writer = StreamWriter(header)
        self._length = 0
        self._buffer = bytearray()
        self.rewind(1 << 62)

    def rewind(self, watermark: int) -> None:
        """Go back to the last place at or below ``watermark`` (of the stream) where sending can go on."""
        self.flush()
        try:
            reader = SkeletonReader(self._file.fd)
            if reader.header != self.header:
                raise PhcbtError(0, "another push's spool")
            cut = reader.resume(watermark)
            self.writer, self._length = cut.writer, cut.skeleton_position
        except PhcbtError:  # not even a header: from the start
            self.writer, self._length = StreamWriter(self.header), 0
        if self._file.size != self._length:
            self._file.truncate(self._length)

    def start(self) -> list[bytes | memoryview]:
        """The stream's header, if the stream has not begun."""
        if self.writer.position:
            return []
        head = self.writer.start()
        self._append(head)
        return [head]

    def add(self, record: EncodedRecord) -> list[bytes | memoryview]:
        """The record's bytes for the line; its skeleton is kept."""
        pieces = self.writer.add(record)
        self._append(record.skeleton)
        return pieces

    def _append(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= _FLUSH:
            self.flush()

    def flush(self) -> None:
        """Write down what was added: a process that ends loses nothing of it. A few hundred bytes a chunk, to be called
        before they are sent, so that a later process can go on from what the receiver has.
        """
        if self._buffer:
            self._file.write_at(self._buffer, self._length)
            self._length += len(self._buffer)
            self._buffer = bytearray()

    def finish(self) -> list[bytes | memoryview]:
        """The end of the stream; the skeleton is durable then."""
        self.flush()
        self._file.sync()
        durable.sync_dir(self.path.parent)
        return [self.writer.finish()]

    def close(self) -> None:
        """Close the file; it stays, with everything added."""
        self.flush()
        self._file.close()


def new_root(skeleton: Path, map_path: Path, disk: PointDisk, full: bool) -> bytes:
    """The disk's image root after a push, nothing written. ``full``: the stream has no base."""
    with durable.DurableFile(skeleton) as file:
        reader = SkeletonReader(file.fd)
        if full:
            header = reader.header
            builder = RootBuilder(header.algorithm, header.grain, disk.size)
            for run in reader.runs():
                builder.add(run.first, run.digests, run.count)
            return builder.root()
        with ImageMap.open(map_path) as known:
            return known.preview(reader.runs(), disk.size)


def advance_map(skeleton: Path, map_path: Path, disk: PointDisk, point: int) -> None:
    """Bring the disk's map to a committed point. Can be repeated. Raises DamageError, StateError."""
    if disk.since != point:
        with ImageMap.open(map_path) as known:
            if known.point == point and known.root() == disk.root:
                return
    with durable.DurableFile(skeleton) as file:
        reader = SkeletonReader(file.fd)
        if disk.since == point:
            durable.unlink(map_path)
            header = reader.header
            ImageMap.create(map_path, header.algorithm, header.grain, disk.size, 0).close()
        with ImageMap.open(map_path) as known:
            known.apply(reader.runs(), disk.size, point, expected_root=disk.root)
    durable.sync_dir(map_path.parent)


def map_is_at(map_path: Path, disk: PointDisk, point: int) -> bool:
    """Whether the map is usable and at this point."""
    try:
        with ImageMap.open(map_path) as known:
            return known.point == point and known.root() == disk.root
    except (DamageError, StateError):
        return False
