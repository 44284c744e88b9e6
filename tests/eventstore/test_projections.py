# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import lmdb
import pytest
import trio
from eventsourcing.persistence import (
    DataError,
    InterfaceError,
    InternalError,
    Notification,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
    StoredEvent,
)
from trio.testing import MockClock, wait_all_tasks_blocked

from eventstore import LMDBApplicationRecorder, LMDBEnvironment, projection_keeper
from eventstore import environment as environment_module
from eventstore.follow import Commits
from eventstore.lane import Lane, open_lane
from eventstore.projection_rows import DATABASE, _row_prefix
from eventstore.projections import (
    Projection,
    ProjectionParkedError,
    Projections,
    ProjectionState,
    RebuildUnderWayError,
    UnknownProjectionError,
    View,
    list_projections,
    read_projection,
    request_rebuild,
    resume,
)
from tests.limits import HANG_S

if TYPE_CHECKING:
    from eventstore.environment import Transaction

ROOT = Path(__file__).parents[2]


class Seen(Projection):
    """Notes each event, and finds one that comes twice."""

    def __init__(
        self, name: str = "seen", revision: int = 1, topics: Sequence[str] = (), text: bytes = b"1"
    ) -> None:
        self.name = name
        self.revision = revision
        self.topics = topics
        self.text = text
        self.poison: set[int] = set()
        self.tried: list[tuple[int, float]] = []

    def begin(self, view: View) -> None:
        view.put(b"begun", b"")

    def apply(self, view: View, notification: Notification) -> None:
        key = b"e%08d" % notification.id
        assert view.get(key) is None, "an event came twice"
        # Written before it fails: that must not stay.
        view.put(key, self.text)
        if notification.id in self.poison:
            self.tried.append((notification.id, trio.from_thread.run_sync(trio.current_time)))
            raise ValueError(f"cannot make sense of {notification.topic}")


@pytest.fixture
def recorder(environment: LMDBEnvironment) -> LMDBApplicationRecorder:
    return LMDBApplicationRecorder(environment)


def insert(recorder: LMDBApplicationRecorder, *topics: str) -> None:
    recorder.insert_events([StoredEvent(uuid4(), 1, topic, b"state") for topic in topics])


def rows(view: View) -> dict[int, bytes]:
    return {int(key[1:]): value for key, value in view.items(b"e")}


def seen(environment: LMDBEnvironment, name: str = "seen") -> list[int]:
    return list(read_projection(environment, name, rows))


def state_of(recorder: LMDBApplicationRecorder, name: str = "seen") -> ProjectionState:
    return next(state for state in list_projections(recorder) if state.name == name)


def made(recorder: LMDBApplicationRecorder, *projections: Projection) -> Projections:
    # Without a poll: virtual time must not run ahead of the threads.
    return Projections(recorder.environment, recorder, projections, poll_s=math.inf)


@asynccontextmanager
async def running(
    recorder: LMDBApplicationRecorder, *projections: Projection
) -> AsyncIterator[Projections]:
    keeping = made(recorder, *projections)
    async with (
        open_lane(recorder.environment, reader_check_s=math.inf) as lane,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(keeping.run, lane)
        yield keeping
        nursery.cancel_scope.cancel()


async def until(
    recorder: LMDBApplicationRecorder,
    true: Callable[[ProjectionState], bool],
    name: str = "seen",
) -> ProjectionState:
    """The state as soon as a commit has made it so."""
    with Commits(recorder.environment, math.inf) as commits:
        while True:
            commits.look()
            states = [state for state in list_projections(recorder) if state.name == name]
            if states and true(states[0]):
                return states[0]
            await commits.wait()


def is_parked(state: ProjectionState) -> bool:
    return state.state == "parked"


def leftover_rows(environment: LMDBEnvironment, generation: int, name: str = "seen") -> int:
    database = environment.database(DATABASE)
    prefix = _row_prefix(name, generation)

    def count(txn: Transaction) -> int:
        with txn.cursor(database) as cursor:
            return sum(key.startswith(prefix) for key in cursor.iternext(values=False))

    return environment.read(count)


async def test_rows_follow_the_log_and_wait_reads_ones_own_writes(
    recorder: LMDBApplicationRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection_keeper, "BATCH_MAX", 3)
    insert(recorder, *"abcdefg")
    with trio.fail_after(HANG_S):
        async with running(recorder, Seen()) as keeping:
            await keeping.wait("seen", 7)
            assert keeping.read("seen", rows) == dict.fromkeys(range(1, 8), b"1")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keeping.wait, "seen", 8)
                await wait_all_tasks_blocked()
                insert(recorder, "h")
            assert seen(recorder.environment) == list(range(1, 9))
            with pytest.raises(UnknownProjectionError):
                await keeping.wait("other", 1)
            with pytest.raises(UnknownProjectionError):
                keeping.store_error("other")


async def test_the_position_moves_also_when_nothing_matches(
    recorder: LMDBApplicationRecorder,
) -> None:
    insert(recorder, "other", "rare", "other", "other")
    with trio.fail_after(HANG_S):
        async with running(recorder, Seen(topics=["rare"])) as keeping:
            await keeping.wait("seen", 4)
            insert(recorder, "other")
            await keeping.wait("seen", 5)
    assert seen(recorder.environment) == [2]
    assert state_of(recorder).position == 5


async def test_lag_is_shown_and_the_next_run_goes_on_from_there(
    recorder: LMDBApplicationRecorder,
) -> None:
    insert(recorder, "a", "b")
    with trio.fail_after(HANG_S):
        async with running(recorder, Seen()) as keeping:
            await keeping.wait("seen", 2)
        insert(recorder, "c", "d", "e")
        (state,) = keeping.list()
        assert (state.state, state.position, state.head, state.lag) == ("live", 2, 5, 3)
        assert (state.revision, state.generation, state.rebuild_progress) == (1, 1, None)
        with pytest.raises(InterfaceError, match="does not run"):
            await keeping.wait("seen", 5)
        async with running(recorder, Seen()) as keeping:
            await keeping.wait("seen", 5)
    assert seen(recorder.environment) == [1, 2, 3, 4, 5]
    assert state_of(recorder).lag == 0


async def test_two_programs_that_run_the_same_projection_apply_each_event_once(
    recorder: LMDBApplicationRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection_keeper, "BATCH_MAX", 2)
    insert(recorder, *"abcdefghijkl")
    with trio.fail_after(HANG_S):
        async with running(recorder, Seen()) as first, running(recorder, Seen()) as second:
            await first.wait("seen", 12)
            await second.wait("seen", 12)
    assert seen(recorder.environment) == list(range(1, 13))


RETRY_TIMES = [0.0, 0.1, 0.3, 0.7, 1.5, 3.1, 6.3, 12.7, 22.7, 32.7]


async def test_a_failing_event_is_retried_and_then_parked_and_the_others_go_on(
    recorder: LMDBApplicationRecorder,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    del autojump_clock
    insert(recorder, "a", "b", "bad", "d")
    failing, other = Seen("failing"), Seen("other")
    failing.poison = {3}
    async with running(recorder, failing, other) as keeping:
        with pytest.raises(ProjectionParkedError, match=r"at event 3: .*sense of bad"):
            await keeping.wait("failing", 3)
        # What was good is committed, and what the failing event wrote is not.
        assert seen(recorder.environment, "failing") == [1, 2]
        await keeping.wait("failing", 2)
        insert(recorder, "e")
        await keeping.wait("other", 5)
    state = state_of(recorder, "failing")
    assert (state.state, state.position, state.lag) == ("parked", 2, 3)
    assert (state.event, state.topic, state.tries) == (3, "bad", projection_keeper.RETRIES_MAX)
    assert state.error == "ValueError: cannot make sense of bad"
    start = failing.tried[0][1]
    assert [time - start for _, time in failing.tried] == pytest.approx(RETRY_TIMES)
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    (text,) = [record.getMessage() for record in errors]
    assert text.startswith("projection failing is parked at event 3 (bad) after 10 tries: Value")
    # It stays parked over a restart, with the cause mended or not, until somebody says so.
    failing.poison = set()
    async with running(recorder, failing, other) as keeping:
        with pytest.raises(ProjectionParkedError):
            await keeping.wait("failing", 3)
        await trio.to_thread.run_sync(keeping.resume, "failing")
        await keeping.wait("failing", 5)
    assert seen(recorder.environment, "failing") == [1, 2, 3, 4, 5]
    assert state_of(recorder, "failing").error is None


async def test_an_event_that_works_at_a_later_try_parks_nothing(
    recorder: LMDBApplicationRecorder,
    autojump_clock: MockClock,
) -> None:
    del autojump_clock
    insert(recorder, "a", "b", "c")

    class Twice(Seen):
        def apply(self, view: View, notification: Notification) -> None:
            # The second failing event is nothing to the first one's tries.
            if len([nid for nid, _ in self.tried if nid == notification.id]) >= 9:
                self.poison.discard(notification.id)
            super().apply(view, notification)

    projection = Twice()
    projection.poison = {2, 3}
    async with running(recorder, projection) as keeping:
        await keeping.wait("seen", 3)
    assert [nid for nid, _ in projection.tried].count(2) == 9
    assert [nid for nid, _ in projection.tried].count(3) >= 9
    assert state_of(recorder).state == "live"


class Gathering(Projection):
    """Writes what it has gathered once for each transaction."""

    name = "gathering"

    def __init__(self) -> None:
        self.gathered: list[int] = []
        self.poison: set[int] = set()

    def apply(self, view: View, notification: Notification) -> None:
        del view
        if notification.id in self.poison:
            self.gathered.clear()
            raise ValueError("poison")
        self.gathered.append(notification.id)

    def finish(self, view: View) -> None:
        ids, self.gathered = self.gathered, []
        before = view.get(b"ids") or b""
        view.put(b"ids", before + bytes(ids))
        view.put(b"writes", bytes([(view.get(b"writes") or b"\0")[0] + 1]))


async def test_what_was_gathered_is_written_with_the_transaction_that_it_is_of(
    recorder: LMDBApplicationRecorder, autojump_clock: MockClock
) -> None:
    del autojump_clock
    insert(recorder, "a", "b", "c", "d")
    projection = Gathering()
    projection.poison = {3}
    async with running(recorder, projection):
        await until(recorder, is_parked, "gathering")
    projection.poison = set()
    await trio.to_thread.run_sync(resume, recorder.environment, "gathering")
    async with running(recorder, projection) as keeping:
        await keeping.wait("gathering", 4)
    read = read_projection(recorder.environment, "gathering", lambda view: dict(view.items()))
    assert read[b"ids"] == bytes([1, 2, 3, 4])
    assert read[b"writes"] == bytes([2])  # before the poison, and after it


async def test_events_are_gathered_unless_somebody_waits_for_them(
    recorder: LMDBApplicationRecorder, autojump_clock: MockClock
) -> None:
    projection = Gathering()
    keeping = Projections(
        recorder.environment, recorder, [projection], poll_s=math.inf, gather_s=3600
    )

    def ids(view: View) -> list[int]:
        return list(view.get(b"ids") or b"")

    async with (
        open_lane(recorder.environment, reader_check_s=math.inf) as lane,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(keeping.run, lane)
        # Virtual time stands still while threads work: nothing here waits for an hour.
        autojump_clock.autojump_threshold = math.inf
        for number in (1, 2, 3):
            await trio.to_thread.run_sync(insert, recorder, "a")
            await wait_all_tasks_blocked()
            if number == 2:
                await keeping.wait("gathering", 2)
                assert keeping.read("gathering", ids) == [1, 2]
        await keeping.wait("gathering", 3)
        assert keeping.read("gathering", ids) == [1, 2, 3]
        nursery.cancel_scope.cancel()
    writes = keeping.read("gathering", lambda view: view.get(b"writes"))
    assert writes is not None
    assert writes[0] <= 3  # at its start, at the second and at the third


async def test_a_generation_that_cannot_begin_is_parked_before_the_first_event(
    recorder: LMDBApplicationRecorder, autojump_clock: MockClock
) -> None:
    del autojump_clock
    insert(recorder, "a")

    class Unready(Seen):
        ready = False

        def begin(self, view: View) -> None:
            view.put(b"half", b"")
            if not self.ready:
                raise OSError("no sealed state")

    projection = Unready()
    async with running(recorder, projection) as keeping:
        state = await until(recorder, is_parked)
        assert (state.event, state.error, state.position) == (0, "OSError: no sealed state", 0)
        assert leftover_rows(recorder.environment, 1) == 0
        projection.ready = True
        await trio.to_thread.run_sync(keeping.resume, "seen")
        await keeping.wait("seen", 1)
    assert seen(recorder.environment) == [1]


async def test_a_store_without_room_parks_nothing_and_is_shown(
    recorder: LMDBApplicationRecorder,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    del autojump_clock
    insert(recorder, "a")
    shown: list[str | None] = []

    async with running(recorder, Seen()) as keeping:
        await keeping.wait("seen", 1)

        def observe(step: str, _path: str) -> None:
            if step == "before-commit" and len(shown) < 2 * projection_keeper.RETRIES_MAX:
                shown.append(keeping.store_error("seen"))
                raise OperationalError("no space left")

        insert(recorder, "b")
        monkeypatch.setattr(environment_module, "observe_commit", observe)
        await keeping.wait("seen", 2)
        assert keeping.list()[0].state == "live"
        await wait_all_tasks_blocked()
        assert keeping.store_error("seen") is None
    assert shown[0] is None
    assert set(shown[1:]) == {"OperationalError: no space left"}
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1


async def test_an_error_of_lmdb_inside_apply_is_the_stores_fault(
    recorder: LMDBApplicationRecorder, autojump_clock: MockClock
) -> None:
    del autojump_clock
    insert(recorder, "a")
    tries = 0

    class Full(Seen):
        def apply(self, view: View, notification: Notification) -> None:
            nonlocal tries
            tries += 1
            # More often than an event would be tried.
            if tries <= 2 * projection_keeper.RETRIES_MAX:
                raise lmdb.DiskError("write")
            super().apply(view, notification)

    async with running(recorder, Full()) as keeping:
        await keeping.wait("seen", 1)
    assert tries == 2 * projection_keeper.RETRIES_MAX + 1
    assert state_of(recorder).state == "live"


async def test_a_rebuild_is_made_beside_the_live_rows_and_takes_their_place_at_once(
    recorder: LMDBApplicationRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection_keeper, "BATCH_MAX", 2)
    monkeypatch.setattr(projection_keeper, "DROP_ROWS_MAX", 2)
    environment = recorder.environment
    insert(recorder, *"abcdef")
    with trio.fail_after(HANG_S):
        async with running(recorder, Seen()) as keeping:
            await keeping.wait("seen", 6)
        request_rebuild(environment, "seen")
        assert state_of(recorder).state == "rebuilding"
        insert(recorder, "g")
        trace: list[tuple[int, int, int | None, int, int]] = []

        def observe(step: str, _path: str) -> None:
            if step == "after-commit":
                state = state_of(recorder)
                live = read_projection(environment, "seen", rows)
                assert list(live) == list(range(1, state.position + 1))
                trace.append(
                    (
                        state.generation,
                        state.position,
                        state.rebuild_position,
                        len(live),
                        leftover_rows(environment, 1),
                    )
                )

        monkeypatch.setattr(environment_module, "observe_commit", observe)
        async with running(recorder, Seen(text=b"2")) as keeping:
            await until(recorder, lambda _: leftover_rows(environment, 1) == 0)
    assert trace == [
        (1, 6, 0, 6, 7),  # the generation is made
        (1, 7, 0, 7, 8),  # the live one goes on
        (1, 7, 2, 7, 8),
        (1, 7, 4, 7, 8),
        (1, 7, 6, 7, 8),
        (1, 7, 7, 7, 8),
        (2, 7, None, 7, 8),  # the switch
        (2, 7, None, 7, 6),
        (2, 7, None, 7, 4),
        (2, 7, None, 7, 2),
        (2, 7, None, 7, 0),
    ]
    assert keeping.read("seen", rows) == dict.fromkeys(range(1, 8), b"2")


async def test_a_rebuild_is_refused_while_one_is_under_way(
    recorder: LMDBApplicationRecorder, autojump_clock: MockClock
) -> None:
    del autojump_clock
    environment = recorder.environment
    insert(recorder, "a", "b")
    projection = Seen()
    made(recorder, projection)
    with pytest.raises(UnknownProjectionError):
        request_rebuild(environment, "seen")
    async with running(recorder, projection) as keeping:
        await keeping.wait("seen", 2)
    request_rebuild(environment, "seen")
    with pytest.raises(RebuildUnderWayError):
        keeping.request_rebuild("seen")
    projection.poison = {2}
    async with running(recorder, projection):
        await until(recorder, lambda state: state.rebuild_position == 1)
        with pytest.raises(RebuildUnderWayError):
            request_rebuild(environment, "seen")
        state = await until(recorder, is_parked)
        assert (state.event, state.position, state.rebuild_position) == (2, 2, 1)
        assert state.rebuild_progress == 0.5
        # The live one is as it was, and goes on.
        insert(recorder, "c")
        state = await until(recorder, lambda state: state.position == 3)
        assert is_parked(state)
        assert seen(environment) == [1, 2, 3]
        # A parked rebuild may be given up for a new one.
        projection.poison = set()
        await trio.to_thread.run_sync(request_rebuild, environment, "seen")
        state = await until(recorder, lambda state: state.generation == 3)
        await until(recorder, lambda _: leftover_rows(environment, 1) == 0)
    assert seen(environment) == [1, 2, 3]
    assert leftover_rows(environment, 2) == 0


async def test_a_rebuild_cures_a_parked_projection(
    recorder: LMDBApplicationRecorder, autojump_clock: MockClock
) -> None:
    del autojump_clock
    insert(recorder, "a", "b", "c")
    projection = Seen()
    projection.poison = {2}
    async with running(recorder, projection) as keeping:
        await until(recorder, is_parked)
        projection.poison = set()
        await trio.to_thread.run_sync(keeping.request_rebuild, "seen")
        # Who waits now waits for the new generation.
        await until(recorder, lambda state: state.state != "parked")
        await keeping.wait("seen", 3)
    assert state_of(recorder).generation == 2
    assert seen(recorder.environment) == [1, 2, 3]


CHILD = """
import sys
from eventstore import LMDBApplicationRecorder, LMDBEnvironment
from eventstore.projections import (
    RebuildUnderWayError, list_projections, read_projection, request_rebuild
)
with LMDBEnvironment.open(sys.argv[1], readonly=sys.argv[2] == "look") as environment:
    if sys.argv[2] == "look":
        print(*list_projections(LMDBApplicationRecorder(environment)))
        print(read_projection(environment, "seen", lambda view: len(list(view.items(b"e")))))
    else:
        request_rebuild(environment, "seen")
        try:
            request_rebuild(environment, "seen")
        except RebuildUnderWayError as error:
            print(error)
"""


def in_another_process(environment: LMDBEnvironment, what: str) -> str:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, os.fspath(environment.path), what],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=HANG_S,
        check=True,
    )
    return child.stdout.decode()


async def test_another_process_reads_and_asks_for_a_rebuild(
    recorder: LMDBApplicationRecorder,
) -> None:
    environment = recorder.environment
    insert(recorder, "a", "b")
    with trio.fail_after(HANG_S):
        async with running(recorder, Seen()) as keeping:
            await keeping.wait("seen", 2)
        # Not running: the refusal is by the rows alone.
        refusal = await trio.to_thread.run_sync(in_another_process, environment, "ask")
        assert "being rebuilt already" in refusal
        async with running(recorder, Seen()):
            await until(recorder, lambda state: state.generation == 2)
        keeping = Projections(environment, recorder, [Seen()], poll_s=0.01)
        async with open_lane(environment) as lane, trio.open_nursery() as nursery:
            nursery.start_soon(keeping.run, lane)
            await keeping.wait("seen", 2)
            await until(recorder, lambda _: leftover_rows(environment, 1) == 0)
            await trio.to_thread.run_sync(in_another_process, environment, "ask")
            # The running one has seen that commit.
            await until(recorder, lambda state: state.generation == 3)
            nursery.cancel_scope.cancel()
    shown = await trio.to_thread.run_sync(in_another_process, environment, "look")
    expected = ProjectionState(
        name="seen", state="live", revision=1, generation=3, position=2, head=2
    )
    assert shown.splitlines() == [str(expected), "2"]


async def test_another_revision_is_rebuilt_at_the_start_and_never_mixed_with_the_old_rows(
    recorder: LMDBApplicationRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection_keeper, "BATCH_MAX", 1)
    environment = recorder.environment
    insert(recorder, "a", "b")
    mixed: list[set[bytes]] = []

    def observe(step: str, _path: str) -> None:
        if step == "after-commit":
            mixed.append(set(read_projection(environment, "seen", rows).values()))

    with trio.fail_after(HANG_S):
        async with running(recorder, Seen()) as keeping:
            await keeping.wait("seen", 2)
        insert(recorder, "c")
        monkeypatch.setattr(environment_module, "observe_commit", observe)
        async with running(recorder, Seen(revision=2, text=b"2")) as keeping:
            await keeping.wait("seen", 3)
    assert {len(values) for values in mixed} == {1}
    assert mixed[0] == {b"1"}
    assert read_projection(environment, "seen", rows) == {1: b"2", 2: b"2", 3: b"2"}
    assert state_of(recorder).revision == 2


@pytest.mark.parametrize("back_to", [1, 3])
async def test_a_rebuild_by_logic_that_is_gone_is_given_up(
    recorder: LMDBApplicationRecorder, monkeypatch: pytest.MonkeyPatch, back_to: int
) -> None:
    monkeypatch.setattr(projection_keeper, "BATCH_MAX", 1)
    environment = recorder.environment
    insert(recorder, "a", "b", "c")
    with trio.fail_after(HANG_S):
        async with running(recorder, Seen()) as keeping:
            await keeping.wait("seen", 3)
        async with running(recorder, Seen(revision=2, text=b"2")):
            await until(recorder, lambda state: state.rebuild_position == 1)
        # Cancelled in the middle of it.
        assert state_of(recorder).generation == 1
        insert(recorder, "d")
        text = b"%d" % back_to
        async with running(recorder, Seen(revision=back_to, text=text)) as keeping:
            await keeping.wait("seen", 4)
            await until(recorder, lambda _: leftover_rows(environment, 2) == 0)
    state = state_of(recorder)
    assert (state.generation, state.rebuild_position) == (1 if back_to == 1 else 3, None)
    assert read_projection(environment, "seen", rows) == dict.fromkeys(range(1, 5), text)


async def test_events_that_were_moved_away_are_begun_with_and_not_missed(
    recorder: LMDBApplicationRecorder,
) -> None:
    insert(recorder, *"abcdef")
    environment = recorder.environment
    environment.commit([recorder.prepare_drop(2, 10)])
    with trio.fail_after(HANG_S):
        async with running(recorder, Seen()) as keeping:
            await keeping.wait("seen", 6)
        assert seen(environment) == [3, 4, 5, 6]
        assert keeping.read("seen", lambda view: view.get(b"begun")) == b""
        # Moved away while nobody had seen them: not to be passed over in silence.
        insert(recorder, *"ghi")
        environment.commit([recorder.prepare_drop(8, 10)])
        async with running(recorder, Seen()) as keeping:
            with pytest.raises(ProjectionParkedError, match="events 7 to 8 were moved away"):
                await keeping.wait("seen", 9)
            await trio.to_thread.run_sync(keeping.request_rebuild, "seen")
            await until(recorder, lambda state: state.generation == 2)
    assert seen(environment) == [9]


def test_a_kill_at_every_commit_leaves_each_event_applied_once(tmp_path: Path) -> None:
    """A child is killed at every commit step of: filling, following, a rebuild, the deletion of the
    old rows; its own successors look at what it left, and finish it.
    """
    child = subprocess.run(
        [sys.executable, "-m", "tests.eventstore.projection_crash_child", os.fspath(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=HANG_S,
        check=True,
    )
    lines = child.stdout.decode().splitlines()
    assert lines[-1] == "finished without a kill"
    assert set(lines[:-1]) == {"killed, consistent, finished"}
    # Two steps a commit, and far more commits than databases to make.
    assert len(lines) > 40


class Keys(Projection):
    """Runs a function on its view, as an event's effect."""

    def __init__(self, name: str, function: Callable[[View], None]) -> None:
        self.name = name
        self.function = function

    def apply(self, view: View, notification: Notification) -> None:
        del notification
        self.function(view)


async def applied(recorder: LMDBApplicationRecorder, *projections: Projection) -> None:
    insert(recorder, "topic")
    with trio.fail_after(HANG_S):
        async with running(recorder, *projections) as keeping:
            for projection in projections:
                await keeping.wait(projection.name, recorder.max_notification_id() or 0)


async def test_a_view_has_its_own_rows_and_nobody_elses(recorder: LMDBApplicationRecorder) -> None:
    def fill(view: View) -> None:
        for key in (b"a", b"ab", b"b", b"\xff", b"k" * 400):
            view.put(key, b"old")
            view.put(key, key[:1])
        assert view.delete(b"b")
        assert not view.delete(b"b")

    # One name begins the other.
    await applied(recorder, Keys("n", fill), Keys("nn", fill))

    def everything(view: View) -> list[tuple[bytes, bytes]]:
        return list(view.items())

    expected = [(b"a", b"a"), (b"ab", b"a"), (b"k" * 400, b"k"), (b"\xff", b"\xff")]
    for name in ("n", "nn"):
        assert read_projection(recorder.environment, name, everything) == expected
        assert read_projection(recorder.environment, name, lambda view: list(view.items(b"a"))) == [
            (b"a", b"a"),
            (b"ab", b"a"),
        ]


async def test_rows_may_change_while_they_are_gone_through(
    recorder: LMDBApplicationRecorder,
) -> None:
    walked: list[bytes] = []

    def walk(view: View) -> None:
        for key in (b"a", b"b", b"c", b"d"):
            view.put(key, b"")
        for key, value in view.items():
            assert value == b""
            walked.append(key)
            view.delete(key)
            if key == b"a":
                view.delete(b"b")
                view.put(b"cc", b"")

    await applied(recorder, Keys("walk", walk))
    assert walked == [b"a", b"c", b"cc", b"d"]
    assert read_projection(recorder.environment, "walk", lambda view: list(view.items())) == []


async def test_what_a_view_does_not_allow_is_an_error(recorder: LMDBApplicationRecorder) -> None:
    environment = recorder.environment
    kept: list[View] = []

    def misuse(view: View) -> None:
        kept.append(view)
        with pytest.raises(DataError):
            view.get(b"")
        with pytest.raises(DataError):
            view.put(b"k" * 401, b"")
        with pytest.raises(DataError):
            view.put(b"k", b"v" * ((1 << 20) + 1))
        with pytest.raises(DataError):
            list(view.items(b"k" * 401))
        view.put(b"k", b"v")

    await applied(recorder, Keys("misuse", misuse))
    with pytest.raises(ProgrammingError, match="after its transaction"):
        kept[0].get(b"k")
    with pytest.raises(ProgrammingError, match="for reading only"):
        read_projection(environment, "misuse", lambda view: view.put(b"k", b""))
    with pytest.raises(ProgrammingError, match="for reading only"):
        read_projection(environment, "misuse", lambda view: view.delete(b"k"))
    # A generator would run after the transaction.
    with pytest.raises(ProgrammingError, match="after its transaction"):
        list(read_projection(environment, "misuse", lambda view: view.items()))
    for name in ("", "a/b", "n" * 61, "é"):
        with pytest.raises(ProgrammingError):
            read_projection(environment, name, lambda _: None)
    with pytest.raises(UnknownProjectionError):
        read_projection(environment, "other", lambda _: None)
    with pytest.raises(UnknownProjectionError):
        resume(environment, "other")


async def test_damage_is_found(recorder: LMDBApplicationRecorder) -> None:
    environment = recorder.environment
    await applied(recorder, Keys("keys", lambda view: view.put(b"k", b"value")))
    database = environment.database(DATABASE)

    def damage(prefix: bytes, place: int, value: int) -> None:
        def change(txn: Transaction) -> None:
            with txn.cursor(database) as cursor:
                assert cursor.set_range(prefix)
                key, raw = bytearray(cursor.key()), bytearray(cursor.value())
            raw[place] = value
            txn.put(bytes(key), bytes(raw), db=database)

        environment.write(change)

    damage(_row_prefix("keys", 1), -1, 0)
    with pytest.raises(InternalError, match="damaged"):
        read_projection(environment, "keys", lambda view: view.get(b"k"))
    damage(b"\x01", -1, 0)
    with pytest.raises(InternalError, match="damaged"):
        list_projections(recorder)
    damage(b"\x01", 0, 2)
    with pytest.raises(NotSupportedError, match="format"):
        list_projections(recorder)


async def test_projections_that_cannot_be_run_are_refused(
    recorder: LMDBApplicationRecorder, tmp_path: Path
) -> None:
    with pytest.raises(ProgrammingError, match="two projections"):
        made(recorder, Seen(), Seen())
    with pytest.raises(ProgrammingError, match="name"):
        made(recorder, Seen("a b"))
    with pytest.raises(ProgrammingError, match="revision"):
        made(recorder, Seen(revision=-1))
    with LMDBEnvironment.open(tmp_path / "other") as other:
        with pytest.raises(ProgrammingError, match="environment of their log"):
            Projections(other, recorder, [])
        async with open_lane(other) as lane:
            with pytest.raises(ProgrammingError, match="another store"):
                await made(recorder).run(lane)
    with (
        LMDBEnvironment.open(recorder.environment.path, readonly=True) as reader,
        pytest.raises(ProgrammingError, match="for writing"),
    ):
        Projections(reader, recorder, [])


async def test_a_fault_of_the_program_ends_the_run_loudly(
    recorder: LMDBApplicationRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping = made(recorder, Seen())

    async def closed(_lane: Lane, _operation: object) -> None:
        await trio.lowlevel.checkpoint()
        raise InterfaceError("closed")

    monkeypatch.setattr(Lane, "commit", closed)
    with trio.fail_after(HANG_S):
        async with open_lane(recorder.environment) as lane:
            with pytest.RaisesGroup(InterfaceError):
                await keeping.run(lane)
            with pytest.raises(InterfaceError):
                await keeping.wait("seen", 1)
