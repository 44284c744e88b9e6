# SPDX-License-Identifier: AGPL-3.0-or-later
"""Sending the streams of a push's disks: records go out in order, in messages of about a megabyte, all disks in turn."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import trio

from replicator.disk import DiskView, Extent
from replicator.imagemap import ImageMap
from replicator.nursery import flat_nursery
from replicator.push.compression import Compression
from replicator.push.connection import Connection
from replicator.push.differing import Differing
from replicator.push.pipeline import (
    DEPTH,
    GROUP,
    Encoded,
    Encoder,
    chunks,
    chunks_of,
    chunks_to_compare,
    grouped,
    ordered,
)
from replicator.push.spool import Spool
from replicator.wire.messages import DATA_MAX

#: Records are gathered into messages of about this size, bytes.
_MESSAGE_TARGET = 1 << 20
#: Chunks that each disk may have under way at least, however many disks there are.
_DEPTH_MIN = 2


@dataclass(slots=True)
class DiskJob:
    """One disk of a push. ``since`` asks change tracking; ``known`` is compared with; ``only`` is what a resync has found to
    differ; with none of them all is sent.
    """

    disk: str
    index: int
    view: DiskView
    since: str | None
    known: ImageMap | None
    spool: Spool
    only: Differing | None = None

    def close(self) -> None:
        """Close the files."""
        self.spool.close()
        if self.known is not None:
            self.known.close()
        if self.only is not None:
            self.only.close()


class _Outbox:
    """Gathers records of a stream into messages, each of whole records where they fit."""

    def __init__(self, connection: Connection, job: DiskJob, compression: Compression) -> None:
        self._connection = connection
        self._compression = compression
        self._disk = job.index
        self._spool = job.spool
        self._position = job.spool.writer.position
        self._pieces: list[bytes | memoryview] = []
        self._size = 0

    async def add(self, pieces: list[bytes | memoryview]) -> None:
        size = sum(map(len, pieces))
        if self._size + size > DATA_MAX:
            await self.flush()
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
            self._spool.flush()
            waited = await self._connection.data(self._disk, self._position, pieces)
            self._compression.sent(size, waited)
            self._position += size

    @property
    def empty(self) -> bool:
        return not self._size


@dataclass(frozen=True, slots=True)
class Sender:
    """Sends the streams of a push over one connection. ``report`` gets a disk and the byte up to which it was looked at."""

    connection: Connection
    compression: Compression
    cpus: trio.CapacityLimiter
    report: Callable[[DiskJob, int], None]

    async def send(self, jobs: list[DiskJob], *, at_once: int) -> None:
        """Send all disks, ``at_once`` of them in turn, each from where its spool stands to its end.

        Raises what the views and the connection raise; the spools then hold what was sent, or more.
        """
        places = trio.Semaphore(at_once)
        depth = max(_DEPTH_MIN, DEPTH // min(at_once, len(jobs)))

        async def send(job: DiskJob) -> None:
            async with places:
                await self._send_disk(job, depth)

        async with flat_nursery() as nursery:
            for job in jobs:
                nursery.start_soon(send, job)

    async def _send_disk(self, job: DiskJob, depth: int) -> None:
        spool = job.spool
        box = _Outbox(self.connection, job, self.compression)
        await box.add(spool.start())
        encoder = Encoder(job.view, spool.header, self.compression, job.known, self.cpus)
        waiting: list[Encoded] = []  # their bytes are in the box
        group_of = encoder.group_of(GROUP)
        todo = grouped(_todo(job), group_of)
        at_once = depth if group_of == 1 else max(_DEPTH_MIN, depth // 2)
        async with ordered(todo, encoder.encode, at_once) as results:
            async for group in results:
                for encoded in group:
                    for record in encoded.records:
                        await box.add(spool.add(record))
                    waiting.append(encoded)
                    if box.empty:
                        while waiting:
                            encoder.sent(waiting.pop())
                self.report(job, group[-1].end)
        await box.add(await trio.to_thread.run_sync(spool.finish))
        await box.flush()
        self.report(job, job.view.size)


def _todo(job: DiskJob) -> AsyncGenerator[Extent, None]:
    """The chunks that are to be read, from where the spool stands."""
    header, start = job.spool.header, job.spool.writer.disk_end
    if job.only is not None:
        return chunks_of(job.only(), header, job.view.size, start)
    if job.known is not None:
        return chunks_to_compare(job.view, header, job.known, start)
    return chunks(job.view, header, job.since, start)
