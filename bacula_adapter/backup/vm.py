# SPDX-License-Identifier: AGPL-3.0-or-later
"""The backup of one VM in one job: prepared and read ahead, written out when its turn comes, concluded by Bacula's verdict."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import msgspec
import trio

from bacula_adapter.backend.interface import (
    TERMINATED_OK,
    BackupOutput,
    FileEntry,
    JobInfo,
)
from bacula_adapter.backup.alone import Alone
from bacula_adapter.backup.base import (
    Base,
    Chosen,
    DiskPlan,
    Way,
    ask_tracking,
    choose_base,
    plan_disk,
    told,
)
from bacula_adapter.backup.chain import Chain, Entry, maps_of
from bacula_adapter.backup.disks import DiskBackup, PartShape, Turn
from bacula_adapter.backup.machine import Machine
from bacula_adapter.backup.parts import describe, record
from bacula_adapter.description import Description, PartDisk, encode_file
from bacula_adapter.names import VirtualName
from replicator.config import Config
from replicator.domain.backup import BackupPart, Backups, PartName
from replicator.errors import ReplicatorError, SourceError
from replicator.hardware import Hardware
from replicator.log import open_log
from replicator.nursery import flat_nursery
from replicator.phcbt.format import Algorithm
from replicator.push.naming import disk_names
from replicator.sources.base import Snapshot

_logger = logging.getLogger(__name__)

_ALGORITHMS: Final = {"xxh3-128": Algorithm.XXH3_128, "blake3-256": Algorithm.BLAKE3_256}
#: How long letting go of a snapshot's connections may take once everything else was cancelled. Seconds.
_CLOSE_S: Final = 10.0
_VERDICTS: Final = {"A": "the job was cancelled"}


@dataclass(slots=True, kw_only=True)
class VmBackup:
    """One VM of a job. ``own``: the configuration of its chain, whose folder the caller holds.

    ``cpus`` and ``ahead`` are those of the whole job: threads, and disks that may be read before their turn.
    """

    job: JobInfo
    own: Config
    machine: Machine
    cpus: trio.CapacityLimiter
    ahead: trio.Semaphore
    part: BackupPart | None = None
    description: Description | None = None
    #: Names of images and parts that the backup, with those before it, is made of.
    images: frozenset[str] = frozenset()
    line: frozenset[PartName] = frozenset()
    _entry: Entry | None = None
    _failure: str = ""
    _alone: Alone | None = None
    _disks: dict[int, PartDisk] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What people call the VM."""
        return self.machine.folder

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[Chain]:
        async with (
            open_log(self.own.state_dir / "events") as log,
            self.machine.open_source(self.own, log) as source,
        ):
            yield Chain(log, source, maps_of(self.own), self.machine.uuid, self.name)

    # Reading

    async def run(self, output: BackupOutput, turn: Turn, written: Callable[[], None]) -> None:
        """Take the snapshot, and write the VM's files when ``turn`` returns; then ``written`` is called. Nothing counts yet.

        Raises what source, log, maps and output raise. Cancelled or failed, it is to be concluded all the same.
        """
        try:
            if self.machine.alone is not None:
                self._alone = Alone(self.machine.alone, self.name)
                await self._alone.take()
            async with self._opened() as chain:
                await chain.open(clean_up=self.own.job_cleanup_on_abort)
                await self._back_up(chain, output, turn, written)
        except (ReplicatorError, OSError) as error:
            self._failure = str(error)
            raise

    async def _back_up(
        self, chain: Chain, output: BackupOutput, turn: Turn, written: Callable[[], None]
    ) -> None:
        known, started_us = chain.known, _now_us()
        base = choose_base(self.job.level, self.job.previous, known)
        if base.why is not None:
            _logger.warning("%s: %s", self.name, told(base.why))
        entry = Entry(
            push_id=self.machine.push_id(self.own),
            reference=known.last.push_id if known.last is not None else None,
            part=secrets.token_hex(4),
            number=known.next_number,
            job=self.job.name,
            job_id=self.job.job_id,
            level=self.job.level,
            started_us=started_us,
        )
        self._entry = entry
        await chain.begin(entry)
        snapshot = await chain.source.take(entry.snapshot)
        try:
            hardware = await self._hardware()
            plans = await self._plan(chain, snapshot, base, entry.reference)
            shape = self._shape(entry, known, base, snapshot)
            await self._write_disks(chain, output, turn, shape, plans)
            await snapshot.check()
            self.description = describe(
                self.job,
                shape,
                base=base.part,
                chain=known.last.chain if known.last is not None else shape.part,
                point=self.machine.point,
                taken_at_us=snapshot.taken_at_us,
                disks=[self._disks[number] for number in range(len(plans))],
                hardware=hardware,
            )
            await self._write_description(output, self.description, shape)
            self._read(entry, known, base)
            written()
        finally:
            with trio.move_on_after(_CLOSE_S, shield=True):
                await snapshot.aclose()

    async def _hardware(self) -> Hardware | None:
        """What the VM is made of; that it cannot be told is no reason not to back its disks up."""
        try:
            return await self.machine.hardware()
        except SourceError as error:
            _logger.warning(
                "%s: its hardware cannot be described, a restore will have its disks only: %s",
                self.name,
                error,
            )
            return None

    async def _plan(
        self, chain: Chain, snapshot: Snapshot, base: Base, reference: str | None
    ) -> list[DiskPlan]:
        known = chain.known
        names = disk_names(known.disk_names, [disk.identity for disk in snapshot.disks])
        chosen = Chosen(
            base=base.part,
            last=known.last,
            loss=self.machine.loss,
            misfit=chain.maps.misfit,
        )
        plans = []
        for disk in snapshot.disks:
            plan = await trio.to_thread.run_sync(
                plan_disk, chosen, names[disk.identity], disk.identity, disk.view
            )
            plan = await ask_tracking(plan, snapshot, reference, self.machine.loss)
            if plan.why is not None:
                _logger.warning(
                    "%s: %s: %s",
                    self.name,
                    plan.disk,
                    told(plan.why, compared=plan.way is not Way.FULL),
                )
            plans.append(plan)
        here = {disk.identity for disk in snapshot.disks}
        for old in base.part.disks if base.part is not None else ():
            if old.identity not in here:
                _logger.warning("%s: %s (%s) is gone", self.name, old.disk, old.identity)
        return plans

    def _shape(self, entry: Entry, known: Backups, base: Base, snapshot: Snapshot) -> PartShape:
        algorithm = _ALGORITHMS[self.own.dr_digest]
        if base.part is not None:
            algorithm = Algorithm(base.part.algorithm)
        return PartShape(
            root=self.machine.root,
            folder=self.machine.folder,
            uuid=self.machine.uuid,
            number=entry.number,
            part=entry.part,
            base=None if base.part is None else (base.part.number, base.part.part),
            last=None if known.last is None else known.last.part,
            reference=entry.reference,
            algorithm=algorithm,
            chunk=self.own.chunk,
            mtime_s=snapshot.taken_at_us // 1_000_000,
        )

    async def _write_disks(
        self,
        chain: Chain,
        output: BackupOutput,
        turn: Turn,
        shape: PartShape,
        plans: Sequence[DiskPlan],
    ) -> None:
        """Disk after disk, so many of them at work at once."""
        turns = [trio.Event() for _ in range(len(plans) + 1)]
        places = trio.Semaphore(self.own.concurrent_disks)

        async def begin() -> None:
            await turn()
            turns[0].set()

        async def one(number: int, plan: DiskPlan) -> None:
            async with self._reading_ahead(turns[number]) as now:
                backup = DiskBackup(shape, plan, chain.maps, self.cpus, now)
                self._disks[number] = await backup.run(output)
            turns[number + 1].set()
            places.release()

        async with flat_nursery() as nursery:
            nursery.start_soon(begin)
            for number, plan in enumerate(plans):
                await places.acquire()
                nursery.start_soon(one, number, plan)

    @asynccontextmanager
    async def _reading_ahead(self, turn: trio.Event) -> AsyncIterator[Turn]:
        """A place among the disks that are read before their turn, until that has come; where there is none, wait for the turn."""
        try:
            self.ahead.acquire_nowait()
        except trio.WouldBlock:
            await turn.wait()
            yield turn.wait
            return
        held = True

        async def wait() -> None:
            nonlocal held
            await turn.wait()
            held = False
            self.ahead.release()

        try:
            yield wait
        finally:
            if held:
                self.ahead.release()

    async def _write_description(
        self, output: BackupOutput, description: Description, shape: PartShape
    ) -> None:
        """The last of the VM's files: roots are known only now."""
        data = encode_file(description)
        name = VirtualName(shape.root, shape.folder, "description", "", shape.number, shape.part)
        await output.begin(FileEntry(name=str(name), size=len(data), mtime_s=shape.mtime_s))
        await output.data(0, data)
        await output.end()

    def _read(self, entry: Entry, known: Backups, base: Base) -> None:
        """All of it was handed over."""
        assert self.description is not None
        part = record(
            self.description,
            base=base.part,
            vm=self.machine.name,
            push_id=entry.push_id,
            now_us=_now_us(),
        )
        self.part = part
        self.images = frozenset(disk.image for disk in part.disks)
        self.line = frozenset(known.line_of(part))
        _logger.info(
            "Backup complete: VM=%s disks=%d bytes=%d",
            self.name,
            len(part.disks),
            part.bytes_stored,
        )

    # The verdict

    async def conclude(self, status: str) -> None:
        """Bacula's verdict: with ``T`` the part counts, else the snapshot goes. Raises what the log or the source does."""
        try:
            if self._entry is not None:
                await self._conclude(self._entry, status)
                self._entry = None
        finally:
            if self._alone is not None:
                self._alone.give_up()

    async def _conclude(self, entry: Entry, status: str) -> None:
        async with self._opened() as chain:
            if status == TERMINATED_OK and self.part is not None:
                now = _now_us()
                took_us = max(0, now - entry.started_us)
                part = msgspec.structs.replace(self.part, committed_at_us=now, duration_us=took_us)
                await chain.commit(entry, part)
            else:
                reason = self._failure or _VERDICTS.get(
                    status, f"Bacula ended the job with status {status}"
                )
                await chain.abandon(entry, reason)


def _now_us() -> int:
    return time.time_ns() // 1000


__all__ = ["VmBackup"]
