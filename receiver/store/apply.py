# SPDX-License-Identifier: AGPL-3.0-or-later
"""Writing a committed delta into the replica, and saving what it overwrites first. All functions block.

What is overwritten is held against the replica's map. A grain that is not what was recorded is saved with the digest that
was, so that the points that need it go on failing at exactly this grain, instead of reading as something else.

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
from replicator.disk import Extent
from replicator.domain.model import PointDisk
from replicator.domain.vm import DAMAGES_MAX
from replicator.errors import DamageError, StateError
from replicator.phcbt.encode import StreamWriter, encode_chunk, encode_data
from replicator.phcbt.format import EncodedRecord, StreamHeader
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


@dataclass(frozen=True, slots=True)
class Saved:
    """A reverse delta, and the ranges of the disk in it that were damaged in the replica already (a bounded number)."""

    path: Path
    damaged: list[Extent]


def build_reverse(paths: VmPaths, forward: Path, going: Overwritten) -> Saved:
    """Save, durably, what ``forward`` will overwrite of the replica. Raises PhcbtError, DamageError for ``forward``."""
    old = going.disk
    target = paths.reverse(going.point, old)
    damaged: list[Extent] = []
    if target.exists():
        return Saved(target, damaged)
    durable.make_dir(paths.point(going.point))
    partial = target.with_suffix(".building")
    delta = StoredDelta(forward)
    replica = Replica(paths.replica(old), paths.replica_map(old))
    try:
        if replica.map is not None and replica.map.point != going.point:
            replica.forget_map()  # of another point, it says nothing of this content
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
            _write_stream(file, StreamWriter(header), _old_records(delta, header, replica, damaged))
            file.sync()
    finally:
        replica.close()
        delta.close()
    durable.rename(partial, target)
    return Saved(target, damaged)


def _old_records(
    delta: StoredDelta, header: StreamHeader, replica: Replica, damaged: list[Extent]
) -> Iterator[EncodedRecord]:
    """The records of a reverse delta; damaged grains stand alone, so that they cost no other, and go into ``damaged``."""
    grain, size = header.grain, header.digest_size
    for offset, plain in _old_content(delta, header, replica):
        first = offset // grain
        differing = replica.differing(first, header.algorithm.digest_grains(plain, grain))
        known = replica.known(first, header.grains(len(plain))) if differing else None
        done = 0
        for number in differing:
            assert known is not None
            at = (number - first) * grain
            if at > done:
                yield from encode_chunk(header, offset + done, plain[done:at], _REVERSE_LEVEL)
            done = min(at + grain, len(plain))
            digest = known[(number - first) * size : (number - first + 1) * size]
            yield encode_data(header, offset + at, plain[at:done], None, digest)
            _note(damaged, Extent(offset + at, done - at))
        if done < len(plain):
            yield from encode_chunk(header, offset + done, plain[done:], _REVERSE_LEVEL)


def _note(damaged: list[Extent], found: Extent) -> None:
    """Neighbours are one; past the bound nothing is added, since nothing more would be recorded of the point."""
    if damaged and damaged[-1].end == found.offset:
        damaged[-1] = Extent(damaged[-1].offset, damaged[-1].length + found.length)
    elif len(damaged) < DAMAGES_MAX:
        damaged.append(found)


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
    file: durable.DurableFile, writer: StreamWriter, records: Iterator[EncodedRecord]
) -> None:
    position = _put(file, 0, [writer.start()])
    for record in records:
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
