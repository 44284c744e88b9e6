# SPDX-License-Identifier: AGPL-3.0-or-later
"""Logs of several months, made in a moment: a calendar that a test turns, and what must be true of any log."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import msgspec
import pytest
import trio
import trio.lowlevel

from eventstore.environment import LMDBEnvironment
from eventstore.follow import Commits
from eventstore.operations import Insert
from eventstore.projection_rows import DATABASE
from eventstore.projections import read_projection
from replicator.domain.model import Damage, Point, PushKind, Suspicion, TestClone, stream_id
from replicator.domain.vm import EPOCH, ProtectedVm, event_time_us
from replicator.log import EventLog, open_log, past, periods, proofs
from replicator.log.past import Wanted
from replicator.log.periods import Period
from replicator.log.store import Fold, LogStore, fold_stream
from tests.domain.samples import point
from tests.limits import HANG_S

if TYPE_CHECKING:
    from eventstore.environment import Transaction

T = TypeVar("T")

WEB, DB, MAIL = UUID(int=0xA1), UUID(int=0xB2), UUID(int=0xC3)
NAMES = {WEB: "web", DB: "db", MAIL: "mail"}
#: What memory has and the log has not.
_TRANSIENT = "_pending_events"
#: What the books' closing changes in a VM.
_OF_PERIOD = {"_id", "_version", "_modified_on", "period"}


class Calendar:
    """The time that a log and its events have. Every look at it takes a second."""

    def __init__(self, year: int = 2026, month: int = 1) -> None:
        self._now = datetime(year, month, 20, tzinfo=UTC)

    def stamp(self) -> datetime:
        """The time of an event."""
        self._now += timedelta(seconds=1)
        return self._now

    def __call__(self) -> int:
        """The same for ``open_log``."""
        return (self.stamp() - EPOCH) // timedelta(microseconds=1)

    def next_month(self) -> None:
        """The 20th of the month that follows."""
        self._now = (self._now.replace(day=1) + timedelta(days=32)).replace(day=20)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """From here on events have the time of this calendar."""
        patch.setattr(ProtectedVm.Event, "create_timestamp", staticmethod(self.stamp))


def state(vm: ProtectedVm | None, *, without: Iterable[str] = ()) -> dict[str, Any]:
    """All that a VM is."""
    assert vm is not None
    left_out = {_TRANSIENT, *without}
    return {name: value for name, value in vars(vm).items() if name not in left_out}


def states(vms: Iterable[ProtectedVm]) -> dict[str, dict[str, Any]]:
    """All that VMs are, by UUID."""
    return {vm.vm: state(vm) for vm in vms}


def balances(vms: Iterable[ProtectedVm]) -> dict[str, dict[str, Any]]:
    """What closing the books must not change."""
    return {vm.vm: state(vm, without=_OF_PERIOD) for vm in vms}


async def live(log: EventLog, vm: UUID, rng: random.Random, events: int = 1) -> None:
    """Let something happen to a VM, of all kinds that change its state."""
    for _ in range(events):
        async with log.change(vm) as changing:
            happen(changing, rng)


def clone(number: int) -> TestClone:
    """A test clone of a point."""
    return TestClone("c0ffee", number, 1_772_600_009_000_000)


def damage(number: int) -> Damage:
    """A damage of a point."""
    return Damage(number, "disk-0", 65536, 65536, "replica/disk-0.raw", "digest")


def forget_projections(store: LogStore) -> None:
    """Throw away what is kept beside the log."""
    database = store.environment.database(DATABASE)
    store.environment.write(lambda txn: txn.drop(database, delete=False))


def sampled(number: int, epoch: int = 1) -> Point:
    """A cycle with samples; every third rests on no tracking at all."""
    made = point(number, PushKind.CYCLE, parent=number - 1, epoch=epoch)
    return msgspec.structs.replace(made, sampled=number, compared=number % 3 == 0)


def miss(vm: ProtectedVm, number: int) -> None:
    """Tracking missed a change, or has lost itself where that is known."""
    if vm.suspect is None:
        vm.miss_changes(Suspicion("disk-0", 65536, number))
    else:
        vm.lose_tracking(f"lost again at {vm.version}")


def happen(vm: ProtectedVm, rng: random.Random) -> None:
    """One event, whichever is possible and comes up."""
    newest = vm.newest
    if newest is None:
        vm.commit(point(1, PushKind.SEED))
        return
    number = newest.number
    acts: list[Callable[[], None]] = [
        lambda: vm.commit(sampled(number + 1, vm.epoch)),
        lambda: vm.delta_applied(number),
        lambda: vm.lose_tracking(f"lost at {vm.version}"),
        lambda: vm.abandon_push(f"{vm.version:016}", number + 1, "gone"),
        lambda: vm.point_verified(number, vm.version),
        lambda: vm.release([min(vm.points)] if len(vm.points) > 1 else [99]),
        lambda: miss(vm, number),
        lambda: vm.compare_disks(newest, f"asked for at {vm.version}"),
    ]
    rng.choice(acts)()


async def three_months(folder: Path, calendar: Calendar, *, events: int = 6) -> None:
    """A log of two sealed months and an open one: ``web`` from the first, ``db`` from the second, ``mail`` from the third."""
    rng = random.Random(5)
    async with open_log(folder, clock=calendar) as log:
        for number, vm in enumerate(NAMES):
            if number:
                calendar.next_month()
                await log.close_period()
                await log.seal()
            await log.register(vm, NAMES[vm], "receiver")
            for known in list(NAMES)[: number + 1]:
                await live(log, known, rng, events)
        await caught_up(log)


async def settled(log: EventLog, count: int) -> None:
    """Return when the log's own task has come to ``count`` periods, all but the last sealed and dropped."""
    with trio.fail_after(HANG_S):
        while len(log.periods) < count:
            await log.wait_change()
        await log.seal()
        await trio.testing.wait_all_tasks_blocked()
    assert len(log.periods) == count
    assert all(period.dropped for period in log.periods[:-1])


async def caught_up(log: EventLog) -> None:
    """Return when every projection has seen all there is."""
    for name in ("vms", "usage"):
        await log.projections.wait(name, log.store.head())


async def rebuilt(log: EventLog, name: str) -> None:
    """Return when the second generation of a projection is the live one."""
    with Commits(log.store.environment) as commits:
        while True:
            commits.look()
            (found,) = [state for state in log.projections.list() if state.name == name]
            if (found.state, found.generation) == ("live", 2):
                return
            await commits.wait()


@contextmanager
def opened(folder: Path, *, readonly: bool = True) -> Iterator[LogStore]:
    """The log of a folder, for a look at it."""
    store = LogStore.open(folder, readonly=readonly)
    try:
        yield store
    finally:
        store.close()


def events_of(store: LogStore) -> list[Any]:
    """Every event of the log, sealed or live; their numbers have no gap."""
    notes = list(store.notifications(1))
    assert [note.id for note in notes] == list(range(1, store.head() + 1))
    return [store.event(note) for note in notes]


def events_by_vm(events: Sequence[Any]) -> dict[str, list[Any]]:
    """The events of each VM, as the log has them."""
    fold = Fold()
    found: dict[str, list[Any]] = {}
    for event in events:
        found.setdefault(fold.add(event).vm, []).append(event)
    return found


def check_log(store: LogStore) -> list[Any]:
    """What is true of every log, whatever was done to it or cut it; its events."""
    events = events_of(store)
    cut = periods.load(store.periods)
    assert [(p.number, p.first) for p in cut] == [
        (n, cut[n - 2].last + 1 if n > 1 else 1) for n in range(1, len(cut) + 1)
    ]
    for vm, own in events_by_vm(events).items():
        # Each once, with no seam, and pages say the same.
        assert [event.originator_version for event in own] == list(range(1, len(own) + 1))
        found, more = past.page(store, UUID(vm), Wanted(limit=10_000, after=0))
        assert (found, more) == (own, False)
        assert past.page(store, UUID(vm), Wanted(limit=10_000)) == (own, False)
        # A period's stream by itself is the whole VM.
        last = [e for e in own if e.originator_id == own[-1].originator_id]
        assert state(fold_stream(last)) == state(folded(own))
    if events:
        assert proofs.verify(store).events == len(events)
    return events


def folded(events: Iterable[Any]) -> ProtectedVm:
    """One VM from all of its events, by hand."""
    vm: Any = None
    for event in events:
        vm = event.mutate(vm)
    assert isinstance(vm, ProtectedVm)
    return vm


def rows(store: LogStore, name: str) -> list[tuple[bytes, bytes]]:
    """A projection's rows."""
    return read_projection(store.environment, name, lambda view: list(view.items()))


def copy_log(source: Path, target: Path) -> Path:
    """A log as it was, closed, with its segments."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("lock.mdb"))
    return target


class Said(logging.Handler):
    """Errors that are logged, and an event for the first. To be made in the trio thread that logs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []
        self.one = trio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        """Take it down."""
        self.texts.append(record.getMessage())
        self.one.set()


@contextmanager
def listening(name: str) -> Iterator[Said]:
    """What a module says that is an error."""
    said = Said()
    logger = logging.getLogger(name)
    logger.addHandler(said)
    try:
        yield said
    finally:
        logger.removeHandler(said)


Act = Callable[[Callable[[], list[Any]]], list[Any]]


def around_commits(patch: pytest.MonkeyPatch, kind: type[Any], act: Act) -> None:
    """Call ``act(commit)`` in the writer's thread instead of each commit that has an operation of ``kind``."""
    real = LMDBEnvironment.commit

    def commit(self: LMDBEnvironment, operations: Any) -> list[Any]:
        if any(isinstance(operation, kind) for operation in operations):
            return act(lambda: real(self, operations))
        return real(self, operations)

    patch.setattr(LMDBEnvironment, "commit", commit)


def period_rows(folder: Path) -> list[Period]:
    """The periods of a closed log."""
    with opened(folder) as store:
        return periods.load(store.periods)


def live_rows(store: LogStore) -> list[int]:
    """The numbers of the events whose rows are in the live log."""
    name = "events/replctl/events/log"
    database = store.environment.database(name)

    def read(txn: Transaction) -> list[int]:
        with txn.cursor(database) as cursor:
            return [int.from_bytes(key) for key in cursor.iternext(values=False)]

    return store.environment.read(read)


__all__ = [
    "DB",
    "MAIL",
    "NAMES",
    "WEB",
    "Calendar",
    "Insert",
    "around_commits",
    "balances",
    "caught_up",
    "check_log",
    "clone",
    "copy_log",
    "damage",
    "event_time_us",
    "events_by_vm",
    "events_of",
    "folded",
    "forget_projections",
    "happen",
    "listening",
    "live",
    "live_rows",
    "opened",
    "period_rows",
    "rebuilt",
    "rows",
    "settled",
    "state",
    "states",
    "stream_id",
    "three_months",
]


def take_away(segment: Path) -> None:
    """A segment is gone, as after `replctl log export --move`."""
    segment.unlink()
    segment.with_suffix(".moved").touch()
