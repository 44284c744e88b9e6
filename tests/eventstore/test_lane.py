# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from eventsourcing.persistence import IntegrityError, OperationalError
from trio.testing import MockClock, wait_all_tasks_blocked

from eventstore import LMDBEnvironment, lane
from eventstore import environment as environment_module
from eventstore.lane import Lane, LaneClosedError, open_lane
from tests.limits import HANG_S

if TYPE_CHECKING:
    from eventstore.environment import Database, Transaction


@pytest.fixture
def database(environment: LMDBEnvironment) -> Database:
    return environment.database("test")


class Put:
    """Stores a key that must be new. A closed gate keeps the writer's thread inside of it."""

    def __init__(
        self,
        database: Database,
        key: bytes,
        gate: trio.Event | None = None,
        fault: Exception | None = None,
    ) -> None:
        self.database = database
        self.key = key
        self.gate = gate
        self.fault = fault
        self.inside = trio.Event()
        self.durable = False

    def check(self, txn: Transaction) -> None:
        if txn.get(self.key, db=self.database) is not None:
            raise IntegrityError(self.key.decode())

    def put(self, txn: Transaction) -> bytes:
        if self.gate is not None:
            trio.from_thread.run_sync(self.inside.set)
            trio.from_thread.run(self.gate.wait)
        txn.put(self.key, b"", db=self.database)
        if self.fault is not None:
            raise self.fault
        return self.key

    def committed(self) -> None:
        self.durable = True


def stored(environment: LMDBEnvironment, database: Database) -> list[bytes]:
    def keys(txn: Transaction) -> list[bytes]:
        with txn.cursor(database) as cursor:
            return list(cursor.iternext(values=False))

    return environment.read(keys)


class Watched:
    """Runs one commit, which can be cancelled, and keeps how it ended."""

    def __init__(self, lane: Lane, operation: Put) -> None:
        self.lane = lane
        self.operation = operation
        self.scope = trio.CancelScope()
        self.ended = ""

    async def run(self) -> None:
        with self.scope:
            try:
                self.ended = f"stored {(await self.lane.commit(self.operation)).decode()}"
            except (IntegrityError, OperationalError, LaneClosedError) as error:
                self.ended = f"{type(error).__name__}"
        if self.scope.cancelled_caught:
            assert not self.ended
            self.ended = "cancelled"


def count_commits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    steps: list[str] = []
    monkeypatch.setattr(
        environment_module, "observe_commit", lambda step, _path: steps.append(step)
    )
    return steps


async def test_what_is_queued_together_shares_a_transaction_and_nothing_else(
    environment: LMDBEnvironment, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conflict and a fault in the middle of a group fail only their own operation."""
    steps = count_commits(monkeypatch)
    gate = trio.Event()
    with trio.fail_after(HANG_S):
        async with open_lane(environment) as opened, trio.open_nursery() as nursery:
            first = Watched(opened, Put(database, b"first", gate))
            nursery.start_soon(first.run)
            await first.operation.inside.wait()
            group = [
                Watched(opened, Put(database, b"a")),
                Watched(opened, Put(database, b"first")),
                Watched(opened, Put(database, b"b", fault=OperationalError("no room"))),
                Watched(opened, Put(database, b"c")),
                Watched(opened, Put(database, b"a")),
            ]
            for one in group:
                nursery.start_soon(one.run)
                await wait_all_tasks_blocked()
            gate.set()
    assert [one.ended for one in group] == [
        "stored a",
        "IntegrityError",
        "OperationalError",
        "stored c",
        "IntegrityError",
    ]
    assert stored(environment, database) == [b"a", b"c", b"first"]
    assert steps.count("after-commit") == 2


async def test_64_clients_need_few_transactions_and_lose_nothing(
    environment: LMDBEnvironment, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = count_commits(monkeypatch)

    async def client(opened: Lane, number: int) -> None:
        for turn in range(4):
            key = b"%02d-%d" % (number, turn)
            operation = Put(database, key)
            assert await opened.commit(operation) == key
            # Nothing is acknowledged before it is durable.
            assert operation.durable

    with trio.fail_after(HANG_S):
        async with open_lane(environment) as opened, trio.open_nursery() as nursery:
            for number in range(64):
                nursery.start_soon(client, opened, number)
    assert len(stored(environment, database)) == 256
    # One by one it would be 256.
    assert steps.count("after-commit") <= 16


async def test_a_batch_is_no_larger_than_asked_for(
    environment: LMDBEnvironment, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = count_commits(monkeypatch)
    gate = trio.Event()
    with trio.fail_after(HANG_S):
        async with open_lane(environment, batch_max=2) as opened, trio.open_nursery() as nursery:
            first = Put(database, b"first", gate)
            nursery.start_soon(opened.commit, first)
            await first.inside.wait()
            for key in (b"a", b"b", b"c", b"d", b"e"):
                nursery.start_soon(opened.commit, Put(database, key))
            await wait_all_tasks_blocked()
            gate.set()
    assert steps.count("after-commit") == 1 + 3
    assert len(stored(environment, database)) == 6


@pytest.mark.parametrize("moment", ["entering", "queued", "taken", "woken", "before"])
async def test_cancelled_means_never_written_at_every_moment_of_a_commit(
    environment: LMDBEnvironment,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    """The awaits of a commit: for a place, for the outcome while queued, and while taken."""
    if moment == "entering":
        monkeypatch.setattr(lane, "QUEUE_MAX", 1)
    gate = trio.Event()
    with trio.fail_after(HANG_S):
        async with (
            open_lane(environment, batch_max=1) as opened,
            trio.open_nursery() as nursery,
        ):
            first = Watched(opened, Put(database, b"first", gate))
            victim = Watched(opened, Put(database, b"victim"))
            last = Watched(opened, Put(database, b"last"))
            if moment == "taken":
                victim.operation.gate = gate
            else:
                nursery.start_soon(first.run)
                await first.operation.inside.wait()
            if moment == "entering":
                nursery.start_soon(last.run)
                await wait_all_tasks_blocked()
            if moment == "before":
                victim.scope.cancel()
            nursery.start_soon(victim.run)
            await wait_all_tasks_blocked()
            if moment == "taken":
                await victim.operation.inside.wait()
            if moment == "woken":
                wake = opened._wake

                def wake_and_cancel(batch: list[lane._Request], error: BaseException) -> None:
                    wake(batch, error)
                    if batch[0].operation is victim.operation:
                        victim.scope.cancel()

                monkeypatch.setattr(opened, "_wake", wake_and_cancel)
            elif moment != "before":
                victim.scope.cancel()
                await wait_all_tasks_blocked()
                # One that was taken waits for its outcome.
                assert victim.ended == ("" if moment == "taken" else "cancelled")
            gate.set()
            if moment != "entering":
                nursery.start_soon(last.run)
    written = moment in {"taken", "woken"}
    assert victim.ended == ("stored victim" if written else "cancelled")
    assert (b"victim" in stored(environment, database)) == written
    # Whoever waits behind it is served.
    assert last.ended == "stored last"


async def test_a_cancelled_place_in_the_queue_is_given_to_the_next(
    environment: LMDBEnvironment, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "QUEUE_MAX", 2)
    gate = trio.Event()
    with trio.fail_after(HANG_S):
        async with open_lane(environment, batch_max=2) as opened, trio.open_nursery() as nursery:
            first = Put(database, b"first", gate)
            nursery.start_soon(opened.commit, first)
            await first.inside.wait()
            waiters = [Watched(opened, Put(database, b"%d" % i)) for i in range(4)]
            for waiter in waiters:
                nursery.start_soon(waiter.run)
                await wait_all_tasks_blocked()
            assert len(opened._queue) == 2
            waiters[0].scope.cancel()
            await wait_all_tasks_blocked()
            assert [request.operation for request in opened._queue] == [
                waiters[1].operation,
                waiters[2].operation,
            ]
            gate.set()
    assert stored(environment, database) == [b"1", b"2", b"3", b"first"]


async def test_when_the_commit_itself_fails_every_waiter_of_it_knows(
    environment: LMDBEnvironment, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def observe(step: str, _path: str) -> None:
        steps.append(step)
        if steps.count("before-commit") == 2:
            steps.append("before-commit")
            raise OperationalError("no room")

    monkeypatch.setattr(environment_module, "observe_commit", observe)
    errors: list[OperationalError] = []

    async def expect_failure(opened: Lane, key: bytes) -> None:
        with pytest.raises(OperationalError, match="no room") as caught:
            await opened.commit(Put(database, key))
        errors.append(caught.value)

    gate = trio.Event()
    with trio.fail_after(HANG_S):
        async with open_lane(environment) as opened:
            async with trio.open_nursery() as nursery:
                first = Put(database, b"first", gate)
                nursery.start_soon(opened.commit, first)
                await first.inside.wait()
                nursery.start_soon(expect_failure, opened, b"a")
                nursery.start_soon(expect_failure, opened, b"b")
                await wait_all_tasks_blocked()
                gate.set()
            assert stored(environment, database) == [b"first"]
            assert await opened.commit(Put(database, b"a")) == b"a"
    # Not one object with the tracebacks of both.
    assert len(errors) == 2
    assert errors[0] is not errors[1]


async def test_a_commit_in_flight_when_everything_is_cancelled_has_a_known_outcome(
    environment: LMDBEnvironment, database: Database
) -> None:
    gate = trio.Event()
    first: Watched | None = None
    queued: Watched | None = None

    async def open_when_cancelled(scope: trio.CancelScope) -> None:
        with trio.CancelScope(shield=True):
            while not scope.cancel_called:
                await trio.lowlevel.checkpoint()
            await wait_all_tasks_blocked()
            gate.set()

    async with trio.open_nursery() as outer:
        with trio.CancelScope() as scope:
            async with open_lane(environment) as opened, trio.open_nursery() as nursery:
                first = Watched(opened, Put(database, b"first", gate))
                queued = Watched(opened, Put(database, b"queued"))
                nursery.start_soon(first.run)
                await first.operation.inside.wait()
                nursery.start_soon(queued.run)
                await wait_all_tasks_blocked()
                outer.start_soon(open_when_cancelled, scope)
                scope.cancel()
    assert first is not None
    assert first.ended == "stored first"
    assert queued is not None
    assert queued.ended == ""  # the surrounding scope's cancellation went through it
    assert stored(environment, database) == [b"first"]


async def test_closing_finishes_what_is_queued_and_refuses_what_is_late(
    environment: LMDBEnvironment, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "QUEUE_MAX", 2)
    gate = trio.Event()
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as outside:
            async with open_lane(environment, batch_max=1) as opened:
                first = Watched(opened, Put(database, b"first", gate))
                outside.start_soon(first.run)
                await first.operation.inside.wait()
                others = [Watched(opened, Put(database, b"%d" % i)) for i in range(5)]
                for other in others:
                    outside.start_soon(other.run)
                    await wait_all_tasks_blocked()
                others[1].scope.cancel()
                await wait_all_tasks_blocked()
                outside.start_soon(set_when_closed, opened, gate)
            # Nothing was left for later.
            assert stored(environment, database) == [b"0", b"2", b"first"]
            with pytest.raises(LaneClosedError):
                await opened.commit(Put(database, b"late"))
            with pytest.raises(LaneClosedError):
                await opened.read(stored, environment, database)
    assert opened.closed
    assert [other.ended for other in others] == [
        "stored 0",
        "cancelled",
        "stored 2",
        "LaneClosedError",
        "LaneClosedError",
    ]


async def set_when_closed(opened: Lane, gate: trio.Event) -> None:
    while not opened.closed:
        await trio.lowlevel.checkpoint()
    gate.set()


async def test_an_error_of_the_block_closes_the_lane_too(
    environment: LMDBEnvironment, database: Database
) -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="the caller's")):
        async with open_lane(environment) as opened:
            await opened.commit(Put(database, b"a"))
            raise ValueError("the caller's")
    assert opened.closed
    assert stored(environment, database) == [b"a"]


async def test_reads_run_beside_a_writer_that_is_stuck_but_only_so_many(
    environment: LMDBEnvironment, database: Database
) -> None:
    gate = trio.Event()
    running: list[int] = []
    most = 0

    def read(number: int) -> int:
        nonlocal most
        running.append(number)
        most = max(most, len(running))
        trio.from_thread.run(gate.wait)
        running.remove(number)
        return number * 2

    results: list[int] = []

    async def reader(opened: Lane, number: int) -> None:
        results.append(await opened.read(read, number))

    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as outside:
            async with open_lane(environment, readers=2) as opened:
                first = Put(database, b"first", gate)
                outside.start_soon(opened.commit, first)
                await first.inside.wait()
                assert await opened.read(stored, environment, database) == []
                for number in range(5):
                    outside.start_soon(reader, opened, number)
                await wait_all_tasks_blocked()
                outside.start_soon(set_when_closed, opened, gate)
            # The lane's end waits for them all.
            assert sorted(results) == [0, 2, 4, 6, 8]
    assert most == 2


async def test_slots_of_dead_readers_are_cleared_at_the_start_and_every_minute(
    environment: LMDBEnvironment, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    del autojump_clock
    times: list[float] = []
    fourth = trio.Event()

    def check(_: LMDBEnvironment) -> int:
        def note() -> None:
            times.append(trio.current_time() - start)
            if len(times) == 4:
                fourth.set()

        trio.from_thread.run_sync(note)
        return 0

    monkeypatch.setattr(LMDBEnvironment, "check_readers", check)
    start = trio.current_time()
    async with open_lane(environment):
        await fourth.wait()
    assert times == pytest.approx([0, 60, 120, 180])


async def test_a_check_of_readers_that_fails_is_not_swallowed(
    environment: LMDBEnvironment, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    del autojump_clock
    calls: list[int] = []

    def check(_: LMDBEnvironment) -> int:
        calls.append(1)
        if len(calls) > 1:
            raise OperationalError("lock file")
        return 0

    monkeypatch.setattr(LMDBEnvironment, "check_readers", check)
    with pytest.RaisesGroup(pytest.RaisesExc(OperationalError, match="lock file")):
        async with open_lane(environment):
            await trio.sleep_forever()


class StopWriterError(BaseException):
    pass


async def test_a_writer_that_is_torn_down_leaves_nobody_waiting(
    environment: LMDBEnvironment, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt in the writer's thread ends the lane, and every waiter hears of it."""

    def observe(_step: str, _path: str) -> None:
        raise StopWriterError

    monkeypatch.setattr(environment_module, "observe_commit", observe)
    gate = trio.Event()
    ended: list[str] = []

    async def client(opened: Lane, operation: Put) -> None:
        # Not heard of by cancellation: that is how the lane's end must not look like.
        with trio.CancelScope(shield=True):
            try:
                await opened.commit(operation)
            except (LaneClosedError, StopWriterError) as error:
                ended.append(type(error).__name__)

    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as outside:
            with pytest.RaisesGroup(StopWriterError):
                async with open_lane(environment, batch_max=1) as opened:
                    first = Put(database, b"first", gate)
                    outside.start_soon(client, opened, first)
                    await first.inside.wait()
                    outside.start_soon(client, opened, Put(database, b"queued"))
                    await wait_all_tasks_blocked()
                    gate.set()
                    await trio.sleep_forever()
    assert sorted(ended) == ["LaneClosedError", "StopWriterError"]
    assert stored(environment, database) == []


@pytest.mark.parametrize(("readers", "batch_max"), [(0, 1), (1, 0), (1, lane.QUEUE_MAX + 1)])
async def test_bounds_that_make_no_sense_are_refused(
    environment: LMDBEnvironment, readers: int, batch_max: int
) -> None:
    with pytest.raises(ValueError, match="bounds"):
        async with open_lane(environment, readers=readers, batch_max=batch_max):
            raise AssertionError
