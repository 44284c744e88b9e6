# SPDX-License-Identifier: AGPL-3.0-or-later
"""Writing a committed delta into the replica, and saving what it overwrites first. All functions block.

Each step can be repeated after a crash: a reverse delta is built beside its name and renamed when it is durable, and is
never built again once its name exists, because then the replica may hold new content already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from receiver.store.layout import VmPaths
from receiver.store.maps import remake_replica_map, update_map
from receiver.store.view import Replica, Shape
from replicator import durable
from replicator.domain.model import PointDisk
from replicator.errors import DamageError, StateError
from replicator.phcbt.encode import StreamWriter, encode_chunk
from replicator.phcbt.format import StreamHeader
from replicator.phcbt.read import StoredDelta

#: Old content is stored lightly compressed: it is read rarely, and must not slow the apply down.
_REVERSE_LEVEL = 1


@dataclass(frozen=True, slots=True)
class Overwritten:
    """What an apply takes from the replica: a disk of a VM, as of one point, for the next."""

    vm: UUID
    disk: PointDisk
    point: int
    next_point: int


def build_reverse(paths: VmPaths, forward: Path, going: Overwritten) -> Path:
    """Save, durably, what ``forward`` will overwrite of the replica; returns the reverse delta's path."""
    old = going.disk
    target = paths.reverse(going.point, old)
    if target.exists():
        return target
    durable.make_dir(paths.point(going.point))
    partial = target.with_suffix(".building")
    delta = StoredDelta(forward)
    replica = Replica(paths.replica(old), None)
    try:
        header = StreamHeader(
            vm=going.vm,
            disk_id=old.disk,
            disk_size=old.size,
            grain=delta.header.grain,
            chunk=delta.header.chunk,
            algorithm=delta.header.algorithm,
            base_point=going.next_point,
            base_root=bytes(32),  # what lies above was not kept: the chain is the log's
            target_point=going.point,
        )
        with durable.DurableFile(partial, create=True) as file:
            file.truncate(0)
            _write_stream(file, StreamWriter(header), _old_content(delta, header, replica))
            file.sync()
    finally:
        replica.close()
        delta.close()
    durable.rename(partial, target)
    return target


def _old_content(
    delta: StoredDelta, header: StreamHeader, replica: Replica
) -> Iterator[tuple[int, bytes]]:
    """The replica's content wherever ``delta`` holds something, in chunks, inside the old size."""
    for extent in delta.extents():
        at, end = extent.offset, min(extent.end, header.disk_size)
        while at < end:
            length = min(end - at, header.chunk)
            yield at, replica.read(at, length)
            at += length


def _write_stream(
    file: durable.DurableFile, writer: StreamWriter, chunks: Iterator[tuple[int, bytes]]
) -> None:
    position = _put(file, 0, [writer.start()])
    for offset, plain in chunks:
        for record in encode_chunk(writer.header, offset, plain, _REVERSE_LEVEL):
            position = _put(file, position, writer.add(record))
    _put(file, position, [writer.finish()])


def _put(file: durable.DurableFile, position: int, pieces: list[bytes | memoryview]) -> int:
    data = b"".join(pieces)
    file.write_at(data, position)
    return position + len(data)


def write_replica(paths: VmPaths, forward: Path, disk: PointDisk, point: int) -> int:
    """Bring a replica and its map to ``point`` by the forward delta, durably; returns the bytes written.

    A map that is lost or damaged is made again. Raises PhcbtError, DamageError, also if the content is not the recorded one then.
    """
    delta = StoredDelta(forward)
    try:
        written = 0
        with durable.DurableFile(paths.replica(disk), create=True) as file:
            if file.size < disk.size:
                file.truncate(disk.size)
            for extent in delta.extents():
                for offset, piece in delta.read(extent.offset, extent.length):
                    if isinstance(piece, int):
                        file.punch(offset, piece)
                    else:
                        file.write_at(piece, offset)
                        written += len(piece)
            file.sync()
        try:
            update_map(paths.replica_map(disk), delta, disk, point)
        except (DamageError, StateError):
            # The map itself may be what is damaged: the content says.
            shape = Shape.of(delta.header)
            remake_replica_map(paths, disk, point, shape)
        durable.sync_dir(paths.replica(disk).parent)
        return written
    finally:
        delta.close()
