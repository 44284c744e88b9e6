# SPDX-License-Identifier: AGPL-3.0-or-later
"""The aggregate of a protected VM: its events, and the state that they add up to.

Source and receiver each keep one in their own log, with the same events. It knows nothing of files, sockets and
clocks: times come in as arguments. Topics are explicit, because a stored topic must outlive the name of a class.
"""

from __future__ import annotations

import copy
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
from eventsourcing.domain import Aggregate

from replicator.domain.backup import BackupFailure, BackupPart, Backups
from replicator.domain.failover import Command, State, decide
from replicator.domain.model import (
    Balance,
    Damage,
    Point,
    PushKind,
    RpoBreach,
    Suspicion,
    TestClone,
    plain,
    stream_id,
)
from replicator.errors import FencedError, RefusedError

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: Damages recorded of one point: more than an operator reads. Counted per point, so that one bad point hides no other.
DAMAGES_MAX = 200


class ProtectedVm(Aggregate):
    """A VM under protection. Every public method decides and triggers one event, or raises RefusedError."""

    TOPIC = "replctl:vm"

    class Event(Aggregate.Event):
        """Base of this aggregate's events."""

        TOPIC = "replctl:vm.event"

    class Registered(Event, Aggregate.Created):
        """The VM is known to this side."""

        TOPIC = "replctl:vm.registered"
        vm: str
        name: str
        role: str
        period: int

    class PeriodOpened(Event):
        """The books were closed: a new stream begins with what the old ones added up to."""

        TOPIC = "replctl:vm.period-opened"
        balance: list[Any]

        def mutate(self, aggregate: Any) -> Any:
            """The VM as of here; nothing that came before is needed."""
            del aggregate
            balance = msgspec.convert(self.balance, Balance)
            return ProtectedVm.restore(balance, self.originator_version, self.timestamp)

    class SeedCommitted(Event):
        """A full push became a recovery point."""

        TOPIC = "replctl:vm.seed-committed"
        point: list[Any]

        def apply(self, aggregate: ProtectedVm) -> None:
            aggregate.add_point(self.point)

    class CycleCommitted(Event):
        """A push of changes became a recovery point."""

        TOPIC = "replctl:vm.cycle-committed"
        point: list[Any]

        def apply(self, aggregate: ProtectedVm) -> None:
            aggregate.add_point(self.point)

    class DeltaApplied(Event):
        """The replica holds this point now."""

        TOPIC = "replctl:vm.delta-applied"
        point: int

        def apply(self, aggregate: ProtectedVm) -> None:
            aggregate.applied = self.point

    class PointsReleased(Event):
        """Retention let go of these points; their files may be unlinked."""

        TOPIC = "replctl:vm.points-released"
        points: list[int]

        def apply(self, aggregate: ProtectedVm) -> None:
            gone = set(self.points)
            for number in gone:
                aggregate.points.pop(number, None)
                aggregate.verified.pop(number, None)
            aggregate.damages = [d for d in aggregate.damages if d.point not in gone]
            aggregate.doubtful -= gone

    class PointDamaged(Event):
        """A point does not read back as it was recorded."""

        TOPIC = "replctl:vm.point-damaged"
        damage: list[Any]

        def apply(self, aggregate: ProtectedVm) -> None:
            aggregate.damages.append(msgspec.convert(self.damage, Damage))

    class PointVerified(Event):
        """Every byte of a point was read and its root recomputed: it is what was recorded."""

        TOPIC = "replctl:vm.point-verified"
        point: int
        bytes_read: int

        def apply(self, aggregate: ProtectedVm) -> None:
            aggregate.damages = [d for d in aggregate.damages if d.point != self.point]
            aggregate.verified_at_us = int(self.timestamp.timestamp() * 1e6)
            aggregate.verified[self.point] = aggregate.verified_at_us

    class TrackingLost(Event):
        """What changed since the reference had to be found by comparing digests."""

        TOPIC = "replctl:vm.tracking-lost"
        reason: str

        def apply(self, aggregate: ProtectedVm) -> None:
            aggregate.tracking_lost = self.reason

    class DisksCompared(Event):
        """All disks were compared with the receiver's newest point: what is sent next goes on from it, whatever this side
        knew before.
        """

        TOPIC = "replctl:vm.disks-compared"
        point: list[Any]
        reason: str

        def apply(self, aggregate: ProtectedVm) -> None:
            aggregate.adopt_point(self.point)

    class ChangesMissed(Event):
        """A grain that change tracking called unchanged is not what the points say."""

        TOPIC = "replctl:vm.changes-missed"
        missed: list[Any]

        def apply(self, aggregate: ProtectedVm) -> None:
            aggregate.suspect = msgspec.convert(self.missed, Suspicion)
            for number in sorted(aggregate.points, reverse=True):
                if aggregate.points[number].is_sure:
                    break
                aggregate.doubtful |= {number}

    class PushAbandoned(Event):
        """A push was given up before it was committed."""

        TOPIC = "replctl:vm.push-abandoned"
        push_id: str
        point: int
        reason: str

        def apply(self, aggregate: ProtectedVm) -> None:
            aggregate.abandoned = self.reason
            aggregate.abandoned_point = max(aggregate.abandoned_point, self.point)
            aggregate.abandoned_push = self.push_id

    class TestStarted(Event):
        """A clone of a point was made for a test."""

        TOPIC = "replctl:vm.test-started"
        clone: list[Any]

        def apply(self, aggregate: ProtectedVm) -> None:
            aggregate.state = State.TESTING
            aggregate.test = msgspec.convert(self.clone, TestClone)

    class TestEnded(Event):
        """The test clone was removed."""

        TOPIC = "replctl:vm.test-ended"
        clone_id: str

        def apply(self, aggregate: ProtectedVm) -> None:
            aggregate.state = State.PROTECTED
            aggregate.test = None

    class PromotionStarted(Event):
        """The source is fenced: from here on only a higher epoch may push."""

        TOPIC = "replctl:vm.promotion-started"
        epoch: int
        point: int

        def apply(self, aggregate: ProtectedVm) -> None:
            aggregate.state = State.PROMOTING
            aggregate.epoch = self.epoch

    class Promoted(Event):
        """The VM runs on this side."""

        TOPIC = "replctl:vm.promoted"

        def apply(self, aggregate: ProtectedVm) -> None:
            aggregate.state = State.PROMOTED

    class PromotionUndone(Event):
        """The promotion was rolled back; the source pushes again, in the new epoch."""

        TOPIC = "replctl:vm.promotion-undone"

        def apply(self, aggregate: ProtectedVm) -> None:
            aggregate.state = State.PROTECTED

    class MadePermanent(Event):
        """This side is the source from now on."""

        TOPIC = "replctl:vm.made-permanent"

        def apply(self, aggregate: ProtectedVm) -> None:
            aggregate.state = State.PERMANENT

    class RpoBreached(Event):
        """The newest point is older than the recovery point objective; the next that is young enough ends it."""

        TOPIC = "replctl:vm.rpo-breached"
        breach: list[Any]

        def apply(self, aggregate: ProtectedVm) -> None:
            aggregate.breach = msgspec.convert(self.breach, RpoBreach)

    class PeerLogBroken(Event):
        """The other side's log does not continue what it was when it was last seen."""

        TOPIC = "replctl:vm.peer-log-broken"
        reason: str

        def apply(self, aggregate: ProtectedVm) -> None:
            aggregate.peer_broken = self.reason

    class PeerLogAccepted(Event):
        """An operator accepts the other side's log as it is now."""

        TOPIC = "replctl:vm.peer-log-accepted"

        def apply(self, aggregate: ProtectedVm) -> None:
            aggregate.peer_broken = None

    class BackupCommitted(Event):
        """A Bacula job that ended well has a part of this VM: what comes next may go on from it."""

        TOPIC = "replctl:vm.backup-committed"
        backup: list[Any]

        def apply(self, aggregate: ProtectedVm) -> None:
            part = msgspec.convert(self.backup, BackupPart)
            aggregate.backups = aggregate.backups.committed(part)

    class BackupFailed(Event):
        """A Bacula job came to nothing for this VM; the reference is what it was."""

        TOPIC = "replctl:vm.backup-failed"
        job: str
        job_id: int
        level: str
        reason: str

        def apply(self, aggregate: ProtectedVm) -> None:
            at_us = time_us(self.timestamp)
            failure = BackupFailure(self.job, self.job_id, self.level, self.reason, at_us)
            aggregate.backups = aggregate.backups.failing(failure)

    class RestoreDone(Event):
        """A Bacula job has restored this VM, or disks of it, to ``target``."""

        TOPIC = "replctl:vm.restore-done"
        job: str
        job_id: int
        target: str
        bytes: int

        def apply(self, aggregate: ProtectedVm) -> None:
            known = aggregate.backups
            aggregate.backups = msgspec.structs.replace(known, restored=known.restored + 1)

    class RestoreFailed(Event):
        """A Bacula job was to restore this VM and did not; what it had made was removed."""

        TOPIC = "replctl:vm.restore-failed"
        job: str
        job_id: int
        target: str
        reason: str

        def apply(self, aggregate: ProtectedVm) -> None:
            failed = aggregate.backups.restores_failed + 1
            aggregate.backups = msgspec.structs.replace(aggregate.backups, restores_failed=failed)

    def __init__(self, vm: str, name: str, role: str, period: int) -> None:
        self.vm = vm
        self.name = name
        self.role = role
        self.period = period
        self.epoch = 1
        self.state = State.UNSEEDED
        self.points: dict[int, Point] = {}
        self.newest: Point | None = None
        self.applied = 0
        self.damages: list[Damage] = []
        self.verified: dict[int, int] = {}
        self.test: TestClone | None = None
        self.tracking_lost: str | None = None
        self.abandoned: str | None = None
        self.abandoned_point = (
            0  # the greatest that was given up: the receiver may have it all the same
        )
        self.abandoned_push: str | None = None
        self.peer_broken: str | None = None
        self.suspect: Suspicion | None = None  # cleared by a point that is sure
        self.doubtful: frozenset[int] = frozenset()  # points that may lack a change
        self.breach: RpoBreach | None = None
        self.verified_at_us = 0  # when a point was last found to be right; it may be gone since
        self.backups = Backups()

    @classmethod
    def register(cls, vm: UUID, name: str, role: str, period: int = 1) -> ProtectedVm:
        """A VM that this side has not known until now; ``role`` is source, receiver or backup (Bacula's)."""
        return cls._create(
            cls.Registered,
            id=stream_id(vm, period),
            vm=str(vm),
            name=name,
            role=role,
            period=period,
        )

    # Periods

    def balance(self) -> Balance:
        """The whole state, as a value."""
        return Balance(
            vm=self.vm,
            name=self.name,
            role=self.role,
            created_us=time_us(self.created_on),
            period=self.period,
            epoch=self.epoch,
            state=str(self.state),
            points=tuple(self.points.values()),
            newest=self.newest,
            applied=self.applied,
            damages=tuple(self.damages),
            verified=dict(self.verified),
            test=self.test,
            tracking_lost=self.tracking_lost,
            abandoned=self.abandoned,
            abandoned_point=self.abandoned_point,
            abandoned_push=self.abandoned_push,
            peer_broken=self.peer_broken,
            suspect=self.suspect,
            doubtful=tuple(sorted(self.doubtful)),
            breach=self.breach,
            verified_at_us=self.verified_at_us,
            backups=self.backups if self.backups != Backups() else None,
        )

    @classmethod
    def restore(cls, balance: Balance, version: int, at: datetime) -> ProtectedVm:
        """The VM that had this balance after its event number ``version``."""
        vm = cls.__new__(cls)
        created = EPOCH + timedelta(microseconds=balance.created_us)
        vm.__base_init__(stream_id(UUID(balance.vm), balance.period), version, created)
        vm.modified_on = at
        vm.vm, vm.name, vm.role = balance.vm, balance.name, balance.role
        vm.period, vm.epoch, vm.state = balance.period, balance.epoch, State(balance.state)
        vm.points = {point.number: point for point in balance.points}
        vm.newest, vm.applied = balance.newest, balance.applied
        vm.damages, vm.verified = list(balance.damages), dict(balance.verified)
        vm.test, vm.tracking_lost = balance.test, balance.tracking_lost
        vm.abandoned, vm.abandoned_point = balance.abandoned, balance.abandoned_point
        vm.abandoned_push, vm.peer_broken = balance.abandoned_push, balance.peer_broken
        vm.suspect, vm.doubtful = balance.suspect, frozenset(balance.doubtful)
        vm.breach, vm.verified_at_us = balance.breach, balance.verified_at_us
        vm.backups = balance.backups or Backups()
        return vm

    def open_period(self, period: int) -> Any:
        """The first event of the VM's stream in a later period. It is numbered on, so that the history has no seam."""
        assert period > self.period
        balance = msgspec.structs.replace(self.balance(), period=period)
        kind: Any = self.PeriodOpened
        return kind(
            originator_id=stream_id(UUID(self.vm), period),
            originator_version=self.version + 1,
            timestamp=kind.create_timestamp(),
            balance=plain(balance),
        )

    def working_copy(self) -> ProtectedVm:
        """A copy to trigger events on. The original stays what the log says, also for threads that read it meanwhile."""
        other = copy.copy(self)
        other.points = dict(self.points)
        other.damages = list(self.damages)
        other.verified = dict(self.verified)
        other._pending_events = []
        return other

    def add_point(self, stored: list[Any]) -> None:
        """Fold a committed point into the state; called by the events."""
        point = msgspec.convert(stored, Point)
        if self.role == "source":
            self.points.clear()  # the source can only read the newest: it is the reference
        self.points[point.number] = point
        self.newest = point
        if self.state is State.UNSEEDED:
            self.state = State.PROTECTED
        self.tracking_lost = None
        self.abandoned = None
        if (
            self.breach is not None
            and point.committed_at_us - self.aged_from_us(point) <= self.breach.target_s * 1_000_000
        ):
            self.breach = None
        self.doubtful = self.doubtful.intersection(self.points)
        if point.is_sure:
            self.suspect = None
        elif self.suspect is not None:
            self.doubtful |= {point.number}

    def adopt_point(self, stored: list[Any]) -> None:
        """The receiver's newest point is what this side goes on from; called by the events."""
        point = msgspec.convert(stored, Point)
        if point != self.newest:
            self.points = {point.number: point}
            self.doubtful = frozenset()
        self.newest = point
        if self.state is State.UNSEEDED:
            self.state = State.PROTECTED

    # Decisions

    def check_commit(self, kind: PushKind, epoch: int) -> None:
        """Raise RefusedError unless a push of this kind and epoch may be committed now."""
        if epoch < self.epoch:
            raise FencedError(
                f"push of epoch {epoch} refused: the VM is in epoch {self.epoch},"
                " the source was fenced by a failover"
            )
        seed = kind is PushKind.SEED
        decide(self.state, Command.COMMIT_SEED if seed else Command.COMMIT_CYCLE)

    def commit(self, point: Point) -> None:
        """Record a new recovery point. The caller has made all its data durable."""
        self.check_commit(point.kind, point.epoch)
        newest = self.newest.number if self.newest else 0
        if point.number <= newest or (point.kind is PushKind.CYCLE and point.parent != newest):
            raise RefusedError(
                f"point {point.number} on {point.parent} does not continue the log, which ends at {newest}"
            )
        event = self.SeedCommitted if point.kind is PushKind.SEED else self.CycleCommitted
        self.trigger_event(event, point=plain(point))

    def delta_applied(self, point: int) -> None:
        """Record that the replica holds ``point``, durably."""
        self.trigger_event(self.DeltaApplied, point=point)

    def release(self, points: list[int]) -> None:
        """Record that retention lets go of these points."""
        self.trigger_event(self.PointsReleased, points=points)

    def damaged(self, damage: Damage) -> None:
        """Record damage found in a point, unless exactly this is known already, or enough to call all of it bad."""
        known = [other for other in self.damages if other.point == damage.point]
        if damage not in known and len(known) < DAMAGES_MAX:
            self.trigger_event(self.PointDamaged, damage=plain(damage))

    def point_verified(self, point: int, bytes_read: int) -> None:
        """Record that a point was read in full and is right."""
        self.trigger_event(self.PointVerified, point=point, bytes_read=bytes_read)

    def lose_tracking(self, reason: str) -> None:
        """Record that change tracking could not answer."""
        self.trigger_event(self.TrackingLost, reason=reason)

    def compare_disks(self, point: Point, reason: str) -> None:
        """Record that all disks were compared with the receiver's newest point, which is this side's newest from here on.

        Raises RefusedError where a cycle could not be committed on it.
        """
        if point.epoch > self.epoch:
            raise FencedError(
                f"point {point.number} on the receiver is of epoch {point.epoch}, this side is in epoch {self.epoch}"
            )
        if self.state is not State.UNSEEDED:
            self.check_commit(PushKind.CYCLE, self.epoch)
        self.trigger_event(self.DisksCompared, point=plain(point), reason=reason)

    def miss_changes(self, missed: Suspicion) -> None:
        """Record that change tracking missed a change, unless that is known of this chain already."""
        if self.suspect is None:
            self.trigger_event(self.ChangesMissed, missed=plain(missed))

    def abandon_push(self, push_id: str, point: int, reason: str) -> None:
        """Record that a push was given up, unless a process that died since then has done so."""
        if push_id != self.abandoned_push:
            self.trigger_event(self.PushAbandoned, push_id=push_id, point=point, reason=reason)

    def breach_due_us(self, target_s: int) -> int | None:
        """When the newest point will be older than ``target_s`` seconds, in microseconds since the epoch; None where that is
        recorded already, and where no new point is to be expected.
        """
        expected = self.state in (State.PROTECTED, State.TESTING)
        if self.newest is None or self.breach is not None or not expected:
            return None
        return self.aged_from_us(self.newest) + target_s * 1_000_000

    def aged_from_us(self, point: Point) -> int:
        """What a point's age counts from, in microseconds since the epoch.

        The source's clock took it. On the receiver it cannot be younger than its commit by the receiver's own: a source whose
        clock is ahead must not hide that nothing comes any more.
        """
        if self.role == "receiver":
            return min(point.taken_at_us, point.committed_at_us)
        return point.taken_at_us

    def breach_rpo(self, target_s: int, now_us: int) -> None:
        """Record that the newest point is older than ``target_s`` seconds at ``now_us``, once for each time that it comes to be."""
        due_us = self.breach_due_us(target_s)
        if due_us is None or now_us <= due_us:
            return
        assert self.newest is not None
        age_s = (now_us - self.aged_from_us(self.newest)) // 1_000_000
        breach = RpoBreach(self.newest.number, age_s, target_s, due_us)
        self.trigger_event(self.RpoBreached, breach=plain(breach))

    def start_test(self, clone: TestClone) -> None:
        """Record a test clone. Raises RefusedError where the table or the point forbids it."""
        decide(self.state, Command.TEST)
        self.get_point(clone.point)
        self.trigger_event(self.TestStarted, clone=plain(clone))

    def end_test(self) -> None:
        """Record that the test clone is gone."""
        decide(self.state, Command.UNDO_TEST)
        assert self.test is not None
        self.trigger_event(self.TestEnded, clone_id=self.test.clone_id)

    def start_promotion(self, point: int) -> None:
        """Fence the source and begin to promote a point."""
        decide(self.state, Command.PROMOTE)
        self.get_point(point)
        self.trigger_event(self.PromotionStarted, epoch=self.epoch + 1, point=point)

    def finish_promotion(self) -> None:
        """Record that the VM runs on this side."""
        decide(self.state, Command.FINISH_PROMOTION)
        self.trigger_event(self.Promoted)

    def undo_promotion(self) -> None:
        """Roll a promotion back, before the target was written to."""
        decide(self.state, Command.UNDO_PROMOTION)
        self.trigger_event(self.PromotionUndone)

    def make_permanent(self) -> None:
        """This side becomes the source."""
        decide(self.state, Command.MAKE_PERMANENT)
        self.trigger_event(self.MadePermanent)

    def break_peer(self, reason: str) -> None:
        """Record that the other side's log was rewritten."""
        self.trigger_event(self.PeerLogBroken, reason=reason)

    def accept_peer(self) -> None:
        """Record that the other side's log is accepted as it is. Raises RefusedError if nothing is wrong with it."""
        if self.peer_broken is None:
            raise RefusedError(f"VM {self.name}: nothing is wrong with the other side's log")
        self.trigger_event(self.PeerLogAccepted)

    # Backups

    def commit_backup(self, part: BackupPart) -> None:
        """Record a part that Bacula has. Raises RefusedError if it does not go on from what is recorded."""
        known = self.backups
        parents = {kept.part for kept in (known.last, known.full) if kept is not None}
        if part.number != known.next_number or (part.parent and part.parent not in parents):
            raise RefusedError(
                f"part {part.number} of VM {self.name} does not go on from what is recorded of its backups"
            )
        self.trigger_event(self.BackupCommitted, backup=plain(part))

    def fail_backup(self, job: str, job_id: int, level: str, reason: str) -> None:
        """Record a job that came to nothing."""
        self.trigger_event(self.BackupFailed, job=job, job_id=job_id, level=level, reason=reason)

    def restore_done(self, job: str, job_id: int, target: str, bytes_restored: int) -> None:
        """Record a restore that stays."""
        self.trigger_event(
            self.RestoreDone, job=job, job_id=job_id, target=target, bytes=bytes_restored
        )

    def restore_failed(self, job: str, job_id: int, target: str, reason: str) -> None:
        """Record a restore that came to nothing."""
        self.trigger_event(self.RestoreFailed, job=job, job_id=job_id, target=target, reason=reason)

    # Questions

    def get_point(self, number: int | None) -> Point:
        """The retained point of that number, or the newest. Raises RefusedError that lists what there is."""
        if number is None:
            if self.newest is None:
                raise RefusedError(f"VM {self.name} has no recovery point yet")
            return self.newest
        point = self.points.get(number)
        if point is None:
            have = ", ".join(map(str, self.points)) or "none"
            raise RefusedError(f"VM {self.name} has no recovery point {number} (kept: {have})")
        return point

    def disk_names(self) -> dict[str, str]:
        """Disk name by identity, of the newest point."""
        return {disk.identity: disk.disk for disk in self.newest.disks} if self.newest else {}


def time_us(stamp: datetime) -> int:
    """A time in microseconds since the epoch."""
    return (stamp - EPOCH) // timedelta(microseconds=1)


def event_kind(event: Aggregate.Event) -> str:
    """The event's kind as operators see it: ``cycle-committed`` and so on."""
    return str(type(event).TOPIC).rpartition(".")[2]  # type: ignore[attr-defined]


def event_time_us(event: Aggregate.Event) -> int:
    """When the event was recorded, in microseconds since the epoch."""
    return time_us(event.timestamp)
