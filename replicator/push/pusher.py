# SPDX-License-Identifier: AGPL-3.0-or-later
"""Seeds and cycles of one VM at its source: plan, snapshot, send, commit, settle; resume what a crash or a cut left.

The order of durable steps: journal entry, snapshot, spool, the receiver's commit, our event, the source's new reference,
our maps, journal entry gone. Each can be repeated, so a push may stop between any two of them and be taken up later.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import msgspec
import trio
from eventsourcing.persistence import PersistenceError

from replicator.config import Config
from replicator.domain.model import Point
from replicator.domain.vm import ProtectedVm
from replicator.errors import (
    DamageError,
    FencedError,
    PeerRefusedError,
    ReferenceLostError,
    RefusedError,
    ReplicatorError,
    SnapshotGoneError,
    StateError,
    UsageError,
    WireError,
)
from replicator.log import EventLog
from replicator.nursery import flat_nursery
from replicator.push import held, journal, trouble
from replicator.push.compare import compare_heads
from replicator.push.connection import Connection, ConnectionLostError
from replicator.push.ending import Ending
from replicator.push.files import PushFiles
from replicator.push.journal import EntryDisk, PushEntry
from replicator.push.link import Link
from replicator.push.naming import name_disks, tell_gone_disks
from replicator.push.patience import Patience
from replicator.push.plan import GiveUp, Local, OnLoss, Refuse, Resume, Start, Want, plan
from replicator.push.progress import Progress, UnderWay
from replicator.push.resync import Comparer, describe
from replicator.push.sampling import ChangesMissedError
from replicator.push.transfer import Tally, Transfer
from replicator.sources.base import Snapshot, Source
from replicator.wire import messages as m

_logger = logging.getLogger(__name__)

#: How long a command goes on trying after the line broke; ``run`` never gives up. Seconds.
PATIENCE_S = 120
#: Plans in a row before it is clear that they lead nowhere.
_PLANS_MAX = 8
#: What status tells of where it fails.
_NOTED = (Want.PUSH, Want.RUN)
#: After these refusals the push can never be committed: it is given up.
_HOPELESS = {"wrong-parent", "root-mismatch", "damaged-stream", "bad-request", "shrink", "state"}


class TrackingLostError(ReplicatorError):
    """Change tracking cannot answer, and on_reference_loss is not to compare: a new plan is needed."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Bytes of the disks that a resync has compared, and how many of them are in grains that differ."""

    compared: int
    differing: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """A push that is a recovery point now.

    ``resumed``: an earlier session or process began it; ``resumed_bytes`` of its bytes were at the receiver already, and
    ``resent_bytes`` that had been sent were sent again. ``compared``: what a resync has found.
    """

    point: Point
    resumed: bool
    reason: str
    resumed_bytes: int = 0
    resent_bytes: int = 0
    compared: Comparison | None = None


class Pusher:
    """Pushes one VM. One task at a time; the state directory is locked by the caller."""

    def __init__(
        self,
        config: Config,
        log: EventLog,
        source: Source,
        link: Link,
        *,
        report: Callable[[Progress], None] = lambda _: None,
        patience_s: float = PATIENCE_S,
        vm: UUID | None = None,
    ) -> None:
        """``vm``: which one it is, where this host pushes several; else the source says it."""
        self._config = config
        self._expected = vm
        self._on_loss = OnLoss(config.on_reference_loss)
        self._log = log
        self._source = source
        self._link = link
        self._report = report
        #: How far the push is that is under way, if one is.
        self.under_way: UnderWay | None = None
        #: When this pusher tries again, and how often it did.
        self.patience = Patience(link, patience_s)
        self._limits = held.HeldLimits(config, source)
        self._interrupted: str | None = None  # why there was to be a resync, which was cut
        self._incomparable: str | None = None  # why the receiver cannot be compared with
        self._untracked: str | None = (
            None  # why tracking cannot answer, where that is not to be made up for
        )
        self._gone_on_with = ""  # the push of which that was told
        self._swept = False
        self._name = ""
        self._become(UUID(int=0))

    def _become(self, vm: UUID) -> None:
        self._vm_id = vm
        self._files = PushFiles(self._config, vm)
        self._ending = Ending(self._log, self._source, self._files, vm, self._name)
        self.transfer = Transfer(self._config, str(vm), self._name, self._files, self._progressed)

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
        self.transfer.tally = Tally()
        try:
            outcome = await self._push_patiently(want)
        except (ReplicatorError, OSError) as error:
            await self._note_failure(want, error)
            raise
        finally:
            self.under_way = None
        self._interrupted = self._incomparable = self._untracked = None
        await trouble.clear(self._log, self._vm.vm)
        return outcome

    @property
    def reconnects(self) -> dict[str, int]:
        """How often a broken line was made again, by VM, since this process began."""
        return {self._name: self.patience.reconnects} if self._name else {}

    @property
    def name(self) -> str:
        """The VM's name; empty until the source has said it."""
        return self._name

    def _begin_progress(self, entry: PushEntry, sizes: Iterable[int]) -> None:
        kind = "resync" if entry.resync is not None else str(entry.kind)
        self.under_way = UnderWay(entry.point, kind, entry.started_us, sum(sizes))

    def _progressed(self, at: Progress) -> None:
        if self.under_way is not None:
            self.under_way.update(at, trio.current_time())
        self._report(at)

    async def _note_failure(self, want: Want, error: BaseException, attempts: int = 1) -> None:
        """For status. That it cannot be written down is logged: the push's own error matters more."""
        if want not in _NOTED:
            return
        # A source that cannot be asked does not say which VM it is: it is the one that was pushed from here.
        known = self._vm_id if self._vm_id.int else self._expected
        vms = [vm.vm for vm in self._log.vms if known is None or vm.vm == str(known)]
        for vm in vms:
            await _noting(trouble.note(self._log, vm, error, time.time_ns() // 1000, attempts))

    async def _push_patiently(self, want: Want) -> Outcome:
        async def note(error: BaseException, attempts: int) -> None:
            await self._note_failure(want, error, attempts)

        async def back() -> None:
            if want in _NOTED:
                await _noting(trouble.went_on(self._log, self._vm.vm, time.time_ns() // 1000))

        while True:
            await self._prepare()
            await self._drop_overdue()
            outcome = None
            async with flat_nursery() as nursery:
                nursery.start_soon(self._watch_ages, nursery.cancel_scope)
                outcome = await self.patience.keep_connected(
                    lambda connection: self._session(connection, want), note, back
                )
                nursery.cancel_scope.cancel()
            if outcome is not None:
                return outcome

    async def _watch_ages(self, scope: trio.CancelScope) -> None:
        """Cancel ``scope`` when something has been held at the source for too long."""
        while True:
            await trio.sleep(held.LOOK_S)
            entry = await journal.load(self._log, self._vm.vm)
            if await self._limits.overdue(entry, self._vm.newest) is not None:
                scope.cancel()

    async def _drop_overdue(self) -> None:
        """Let go of what has been held at the source for too long; the receiver is told if it can be reached."""
        entry = await journal.load(self._log, self._vm.vm)
        overdue = await self._limits.overdue(entry, self._vm.newest)
        if overdue is None:
            return
        if entry is not None and overdue.push is not None:
            try:
                async with self._link.connect() as connection:
                    await self._ending.abandon(entry, overdue.push, connection)
            except (ConnectionLostError, WireError, PeerRefusedError) as error:
                _logger.warning("the receiver cannot be told: %s", error)
                await self._ending.abandon(entry, overdue.push, None)
        if overdue.reference is not None:
            _logger.warning("%s: the reference is let go of: %s", self._name, overdue.reference)
            await self._source.sweep(None, None)
            async with self._log.change(self._vm_id) as vm:
                vm.lose_tracking(overdue.reference)

    async def _prepare(self) -> None:
        identity = await self._source.identify()
        if not m.is_vm_name(identity.name):
            raise UsageError(
                f"vm: {identity.name[:80]!r} cannot be the name of a VM (1 to 255 characters, no slash)"
            )
        await self._log.register(identity.uuid, identity.name, "source")
        if (identity.uuid, identity.name) != (self._vm_id, self._name):
            self._name = identity.name
            self._become(identity.uuid)
        await trio.to_thread.run_sync(self._files.prepare)
        entry = await journal.load(self._log, self._vm.vm)
        newest = self._vm.newest
        if entry is not None and newest is not None and newest.push_id == entry.push_id:
            await self._ending.settle(entry, newest)
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
            await self._tell_doubt(connection, state)
            entry = await journal.load(self._log, self._vm.vm)
            match plan(await self._local(entry), state, want, self._on_loss):
                case Refuse(reason, fenced):
                    raise FencedError(reason) if fenced else RefusedError(reason)
                case GiveUp(reason):
                    assert entry is not None
                    await self._ending.abandon(entry, reason, connection)
                case Resume():
                    assert entry is not None
                    outcome = await self._resume(connection, entry, state)
                    if outcome is not None and (want is not Want.RESYNC or entry.resync):
                        return outcome
                case Start() as start:
                    if (outcome := await self._start(connection, start)) is not None:
                        return outcome
        raise WireError(
            "the receiver's state does not settle: it answers each plan with another point"
        )

    async def _tell_doubt(self, connection: Connection, state: m.VmState) -> None:
        """Have the receiver mark the points that may lack changes."""
        missed = self._vm.suspect
        if missed is not None and state.newest is not None:
            said = m.Doubt(self._vm.vm, self._name, missed.disk, missed.offset, missed.point)
            await connection.ask(said, m.VmState)

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
        committed = newest.number if newest is not None else 0
        last = max(committed, self._vm.abandoned_point)
        missed = self._vm.suspect
        return Local(
            reference,
            self._vm.epoch,
            unfinished,
            last,
            committed=committed,
            given_up=self._vm.abandoned_push,
            seeded=newest is not None,
            suspect=str(ChangesMissedError(missed)) if missed is not None else self._untracked,
            again=self._interrupted,
            incomparable=self._incomparable,
        )

    async def _start(self, connection: Connection, start: Start) -> Outcome | None:
        """Begin a push; None if it had to be given up, and a new plan is needed."""
        # Also where all is read: what this snapshot replaces is to go when it is committed.
        reference = self._vm.newest.push_id if self._vm.newest is not None else None
        what = "resync" if start.resync else start.kind
        _logger.info("%s of %s to point %d: %s", what, self._name, start.point, start.reason)
        await self._limits.make_room(reference)
        entry = PushEntry.begin(start, reference, self._vm.epoch, time.time_ns() // 1000)
        await journal.store(self._log, self._vm.vm, entry)
        await trio.to_thread.run_sync(self._files.begin, entry)
        snapshot = await self._source.take(entry.snapshot)
        try:
            return await self._go_on(connection, entry, snapshot, start.reason, resumed=False)
        finally:
            await _close(snapshot)

    async def _go_on(
        self,
        connection: Connection,
        entry: PushEntry,
        snapshot: Snapshot,
        reason: str,
        *,
        resumed: bool,
    ) -> Outcome | None:
        """Go on with a push whose snapshot is there; None if a new plan is needed."""
        if entry.disks is None:
            scans: dict[str, bytes] = {}
            try:
                if entry.resync is not None:
                    scans = await self._compare(connection, entry, snapshot)
                disks = await self._name_disks(entry, snapshot, scans)
            except TrackingLostError as error:
                await self._ending.abandon(entry, str(error), None)
                self._untracked = str(error)
                return None
            except PeerRefusedError as error:
                await self._ending.abandon(entry, str(error), None)
                if error.code == "root-mismatch":
                    self._incomparable = str(error)
                elif error.code != "wrong-parent":
                    raise
                return None
            except (RefusedError, DamageError, StateError, SnapshotGoneError) as error:
                await self._ending.abandon(entry, str(error), None, raised=True)
                raise
            entry = msgspec.structs.replace(entry, taken_at_us=snapshot.taken_at_us, disks=disks)
            await journal.store(self._log, self._vm.vm, entry)
        return await self._push(connection, entry, snapshot, reason, resumed=resumed)

    async def _compare(
        self, connection: Connection, entry: PushEntry, snapshot: Snapshot
    ) -> dict[str, bytes]:
        """Take the receiver's newest point for ours; the root that each disk was read to have, by identity."""

        def report(disk: str, done: int, total: int) -> None:
            self._progressed(Progress(f"{disk} (compared)", done, total, 0))

        self._begin_progress(entry, (disk.view.size for disk in snapshot.disks))

        comparer = Comparer(
            connection,
            self._files,
            self._vm_id,
            self._name,
            chunk=self._config.chunk,
            cpus=self.transfer.cpus,
            report=report,
        )
        there = await describe(connection, self._vm_id, self._name, entry)
        if not entry.scanned:
            await comparer.scan(entry, snapshot, there)
            entry = msgspec.structs.replace(entry, scanned=True)
            await journal.store(self._log, self._vm.vm, entry)
        scans = await comparer.fetch(entry, snapshot, there)
        async with self._log.change(self._vm_id) as vm:
            vm.compare_disks(there.point, entry.resync or "")
        return scans

    async def _name_disks(
        self, entry: PushEntry, snapshot: Snapshot, scans: dict[str, bytes]
    ) -> tuple[EntryDisk, ...]:
        """Which disk is which; raises RefusedError for one that shrank."""
        tell_gone_disks(self._vm, entry, snapshot)
        lost = snapshot.lost_tracking
        if lost is not None and entry.rests_on_reference:
            async with self._log.change(self._vm_id) as changing:
                changing.lose_tracking(lost)
            if self._on_loss is not OnLoss.RESYNC:
                raise TrackingLostError(f"change tracking was lost: {lost}")
            # Our map of the last point is the receiver's, by its root: that is compared with.
            _logger.warning(
                "%s: comparing digests instead of change tracking: %s", self._name, lost
            )
        return await name_disks(self._vm, entry, snapshot, scans)

    async def _resume(
        self, connection: Connection, entry: PushEntry, state: m.VmState
    ) -> Outcome | None:
        """Go on with a push; None if it had to be given up, and a new plan is needed."""
        if entry.disks is None and not entry.scanned:
            await self._ending.abandon(entry, "its snapshot was not finished", None)
            self._interrupted = entry.resync
            return None
        if state.newest is not None and state.newest.push_id == entry.push_id:
            if not await self._ending.still_known(entry):
                return None
            have = [0] * len(entry.disks or ())
            answer = await connection.ask(self.transfer.open(entry, have), m.Committed)
            point = await self._ending.commit(entry, answer)
            await compare_heads(connection, self._log, self._vm_id, self._name)
            return Outcome(point, True, "it was committed already")
        try:
            snapshot = await self._source.reopen(entry.snapshot)
        except SnapshotGoneError as error:
            await self._ending.abandon(entry, str(error), connection)
            self._interrupted = entry.resync
            return None
        try:
            # Once for each push: a line that breaks all the time must not fill the log.
            level = logging.DEBUG if self._gone_on_with == entry.push_id else logging.INFO
            self._gone_on_with = entry.push_id
            _logger.log(level, "going on with the %s to point %d", entry.kind, entry.point)
            return await self._go_on(connection, entry, snapshot, "went on", resumed=True)
        finally:
            await _close(snapshot)

    async def _push(
        self,
        connection: Connection,
        entry: PushEntry,
        snapshot: Snapshot,
        reason: str,
        *,
        resumed: bool,
    ) -> Outcome | None:
        compared = None
        try:
            if entry.resync is not None:
                compared = Comparison(*await trio.to_thread.run_sync(self._files.differing, entry))
                _logger.info(
                    "%s: %d of %d bytes differ", self._name, compared.differing, compared.compared
                )
            self._begin_progress(entry, (disk.size for disk in entry.disks or ()))
            answer, sampled = await self.transfer.send(connection, entry, snapshot)
        except PeerRefusedError as error:
            if error.code in _HOPELESS:
                await self._ending.abandon(entry, str(error), None, raised=True)
                if error.code == "root-mismatch":
                    await trio.to_thread.run_sync(self._files.forget_maps)
                    if entry.resync is not None:
                        self._incomparable = f"a resync was refused: {error.reason}"
            raise
        except ChangesMissedError as error:
            async with self._log.change(self._vm_id) as vm:
                vm.miss_changes(error.missed)
            await self._ending.abandon(entry, str(error), connection)
            return None
        except (DamageError, StateError) as error:
            # A map of ours is damaged or gone. Told to the receiver, which would keep what has landed.
            await self._ending.abandon(entry, str(error), connection, raised=True)
            await trio.to_thread.run_sync(self._files.forget_maps)
            raise
        except (SnapshotGoneError, ReferenceLostError) as error:
            await self._ending.abandon(entry, str(error), None, raised=True)
            raise
        point = await self._ending.commit(entry, answer, sampled)
        await compare_heads(connection, self._log, self._vm_id, self._name)
        tally = self.transfer.tally
        return Outcome(point, resumed, reason, tally.resumed, tally.resent, compared)


async def _noting(written: Coroutine[Any, Any, None]) -> None:
    """For status. That it cannot be written down is logged: the push matters more."""
    try:
        await written
    except (OSError, PersistenceError) as failure:
        _logger.error("what failed cannot be written down for status: %s", failure)


async def _close(snapshot: Snapshot) -> None:
    with trio.move_on_after(10, shield=True):
        await snapshot.aclose()


__all__ = ["Outcome", "Progress", "Pusher"]
