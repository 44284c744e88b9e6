# SPDX-License-Identifier: AGPL-3.0-or-later
"""Seeds and cycles of one VM at its source: plan, snapshot, send, commit, settle; resume what a crash or a cut left.

The order of durable steps: journal entry, snapshot, spool, the receiver's commit, our event, the source's new reference,
our maps, journal entry gone. Each can be repeated, so a push may stop between any two of them and be taken up later.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from uuid import UUID

import msgspec
import trio
from eventsourcing.persistence import PersistenceError

from replicator.config import Config
from replicator.disk import Extent
from replicator.domain.model import Point, PointDisk, PushKind, next_disk_name
from replicator.domain.vm import ProtectedVm
from replicator.errors import (
    DamageError,
    FencedError,
    PeerRefusedError,
    PhcbtError,
    ReferenceLostError,
    RefusedError,
    ReplicatorError,
    SnapshotGoneError,
    StateError,
    UsageError,
    WireError,
)
from replicator.imagemap import vm_root
from replicator.log import EventLog
from replicator.push import journal, trouble
from replicator.push.compare import compare_heads
from replicator.push.connection import Connection, ConnectionLostError, connect
from replicator.push.files import PushFiles
from replicator.push.journal import EntryDisk, PushEntry
from replicator.push.plan import GiveUp, Local, Refuse, Resume, Start, Want, plan
from replicator.push.schedule import backoff_s
from replicator.push.sender import DiskJob, send_disk
from replicator.sources.base import Snapshot, Source
from replicator.wire import messages as m
from replicator.wire.keys import PreSharedKey

_logger = logging.getLogger(__name__)

#: How long a command goes on trying after the line broke; ``run`` never gives up. Seconds.
PATIENCE_S = 120
#: Plans in a row before it is clear that they lead nowhere.
_PLANS_MAX = 8
#: After these refusals the push can never be committed: it is given up.
_HOPELESS = {"wrong-parent", "root-mismatch", "damaged-stream", "bad-request", "shrink", "state"}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a push is: ``done`` of ``total`` bytes of a disk looked at, ``sent`` bytes on the line in all."""

    disk: str
    done: int
    total: int
    sent: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """A push that is a recovery point now.

    ``resumed``: an earlier session or process began it; ``resumed_bytes`` of its bytes were safe at the receiver already.
    """

    point: Point
    resumed: bool
    reason: str
    resumed_bytes: int = 0


class Pusher:
    """Pushes one VM. One task at a time; the state directory is locked by the caller."""

    def __init__(
        self,
        config: Config,
        log: EventLog,
        source: Source,
        key: PreSharedKey,
        *,
        report: Callable[[Progress], None] = lambda _: None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._config = config
        self._log = log
        self._source = source
        self._key = key
        self._report = report
        self._patience_s = patience_s
        self._cpus = trio.CapacityLimiter(os.cpu_count() or 1)
        self._swept = False
        self._resumed_bytes = 0
        self._vm_id = UUID(int=0)
        self._files = PushFiles(config, self._vm_id)
        self._name = ""

    @property
    def _vm(self) -> ProtectedVm:
        vm = self._log.get(self._vm_id)
        assert vm is not None
        return vm

    async def push(self, want: Want) -> Outcome:
        """Make the next point, or finish the one that was begun.

        Goes on over broken lines until nothing more has become durable for as long as the patience given.
        Raises RefusedError (with PeerRefusedError), SourceError, AuthenticationError, WireError, ConnectionLostError.
        Cancelled, it leaves everything as a crash would. Attempts of PUSH and RUN that fail are written down for status
        until the next point (``trouble``); a seed that is refused says nothing of the protection that there is.
        """
        try:
            outcome = await self._push_patiently(want)
        except (ReplicatorError, OSError) as error:
            await self._note_failure(want, error)
            raise
        await trouble.clear(self._log, self._vm.vm)
        return outcome

    async def _note_failure(self, want: Want, error: BaseException) -> None:
        """For status. That it cannot be written down is logged: the push's own error matters more."""
        if want not in (Want.PUSH, Want.RUN):
            return
        # A source that cannot be asked does not say which VM it is: it is the one that was pushed from here.
        vms = [self._vm.vm] if self._vm_id.int else [vm.vm for vm in self._log.vms]
        try:
            for vm in vms:
                await trouble.note(self._log, vm, error, time.time_ns() // 1000)
        except (OSError, PersistenceError) as failure:
            _logger.error("what failed cannot be written down for status: %s", failure)

    async def _push_patiently(self, want: Want) -> Outcome:
        await self._prepare()
        attempt, reached = 0, False
        deadline = trio.current_time() + self._patience_s
        while True:
            try:
                async with connect(self._config, self._key) as connection:
                    reached = True
                    try:
                        return await self._session(connection, want)
                    finally:
                        # Only what became durable counts: a line that breaks at the same place each time leads nowhere.
                        if connection.progressed:
                            attempt, deadline = 0, trio.current_time() + self._patience_s
            except ConnectionLostError as error:
                endless = self._patience_s == float("inf")
                if not endless and (not reached or trio.current_time() > deadline):
                    raise
                pause = backoff_s(attempt, random.random())
                _logger.warning("%s; trying again in %.1f s", error, pause)
                await self._note_failure(want, error)
                attempt += 1
                await trio.sleep(pause)

    async def _prepare(self) -> None:
        identity = await self._source.identify()
        if not m.is_vm_name(identity.name):
            raise UsageError(
                f"vm: {identity.name[:80]!r} cannot be the name of a VM (1 to 255 characters, no slash)"
            )
        self._vm_id, self._name = identity.uuid, identity.name
        await self._log.register(identity.uuid, identity.name, "source")
        self._files = PushFiles(self._config, identity.uuid)
        await trio.to_thread.run_sync(self._files.prepare)
        entry = await journal.load(self._log, self._vm.vm)
        newest = self._vm.newest
        if entry is not None and newest is not None and newest.push_id == entry.push_id:
            await self._settle(entry, newest)
            entry = None
        if not self._swept:
            reference = newest.push_id if newest else None
            keep = entry.snapshot if entry is not None else None
            for name in await self._source.sweep(keep, reference):
                _logger.warning("removed %s, left by an earlier run", name)
            await trio.to_thread.run_sync(self._files.sweep, entry)
            if newest is not None:
                for disk, kept in await trio.to_thread.run_sync(self._files.other_digest, newest):
                    _logger.warning(
                        "dr_digest = %s holds for new chains only; %s keeps %s until replctl seed --again",
                        self._config.dr_digest,
                        disk,
                        kept,
                    )
            self._swept = True

    # One session

    async def _session(self, connection: Connection, want: Want) -> Outcome:
        for _ in range(_PLANS_MAX):
            state = await connection.ask(m.Query(self._vm.vm, self._name), m.VmState)
            entry = await journal.load(self._log, self._vm.vm)
            match plan(await self._local(entry), state, want):
                case Refuse(reason, fenced):
                    raise FencedError(reason) if fenced else RefusedError(reason)
                case GiveUp(reason):
                    assert entry is not None
                    await self._abandon(entry, reason, connection)
                case Resume():
                    assert entry is not None
                    if (outcome := await self._resume(connection, entry, state)) is not None:
                        return outcome
                case Start() as start:
                    return await self._start(connection, start)
        raise WireError(
            "the receiver's state does not settle: it answers each plan with another point"
        )

    async def _local(self, entry: PushEntry | None) -> Local:
        newest = self._vm.newest
        reference = None
        if newest is not None:
            misfit = await trio.to_thread.run_sync(self._files.misfit, newest)
            if misfit is None:
                reference = m.PointRef(newest.number, newest.root, newest.push_id)
            else:
                _logger.error("%s: the map of %s is lost or damaged", self._name, misfit)
        unfinished = entry.unfinished() if entry is not None else None
        last = max(newest.number if newest is not None else 0, self._vm.abandoned_point)
        return Local(reference, self._vm.epoch, unfinished, last)

    async def _start(self, connection: Connection, start: Start) -> Outcome:
        newest = self._vm.newest
        reference = newest.push_id if newest is not None and start.kind is PushKind.CYCLE else None
        _logger.info("%s of %s to point %d: %s", start.kind, self._name, start.point, start.reason)
        entry = PushEntry.begin(start, reference, self._vm.epoch, time.time_ns() // 1000)
        await journal.store(self._log, self._vm.vm, entry)
        await trio.to_thread.run_sync(self._files.begin, entry)
        snapshot = await self._source.take(entry.snapshot)
        try:
            try:
                disks = await self._name_disks(entry, snapshot)
            except RefusedError as error:
                await self._abandon(entry, str(error), None, raised=True)
                raise
            entry = msgspec.structs.replace(entry, taken_at_us=snapshot.taken_at_us, disks=disks)
            await journal.store(self._log, self._vm.vm, entry)
            return await self._push(connection, entry, snapshot, start.reason, resumed=False)
        finally:
            await _close(snapshot)

    async def _name_disks(self, entry: PushEntry, snapshot: Snapshot) -> tuple[EntryDisk, ...]:
        """Which disk is which, from its identity; raises RefusedError for one that shrank."""
        vm = self._vm
        names, taken = vm.disk_names(), list(vm.disk_names().values())
        self._tell_changed_disks(entry, snapshot)
        lost = snapshot.lost_tracking
        if lost is not None and entry.kind is PushKind.CYCLE:
            _logger.warning(
                "%s: comparing digests instead of change tracking: %s", self._name, lost
            )
            async with self._log.change(self._vm_id) as changing:
                changing.lose_tracking(lost)
        result: list[EntryDisk] = []
        for disk in snapshot.disks:
            name = names.get(disk.identity)
            if name is None:
                wanted = disk.identity if _is_disk_name(disk.identity) else None
                name = wanted if wanted and wanted not in taken else next_disk_name(taken)
                taken.append(name)
                if vm.newest is not None:
                    _logger.info("%s: %s (%s) is new", self._name, name, disk.identity)
            old = vm.newest.disk(name) if vm.newest and disk.identity in names else None
            size = disk.view.size
            if entry.kind is PushKind.SEED or old is None:
                result.append(EntryDisk(name, disk.identity, size, entry.point, False, bytes(32)))
                continue
            if size < old.size:
                raise RefusedError(
                    f"{name} ({disk.identity}) shrank from {old.size} to {size} bytes, which a cycle cannot"
                    " carry: give it back its size, or run replctl seed --again"
                )
            compare = lost is not None or not await _tracks(disk.view.extents(entry.reference))
            result.append(EntryDisk(name, disk.identity, size, old.since, compare, old.root))
        return tuple(result)

    def _tell_changed_disks(self, entry: PushEntry, snapshot: Snapshot) -> None:
        """Log which disks come and go with this push."""
        newest = self._vm.newest
        if newest is None:
            return
        there = {disk.identity for disk in snapshot.disks}
        for old in newest.disks:
            if old.identity not in there:
                _logger.warning(
                    "%s: %s (%s) is gone: it is not protected any more from point %d on",
                    self._name,
                    old.disk,
                    old.identity,
                    entry.point,
                )

    async def _resume(
        self, connection: Connection, entry: PushEntry, state: m.VmState
    ) -> Outcome | None:
        """Go on with a push; None if it had to be given up, and a new plan is needed."""
        if entry.disks is None:
            await self._abandon(entry, "its snapshot was not finished", None)
            return None
        if state.newest is not None and state.newest.push_id == entry.push_id:
            if not await self._still_known(entry):
                return None
            answer = await connection.ask(self._open(entry, [0] * len(entry.disks)), m.Committed)
            point = await self._committed(entry, answer)
            await compare_heads(connection, self._log, self._vm_id, self._name)
            return Outcome(point, True, "it was committed already")
        try:
            snapshot = await self._source.reopen(entry.snapshot)
        except SnapshotGoneError as error:
            await self._abandon(entry, str(error), connection)
            return None
        try:
            _logger.info("going on with the %s to point %d", entry.kind, entry.point)
            return await self._push(connection, entry, snapshot, "went on", resumed=True)
        finally:
            await _close(snapshot)

    async def _still_known(self, entry: PushEntry) -> bool:
        """Whether this side can say what a committed push brought; if not, it is given up, and the next push seeds."""
        try:
            await trio.to_thread.run_sync(self._files.final_disks, entry)
        except (OSError, PhcbtError, DamageError, StateError) as error:
            reason = f"the receiver has it, but this side lost what it sent: {error}"
            await self._abandon(entry, reason, None)
            return False
        return True

    async def _push(
        self,
        connection: Connection,
        entry: PushEntry,
        snapshot: Snapshot,
        reason: str,
        *,
        resumed: bool,
    ) -> Outcome:
        try:
            answer = await self._send(connection, entry, snapshot)
        except PeerRefusedError as error:
            if error.code in _HOPELESS:
                await self._abandon(entry, str(error), None, raised=True)
                if error.code == "root-mismatch":
                    await trio.to_thread.run_sync(self._files.forget_maps)
            raise
        except (DamageError, StateError) as error:
            # A map of ours is damaged or gone. Told to the receiver, which would keep what has landed.
            await self._abandon(entry, str(error), connection, raised=True)
            await trio.to_thread.run_sync(self._files.forget_maps)
            raise
        except (SnapshotGoneError, ReferenceLostError) as error:
            await self._abandon(entry, str(error), None, raised=True)
            raise
        point = await self._committed(entry, answer)
        await compare_heads(connection, self._log, self._vm_id, self._name)
        return Outcome(point, resumed, reason, self._resumed_bytes)

    async def _send(
        self, connection: Connection, entry: PushEntry, snapshot: Snapshot
    ) -> m.Committed:
        views = {disk.identity: disk.view for disk in snapshot.disks}
        jobs: list[DiskJob] = []
        try:
            for index, disk in enumerate(entry.disks or ()):
                view = views.get(disk.identity)
                if view is None or view.size != disk.size:
                    raise SnapshotGoneError(f"{disk.disk} is not in the snapshot as it was")
                jobs.append(
                    await trio.to_thread.run_sync(self._files.job, entry, index, disk, view)
                )
            for _ in range(3):
                have = [job.spool.writer.position for job in jobs]
                ready = await connection.ask(self._open(entry, have), m.Ready, m.Committed)
                if isinstance(ready, m.Committed):
                    return ready
                if len(ready.positions) != len(jobs):
                    raise WireError("the receiver is ready for another number of disks")
                for job, position in zip(jobs, ready.positions, strict=True):
                    await trio.to_thread.run_sync(job.spool.rewind, position)
                if [job.spool.writer.position for job in jobs] == list(ready.positions):
                    break
            else:
                raise WireError("the receiver cannot go on where this side can")
            connection.begin(ready.positions)
            self._resumed_bytes = sum(ready.positions)
            if self._resumed_bytes:
                _logger.info("%d bytes are safe at the receiver already", self._resumed_bytes)
            for job in jobs:
                await send_disk(job, connection, self._cpus, self._progress(jobs, job))
            await snapshot.check()
            disks = await trio.to_thread.run_sync(self._files.final_disks, entry)
            return await connection.ask(self._finish(entry, disks, jobs), m.Committed)
        finally:
            for job in jobs:
                job.close()

    def _progress(self, jobs: list[DiskJob], job: DiskJob) -> Callable[[int], None]:
        def report(done: int) -> None:
            sent = sum(each.spool.writer.position for each in jobs)
            self._report(Progress(job.disk, done, job.view.size, sent))

        return report

    def _open(self, entry: PushEntry, have: Iterable[int]) -> m.Open:
        disks = tuple(
            m.OpenDisk(disk.disk, disk.identity, disk.size, disk.since, position)
            for disk, position in zip(entry.disks or (), have, strict=True)
        )
        return m.Open(
            vm=self._vm.vm,
            name=self._name,
            epoch=entry.epoch,
            push_id=entry.push_id,
            kind=entry.kind,
            point=entry.point,
            parent=entry.parent,
            parent_root=entry.parent_root,
            taken_at_us=entry.taken_at_us,
            disks=disks,
        )

    def _finish(self, entry: PushEntry, disks: list[PointDisk], jobs: list[DiskJob]) -> m.Finish:
        return m.Finish(
            push_id=entry.push_id,
            root=vm_root([(disk.disk, disk.size, disk.root) for disk in disks]),
            disks=tuple(
                m.FinalDisk(disk.root, job.spool.writer.root)
                for disk, job in zip(disks, jobs, strict=True)
            ),
            duration_us=_since_us(entry.started_us),
        )

    # After the receiver's commit

    async def _committed(self, entry: PushEntry, answer: m.Committed) -> Point:
        disks = await trio.to_thread.run_sync(self._files.final_disks, entry)
        root = vm_root([(disk.disk, disk.size, disk.root) for disk in disks])
        if answer.push_id != entry.push_id or answer.point != entry.point or answer.root != root:
            raise WireError(
                f"the receiver committed something else than point {entry.point} of ours"
            )
        point = Point(
            number=entry.point,
            parent=entry.parent,
            push_id=entry.push_id,
            kind=entry.kind,
            epoch=entry.epoch,
            taken_at_us=entry.taken_at_us,
            committed_at_us=answer.committed_at_us,
            duration_us=_since_us(entry.started_us),
            bytes_pushed=answer.bytes_pushed,
            root=root,
            disks=tuple(disks),
        )
        async with self._log.change(self._vm_id) as vm:
            vm.commit(point)
        await self._settle(entry, point)
        _logger.info(
            "DR cycle complete: vm=%s cycle=%d bytes_pushed=%d",
            self._name,
            point.number,
            point.bytes_pushed,
        )
        return point

    async def _settle(self, entry: PushEntry, point: Point) -> None:
        """What follows from our event; can be repeated."""
        await self._source.confirm(entry.snapshot)
        try:
            await trio.to_thread.run_sync(self._files.advance_maps, entry, point)
        except (DamageError, StateError) as error:
            # Without its map the next push cannot be a cycle; the plan will see that and seed.
            _logger.error("%s: %s", self._name, error)
        await journal.settle(self._log, self._vm.vm)
        await trio.to_thread.run_sync(self._files.end, entry)

    async def _abandon(
        self,
        entry: PushEntry,
        reason: str,
        connection: Connection | None,
        *,
        raised: bool = False,
    ) -> None:
        """Give a push up: told to the receiver if it can be, then our event, then what the source made.

        ``raised``: the reason is an error that goes on to the caller, who tells it once.
        """
        if raised:
            _logger.info("the push to point %d is given up", entry.point)
        else:
            _logger.warning("the push to point %d is given up: %s", entry.point, reason)
        if connection is not None:
            abandon = m.Abandon(self._vm.vm, entry.push_id, reason[:1000])
            state = await connection.ask(abandon, m.VmState)
            if state.newest is not None and state.newest.push_id == entry.push_id:
                return  # it was committed before it could be forgotten: the next plan goes on from there
        if entry.disks is not None:
            async with self._log.change(self._vm_id) as vm:
                vm.abandon_push(entry.push_id, entry.point, reason)
        await self._source.abandon(entry.snapshot)
        await journal.settle(self._log, self._vm.vm)
        await trio.to_thread.run_sync(self._files.end, entry)


def _since_us(started_us: int) -> int:
    """How long it took, by the wall clock, which may have been set back meanwhile."""
    return max(0, time.time_ns() // 1000 - started_us)


async def _tracks(extents: AsyncGenerator[Extent, None]) -> bool:
    """Whether change tracking can answer for this disk."""
    try:
        async for _ in extents:
            break
    except ReferenceLostError:
        return False
    finally:
        await extents.aclose()
    return True


async def _close(snapshot: Snapshot) -> None:
    with trio.move_on_after(10, shield=True):
        await snapshot.aclose()


def _is_disk_name(identity: str) -> bool:
    return identity.startswith("disk-") and identity[5:].isdigit()


__all__ = ["Outcome", "Progress", "Pusher"]
