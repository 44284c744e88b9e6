# SPDX-License-Identifier: AGPL-3.0-or-later
"""The event log of one side, for trio: protected VMs are loaded, changed and saved here, one change at a time per VM.

All writes go through one lane, which commits what comes together in one transaction. A change is durable when ``change``
returns, and nobody sees it before: what ``get`` and ``vms`` give is never changed in place, so that worker threads may
read it. If saving fails, the VM is read again from the log.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import msgspec
import trio
from eventsourcing.domain import Aggregate
from eventsourcing.persistence import PersistenceError

from eventstore.checkpoint import CheckpointKey
from eventstore.lane import Lane, open_lane
from eventstore.projection_rows import DATABASE
from eventstore.projections import (
    Projection,
    Projections,
    UnknownProjectionError,
    list_projections,
    read_projection,
)
from replicator.domain.vm import ProtectedVm
from replicator.errors import ReplicatorError
from replicator.log import past, peers, periods, sealing, states, usage
from replicator.log.heads import SignedHead, check_begun, ensure_key, signed_head
from replicator.log.peers import Peer
from replicator.log.periods import Period
from replicator.log.store import LogStore, find_vm, fold_stream
from replicator.log.usage import Usage, UsageByDay
from replicator.nursery import flat_nursery

_logger = logging.getLogger(__name__)

T = TypeVar("T")

MakeProjection = Callable[[Callable[[Any], Any]], Projection]
#: What is kept beside the log.
PROJECTIONS: Sequence[MakeProjection] = (states.VmStates, UsageByDay)

#: How soon a request by another process, to rebuild a projection, is seen. Seconds.
POLL_S = 1.0
#: How long events are gathered before they are taken into what is kept beside the log: a commit of its own for each of them
#: would double what is written. Seconds.
GATHER_S = 1.0
#: How long a period may stay closed and unsealed before it is told.
UNSEALED_US_MAX = 600_000_000


def parked(store: LogStore) -> list[str]:
    """The projections that stand still, and why. Blocks."""
    if store.environment.find_database(DATABASE) is None:
        return []
    return [
        f"the projection {state.name} is parked at event {state.event}: {state.error}"
        f" (replctl projections resume {state.name})"
        for state in list_projections(store.recorder)
        if state.state == "parked"
    ]


def unsealed(store: LogStore, now_us: int) -> list[str]:
    """The closed periods that should have been sealed long since. Blocks."""
    cut = periods.load(store.periods)
    return [
        f"the log's period {period.label} is closed and cannot be sealed: the log of who writes it says why"
        for period, following in itertools.pairwise(cut)
        if period.segment is None and now_us - following.opened_at_us > UNSEALED_US_MAX
    ]


def now_us() -> int:
    """Microseconds since the epoch."""
    return time.time_ns() // 1000


class EventLog:
    """The VMs of one side and their events; see ``open_log``."""

    def __init__(
        self, store: LogStore, lane: Lane, key: CheckpointKey | None, clock: Callable[[], int]
    ) -> None:
        self.store = store
        self._key = key
        self._lane = lane
        self._clock = clock
        self._vms: dict[UUID, ProtectedVm] = {}
        self._locks: dict[UUID, trio.Lock] = {}
        self._changed = trio.Event()
        self._registering = trio.Lock()
        #: All periods, the open one last.
        self.periods: list[Period] = []
        self._last = 0  # number of the last event that this process saved
        self._sealing = trio.Lock()
        self._settled = 0  # how many periods are sealed and dropped
        #: Why closed periods stay in the live log, or None.
        self.trouble: str | None = None
        self._projections: list[str] = []
        self._keeper: Projections | None = None

    def load(self) -> None:
        """Find all VMs. Blocks; called before the log is used, and while no VM can change."""
        self.periods = periods.load(self.store.periods)
        self._vms = states.recall(self.store)
        self._last = self.store.head()

    @property
    def projections(self) -> Projections:
        """What is kept beside the log. Only of a log that is open for writing."""
        assert self._keeper is not None
        return self._keeper

    def keep(self, made: Sequence[Projection]) -> None:
        """Have these projections. Blocks; called once, before the log is used."""
        self._projections = [projection.name for projection in made]
        self._keeper = Projections(
            self.store.environment, self.store.recorder, made, poll_s=POLL_S, gather_s=GATHER_S
        )

    @property
    def key(self) -> CheckpointKey:
        """What this log's heads are signed with. Only of a log that is open for writing."""
        assert self._key is not None
        return self._key

    @property
    def vms(self) -> list[ProtectedVm]:
        """All VMs, by name. Read only: changes go through ``change``."""
        return sorted(self._vms.values(), key=lambda vm: (vm.name, vm.vm))

    def get(self, vm: UUID) -> ProtectedVm | None:
        """The VM of that UUID, if this side knows it."""
        return self._vms.get(vm)

    def find(self, name: str) -> ProtectedVm:
        """The VM of that name or UUID. Raises RefusedError that lists what there is."""
        return find_vm(self._vms.values(), name)

    async def register(self, vm: UUID, name: str, role: str) -> ProtectedVm:
        """The VM of that UUID, recorded now if it is new."""
        async with self._registering, self._lock(vm):
            known = self._vms.get(vm)
            if known is None:
                known = ProtectedVm.register(vm, name, role, self.periods[-1].number)
                try:
                    await self._save(known)
                except BaseException:
                    # As in ``change``: it may be in the log all the same.
                    with trio.CancelScope(shield=True):
                        await self._note_registered(vm, known.id)
                    raise
                self._vms[vm] = known
            return known

    async def _note_registered(self, vm: UUID, stream: UUID) -> None:
        found = await self._lane.read(self._stream, stream)
        if found is not None:
            self._vms[vm] = found

    @asynccontextmanager
    async def change(self, vm: UUID) -> AsyncIterator[ProtectedVm]:
        """Hold the VM alone, as a copy; the events triggered inside are durable, and seen by others, when the block is left
        without an error.

        A cancellation inside drops them; while they are being saved it waits for the outcome.
        """
        async with self._lock(vm):
            working = self._vms[vm].working_copy()
            yield working
            if not working.pending_events:
                return
            try:
                await self._save(working)
            except BaseException:
                # The error does not say whether the events are in the log: the log does.
                with trio.CancelScope(shield=True):
                    self._vms[vm] = await self._lane.read(self._reload, self._vms[vm].id)
                raise
            self._vms[vm] = working
            self._tell()

    async def wait_change(self) -> None:
        """Wait until the next change of any VM is durable."""
        await self._changed.wait()

    def _tell(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def warnings(self) -> list[str]:
        """What an operator should look at in the log itself, one line each."""
        found = await self._lane.read(parked, self.store)
        if self._keeper is None:  # read only: whoever writes keeps why to itself
            found += await self._lane.read(unsealed, self.store, self._clock())
        for name in self._projections:
            if (error := self.projections.store_error(name)) is not None:
                found.append(f"the projection {name} waits for the log: {error}")
        return found + ([self.trouble] if self.trouble is not None else [])

    # What happened

    async def usage(self, first_day: str = "") -> dict[str, Usage]:
        """What each VM has cost since its first day, or since ``first_day``, by UUID; a second or two behind the log."""

        def read() -> dict[str, Usage]:
            if self.store.environment.find_database(DATABASE) is None:
                return {}
            try:
                return read_projection(
                    self.store.environment, usage.NAME, lambda view: usage.totals(view, first_day)
                )
            except UnknownProjectionError:
                return {}  # nothing was ever added up

        return await self._lane.read(read)

    async def history(
        self, vm: UUID, *, after: int = 0, limit: int = 1000
    ) -> list[Aggregate.Event]:
        """Up to ``limit`` events of a VM with a number greater than ``after``, oldest first."""
        found, _ = await self.page(vm, past.Wanted(after=after, limit=limit))
        return found

    async def page(self, vm: UUID, wanted: past.Wanted) -> tuple[list[Aggregate.Event], bool]:
        """Events of a VM, oldest first, and whether others had to be left out. Raises SegmentAwayError."""
        return await self._lane.read(past.page, self.store, vm, wanted)

    async def at(self, time_us: int) -> list[ProtectedVm]:
        """The VMs as they were then, by name. Raises SegmentAwayError."""
        found = await self._lane.read(past.states_at, self.store, time_us)
        return sorted(found, key=lambda vm: (vm.name, vm.vm))

    # The journal

    async def journal_put(self, key: str, value: Any) -> None:
        """Write down what must be undone or taken up after a crash; durable on return."""
        encoded = msgspec.msgpack.encode(value)
        await self._lane.commit(self.store.journal.prepare_change({key: encoded}))

    async def journal_get(self, key: str) -> Any:
        """The value under ``key``, or None."""
        found = await self._lane.read(self.store.journal.get, key)
        return None if found is None else msgspec.msgpack.decode(found)

    async def journal_items(self, prefix: str) -> dict[str, Any]:
        """All entries whose key begins with ``prefix``, by key, as of one moment."""
        found = await self._lane.read(self.store.journal.items, prefix)
        return {key: msgspec.msgpack.decode(value) for key, value in found}

    async def journal_delete(self, key: str) -> None:
        """The entry is settled; durable on return."""
        await self._lane.commit(self.store.journal.prepare_change({}, (key,)))

    # The other side's log, and the head of ours

    async def head(self, since: int) -> SignedHead:
        """The head of this log, signed now, with the proof that it continues the log of ``since`` events."""
        return await self._lane.read(signed_head, self.store, self.key, since)

    async def peer(self, vm: UUID) -> Peer | None:
        """What is kept of the other side's log, seen in pushes of this VM."""
        return await self._lane.read(peers.load, self.store.peers, str(vm))

    async def keep_peer(self, vm: UUID, peer: Peer) -> None:
        """Keep this of the other side's log; durable on return."""
        row = {str(vm): msgspec.msgpack.encode(peer)}
        await self._lane.commit(self.store.peers.prepare_change(row))

    async def accept_peer(self, vm: UUID) -> None:
        """Believe the other side's log anew, from what it shows next. Raises RefusedError if nothing is wrong with it."""
        async with self.change(vm) as changing:
            changing.accept_peer()
            # Before the event: if this is cut, what is wrong is found again.
            await self._lane.commit(self.store.peers.prepare_change({}, (str(vm),)))

    # Periods

    async def keep_periods(self) -> None:
        """Close the books when it is time, and seal what is closed; until cancelled."""
        while True:
            changed = self._changed
            try:
                if self._is_over():
                    await self.close_period(self.periods[-1].number)
                await self.seal()
            except (OSError, PersistenceError, ReplicatorError) as error:
                # Nothing is lost: the events stay in the live log. The next change tries again.
                self.trouble = f"the log's closed periods cannot be sealed: {error}"
                _logger.error("%s", self.trouble)
            else:
                self.trouble = None
            await changed.wait()

    def _is_over(self) -> bool:
        current = self.periods[-1]
        return current.is_over(self._last + 1 - current.first, len(self._vms), self._clock())

    async def close_period(self, number: int | None = None) -> Period | None:
        """Close the open period and begin the next; None if nothing has happened since it was opened, or (with ``number``)
        if it is not that one any more.
        """
        async with AsyncExitStack() as held:
            await held.enter_async_context(self._registering)
            for vm in sorted(self._vms):
                await held.enter_async_context(self._lock(vm))
            current = self.periods[-1]
            if number not in (None, current.number):
                return None  # somebody else was faster
            if self._last + 1 - current.first <= len(self._vms):
                return None
            openings = [vm.open_period(current.number + 1) for vm in self._vms.values()]
            stored = self.store.recorder.prepare(
                [self.store.mapper.to_stored_event(event) for event in openings]
            )
            change = periods.Close(self.store.periods, current, stored, self._clock())
            with trio.CancelScope(shield=True):  # what is in the log must be in memory
                try:
                    closed, opened = await self._lane.commit(change)
                except BaseException:
                    # The error does not say whether the books are closed: the log does.
                    await self._lane.read(self.load)
                    raise
            self._vms = {UUID(vm.vm): vm for vm in (event.mutate(None) for event in openings)}
            self.periods[-1:] = [closed, opened]
            self._last = opened.first + len(openings) - 1
            self._tell()
        _logger.info(
            "the log's period %s is closed: events %d to %d",
            closed.label,
            closed.first,
            closed.last,
        )
        return closed

    async def seal(self) -> list[Period]:
        """Seal every closed period, and drop its live rows once every projection has seen them; returns those sealed now.

        Raises OSError, the event store's errors and ReplicatorError; what was done stays done.
        """
        sealed = []
        async with self._sealing:
            while self._settled < len(self.periods) - 1:
                index = self._settled
                period = self.periods[index]
                if period.segment is None:
                    period, ends = await self._lane.read(sealing.seal, self.store, self.key, period)
                    await self._lane.commit(periods.store(self.store.periods, period, ends=ends))
                    self.periods[index] = period
                    sealed.append(period)
                if not period.dropped:
                    await self._drop(period)
                    period = msgspec.structs.replace(period, dropped=True)
                    await self._lane.commit(periods.store(self.store.periods, period))
                    self.periods[index] = period
                self._settled += 1
        return sealed

    async def _drop(self, period: Period) -> None:
        for name in self._projections:
            await self.projections.wait(name, period.last)
        drop = self.store.recorder.prepare_drop
        while await self._lane.commit(drop(period.last, sealing.DROP_ROWS)):
            pass

    # Inside

    def _lock(self, vm: UUID) -> trio.Lock:
        return self._locks.setdefault(vm, trio.Lock())

    def _reload(self, stream: UUID) -> ProtectedVm:
        vm = self._stream(stream)
        assert vm is not None
        return vm

    def _stream(self, stream: UUID) -> ProtectedVm | None:
        return fold_stream(map(self.store.event, self.store.recorder.select_events(stream)))

    async def _save(self, vm: ProtectedVm) -> None:
        events = vm.collect_events()
        if events:
            stored = [self.store.mapper.to_stored_event(event) for event in events]
            nids = await self._lane.commit(self.store.recorder.prepare(stored))
            self._last = max(self._last, nids[-1])


@asynccontextmanager
async def open_log(
    folder: Path,
    *,
    readonly: bool = False,
    clock: Callable[[], int] = now_us,
    kept: Sequence[MakeProjection] | None = None,
) -> AsyncIterator[EventLog]:
    """The log in ``folder`` (made if it is not there, unless ``readonly``), closed at the end.

    ``kept``: the projections beside it, PROJECTIONS unless given; a read-only log keeps none up to date.
    """
    if not readonly:
        await trio.to_thread.run_sync(check_begun, folder)
    store = await trio.to_thread.run_sync(lambda: LogStore.open(folder, readonly=readonly))
    try:
        # The outer nursery only makes one error of the lane's group; the inner one ends before the lane does.
        async with (
            flat_nursery(),
            open_lane(store.environment) as lane,
            flat_nursery() as nursery,
        ):
            key = None
            if not readonly:
                events = await lane.read(store.head)
                key = await trio.to_thread.run_sync(ensure_key, folder, events)
                await _begin(store, lane, clock)
            log = EventLog(store, lane, key, clock)
            await trio.to_thread.run_sync(log.load)
            if readonly:
                yield log
                return
            made = [make(store.event) for make in (PROJECTIONS if kept is None else kept)]
            await trio.to_thread.run_sync(log.keep, made)
            nursery.start_soon(log.projections.run, lane)
            nursery.start_soon(log.keep_periods)
            try:
                yield log
            finally:
                nursery.cancel_scope.cancel()
    finally:
        store.close()


async def _begin(store: LogStore, lane: Lane, clock: Callable[[], int]) -> None:
    """A new log's first period."""
    if not await lane.read(store.periods.items):
        await lane.commit(periods.store(store.periods, Period(1, clock(), 1)))


__all__ = ["EventLog", "open_log"]
