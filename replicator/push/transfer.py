# SPDX-License-Identifier: AGPL-3.0-or-later
"""One push over one connection: open it, send every disk's stream from where the two sides stand, have it committed."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import trio

from replicator.config import Config
from replicator.disk import DiskView, MadeReadable
from replicator.domain.model import PointDisk
from replicator.errors import SnapshotGoneError, WireError
from replicator.imagemap import vm_root
from replicator.push.compression import Compression
from replicator.push.connection import Connection
from replicator.push.files import PushFiles
from replicator.push.journal import PushEntry
from replicator.push.progress import Progress
from replicator.push.sampling import GRACE_S, IDLE_EVERY, IDLE_GRACE_S, Tracked, sampling
from replicator.push.sender import DiskJob, Sender
from replicator.sources.base import Snapshot
from replicator.wire import messages as m

_logger = logging.getLogger(__name__)

#: Chunks that are read, beside one for each processor that are encoded, at once.
READERS = 2
#: Times that the two sides look for a place where both can go on.
_OPENS_MAX = 3


@dataclass
class Tally:
    """Bytes of a push that were at the receiver already when it was gone on with, and bytes that were sent again."""

    resumed: int = 0
    resent: int = 0


@dataclass
class Transfer:
    """The sending of one VM's pushes. ``rng`` draws what is sampled."""

    config: Config
    vm: str
    name: str
    files: PushFiles
    report: Callable[[Progress], None]
    rng: random.Random = field(default_factory=random.SystemRandom)
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        cpus = os.cpu_count() or 1
        # More than there are: a thread that reads waits for the disk, and zstd and digests let go of the interpreter.
        self.cpus = trio.CapacityLimiter(cpus + READERS)
        self._compression = Compression.of(
            self.config.dr_compression,
            workers=max(1, cpus - 1),  # one has the line to serve
            clock=trio.current_time,
            line=self.config.max_bandwidth_mbps * 1e6 / 8 or None,
        )

    async def send(
        self, connection: Connection, entry: PushEntry, snapshot: Snapshot
    ) -> tuple[m.Committed, int]:
        """Send everything and have it committed; the receiver's answer, and the grains that were sampled.

        Raises what the snapshot's views, the maps and the connection raise, and ChangesMissedError.
        """
        jobs: list[DiskJob] = []
        try:
            await self._add_jobs(jobs, entry, snapshot)
            ready = await self._agree(connection, entry, jobs)
            if isinstance(ready, m.Committed):
                return ready, 0
            connection.begin(ready.positions, self.config.chunk)
            # Once for each push: a line that breaks all the time must not fill the log.
            level = logging.DEBUG if self.tally.resumed else logging.INFO
            safe = sum(ready.positions)
            # No session may be long enough for an Ack. That each goes on further than the one before is progress as well.
            connection.progressed |= safe > self.tally.resumed
            self.tally.resumed = safe
            if self.tally.resumed:
                text = "%d bytes are safe at the receiver already"
                _logger.log(level, text, self.tally.resumed)
            report = self._progress(jobs)
            for job in jobs:  # where it is taken up
                report(job, job.spool.writer.disk_end)
            size = self.config.verify_sample_mib << 20
            idle_too = self.rng.randrange(IDLE_EVERY) == 0
            tracked = self._tracked(entry, jobs, idle_too=idle_too)
            grace_s = IDLE_GRACE_S if any(_is_idle(each.view) for each in tracked) else GRACE_S
            async with sampling(tracked, size, self.rng, grace_s) as sample:
                sender = Sender(connection, self._compression, self.cpus, report)
                await sender.send(
                    jobs, at_once=min(self.config.concurrent_disks, connection.disks_at_once)
                )
            await snapshot.check()
            disks = await trio.to_thread.run_sync(self.files.final_disks, entry)
            finish = self.finish(entry, disks, jobs, sample.clean)
            return await connection.ask(finish, m.Committed), sample.clean
        finally:
            for job in jobs:
                job.close()

    async def _add_jobs(self, jobs: list[DiskJob], entry: PushEntry, snapshot: Snapshot) -> None:
        views = {disk.identity: disk.view for disk in snapshot.disks}
        for index, disk in enumerate(entry.disks or ()):
            view = views.get(disk.identity)
            if view is None or view.size != disk.size:
                raise SnapshotGoneError(f"{disk.disk} is not in the snapshot as it was")
            jobs.append(await trio.to_thread.run_sync(self.files.job, entry, index, disk, view))

    async def _agree(
        self, connection: Connection, entry: PushEntry, jobs: list[DiskJob]
    ) -> m.Ready | m.Committed:
        """Where each stream goes on: no further than the receiver has it, and where this side can take it up."""
        for _ in range(_OPENS_MAX):
            have = [job.spool.writer.position for job in jobs]
            ready = await connection.ask(self.open(entry, have), m.Ready, m.Committed)
            if isinstance(ready, m.Committed):
                if not all(have):
                    raise WireError("the receiver says that it committed what was never sent to it")
                return ready
            if ready.push_id != entry.push_id:
                raise WireError("the receiver is ready for another push")
            if len(ready.positions) != len(jobs):
                raise WireError("the receiver is ready for another number of disks")
            if any(at > had for at, had in zip(ready.positions, have, strict=True)):
                raise WireError("the receiver would go on behind what was sent to it")
            self.tally.resent += sum(have) - sum(ready.positions)
            for job, position in zip(jobs, ready.positions, strict=True):
                await trio.to_thread.run_sync(job.spool.rewind, position)
            if [job.spool.writer.position for job in jobs] == list(ready.positions):
                return ready
        raise WireError("the receiver cannot go on where this side can")

    def _tracked(self, entry: PushEntry, jobs: list[DiskJob], *, idle_too: bool) -> list[Tracked]:
        """The disks whose changes are told by change tracking. ``idle_too``: also those that nothing is read of but the sample,
        though they must be made readable for it.
        """
        return [
            Tracked(disk.disk, job.view, job.since, self.files.known_map(disk), entry.parent)
            for disk, job in zip(entry.disks or (), jobs, strict=True)
            if job.since is not None and (idle_too or not _is_idle(job.view))
        ]

    def _progress(self, jobs: list[DiskJob]) -> Callable[[DiskJob, int], None]:
        def report(job: DiskJob, done: int) -> None:
            sent = sum(each.spool.writer.position for each in jobs)
            self.report(Progress(job.disk, done, job.view.size, sent))

        return report

    def open(self, entry: PushEntry, have: Iterable[int]) -> m.Open:
        """The message that begins the push; ``have``: where this side can go on, for each disk."""
        disks = tuple(
            m.OpenDisk(disk.disk, disk.identity, disk.size, disk.since, position)
            for disk, position in zip(entry.disks or (), have, strict=True)
        )
        return m.Open(
            vm=self.vm,
            name=self.name,
            epoch=entry.epoch,
            push_id=entry.push_id,
            kind=entry.kind,
            point=entry.point,
            parent=entry.parent,
            parent_root=entry.parent_root,
            taken_at_us=entry.taken_at_us,
            disks=disks,
        )

    def finish(
        self, entry: PushEntry, disks: list[PointDisk], jobs: list[DiskJob], sampled: int
    ) -> m.Finish:
        """The message that ends it."""
        return m.Finish(
            push_id=entry.push_id,
            root=vm_root([(disk.disk, disk.size, disk.root) for disk in disks]),
            disks=tuple(
                m.FinalDisk(disk.root, job.spool.writer.root)
                for disk, job in zip(disks, jobs, strict=True)
            ),
            duration_us=since_us(entry.started_us),
            sampled=sampled,
            compared=entry.is_compared,
        )


def since_us(started_us: int) -> int:
    """How long it took, by the wall clock, which may have been set back meanwhile."""
    return max(0, time.time_ns() // 1000 - started_us)


def _is_idle(view: DiskView) -> bool:
    """Whether it would be made readable for a sample alone."""
    return isinstance(view, MadeReadable) and not view.must_be_read


__all__ = ["Tally", "Transfer", "since_us"]
