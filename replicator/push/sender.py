# SPDX-License-Identifier: AGPL-3.0-or-later
"""Sending one disk's stream: records go out in order, in messages of about a megabyte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from replicator.disk import DiskView, Extent
from replicator.imagemap import ImageMap
from replicator.phcbt.format import EncodedRecord
from replicator.push.connection import Connection
from replicator.push.pipeline import DEPTH, Encoder, chunks, chunks_to_compare, ordered
from replicator.push.spool import Spool
from replicator.wire.messages import DATA_MAX

#: zstd level of data on the line.
LEVEL = 1
_MESSAGE_TARGET = 1 << 20


@dataclass(slots=True)
class DiskJob:
    """One disk of a push. ``since`` asks change tracking; ``known`` is compared with; with neither all is sent."""

    disk: str
    index: int
    view: DiskView
    since: str | None
    known: ImageMap | None
    spool: Spool

    def close(self) -> None:
        """Close the files."""
        self.spool.close()
        if self.known is not None:
            self.known.close()


class _Outbox:
    """Gathers pieces of a stream into messages."""

    def __init__(self, connection: Connection, disk: int, position: int) -> None:
        self._connection = connection
        self._disk = disk
        self._position = position
        self._pieces: list[bytes | memoryview] = []
        self._size = 0

    async def add(self, pieces: list[bytes | memoryview]) -> None:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                part = view[: DATA_MAX - self._size]
                self._pieces.append(part)
                self._size += len(part)
                view = view[len(part) :]
                if self._size == DATA_MAX:
                    await self.flush()
        if self._size >= _MESSAGE_TARGET:
            await self.flush()

    async def flush(self) -> None:
        if self._size:
            pieces, self._pieces = self._pieces, []
            size, self._size = self._size, 0
            await self._connection.data(self._disk, self._position, pieces)
            self._position += size


async def send_disk(
    job: DiskJob, connection: Connection, cpus: trio.CapacityLimiter, report: Callable[[int], None]
) -> None:
    """Send the disk's stream from where its spool stands to its end.

    Raises what the view and the connection raise; the spool then holds what was sent, or more.
    """
    spool = job.spool
    box = _Outbox(connection, job.index, spool.writer.position)
    await box.add(spool.start())
    start = spool.writer.disk_end
    if job.known is not None:
        todo = chunks_to_compare(job.view, spool.header, job.known, start)
    else:
        todo = chunks(job.view, spool.header, job.since, start)
    encoder = Encoder(job.view, spool.header, LEVEL, job.known, cpus)

    async def encode(extent: Extent) -> tuple[int, list[EncodedRecord]]:
        return extent.end, await encoder.encode(extent)

    async with ordered(todo, encode, DEPTH) as results:
        async for end, records in results:
            for record in records:
                await box.add(spool.add(record))
            report(end)
    await box.add(await trio.to_thread.run_sync(spool.finish))
    await box.flush()
    report(job.view.size)
