# SPDX-License-Identifier: AGPL-3.0-or-later
"""Waiting for what others commit: subscriptions, and positions of a view."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading  # noqa: TID251 -- the library's consumers are threads
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

import pytest
import trio
from eventsourcing.persistence import (
    DataError,
    IntegrityError,
    InterfaceError,
    InternalError,
    Notification,
    OperationalError,
    StoredEvent,
    Tracking,
    WaitInterruptedError,
)

from eventstore import (
    LMDBApplicationRecorder,
    LMDBEnvironment,
    LMDBSubscription,
    LMDBTrackingRecorder,
    eventlog,
    subscription,
    tracking,
)
from tests.limits import HANG_S

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recorder(environment: LMDBEnvironment) -> LMDBApplicationRecorder:
    return LMDBApplicationRecorder(environment, "app")


def store(recorder: LMDBApplicationRecorder, version: int, topic: str = "topic") -> None:
    recorder.insert_events([StoredEvent("a", version, topic, b"")])


@pytest.fixture
def no_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever misses a commit of this process waits until the test is called hanging."""
    monkeypatch.setattr(subscription, "POLL_S", HANG_S)
    monkeypatch.setattr(tracking, "POLL_S", HANG_S)


# The places where an insert could fall between what is known and what is waited for.
@pytest.mark.usefixtures("no_poll")
@pytest.mark.parametrize("place", ["add_listener", "last_transaction", "select_page", "_wait"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_no_commit_is_lost_wherever_it_falls(
    recorder: LMDBApplicationRecorder,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    moment: str,
) -> None:
    owner: type = {"_wait": LMDBSubscription, "select_page": LMDBApplicationRecorder}.get(
        place, LMDBEnvironment
    )
    original: Callable[..., object] = getattr(owner, place)
    left = [1]

    def insert_here(*args: object) -> object:
        if moment == "before" and left:
            store(recorder, left.pop())
        result = original(*args)
        if moment == "after" and left:
            store(recorder, left.pop())
        return result

    monkeypatch.setattr(owner, place, insert_here)
    with recorder.subscribe() as found:
        if (place, moment) == ("_wait", "after"):
            # Only a commit ends the wait, so this one comes from another thread.
            threading.Timer(0, lambda: store(recorder, left.pop())).start()
        assert next(found).id == 1
    assert left == []


@pytest.mark.usefixtures("no_poll")
def test_it_goes_on_where_it_is_told_to_and_gives_only_what_is_asked_for(
    recorder: LMDBApplicationRecorder,
) -> None:
    for version in range(1, 6):
        store(recorder, version, "odd" if version % 2 else "even")
    with recorder.subscribe(gt=1, topics=["odd"]) as found:
        assert [next(found).id for _ in range(2)] == [3, 5]
        store(recorder, 6, "even")
        store(recorder, 7, "odd")
        assert next(found).id == 7
    with recorder.subscribe(gt=7) as found:
        store(recorder, 8)
        assert next(found).id == 8


@pytest.mark.parametrize("topic_index", [True, False])
def test_the_position_moves_although_nothing_matches(
    environment: LMDBEnvironment, monkeypatch: pytest.MonkeyPatch, *, topic_index: bool
) -> None:
    monkeypatch.setattr(eventlog, "SCAN_MAX", 4)
    recorder = LMDBApplicationRecorder(environment, "app", topic_index=topic_index)
    for version in range(1, 11):
        store(recorder, version)
    asked: list[int] = []
    select_page = recorder.select_page

    def count(gt: int, limit: int, topics: list[str]) -> tuple[list[Notification], int]:
        asked.append(gt)
        return select_page(gt, limit, topics)

    monkeypatch.setattr(recorder, "select_page", count)
    threading.Timer(0, lambda: store(recorder, 11, "rare")).start()
    with recorder.subscribe(topics=["rare"]) as found:
        assert next(found).id == 11
    assert asked == sorted(asked)
    assert asked[-1] == 10
    assert asked[0] == 0
    # A page never looks at more than its bound, and what it gives is the same.
    assert [n.id for n in recorder.select_notifications(1, 9, topics=["rare"])] == [11]


@pytest.mark.usefixtures("no_poll")
async def test_stop_from_another_thread_ends_a_wait_and_leaves_no_thread(
    recorder: LMDBApplicationRecorder,
) -> None:
    before = threading.active_count()
    found = recorder.subscribe()
    assert threading.active_count() == before
    ended = trio.Event()

    def consume() -> None:
        assert list(found) == []
        trio.from_thread.run_sync(ended.set)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, consume)
        await trio.testing.wait_all_tasks_blocked()
        found.stop()
        found.stop()
        await ended.wait()
    assert recorder.environment._shared.listeners == {}
    with pytest.raises(StopIteration):
        next(found)


def test_one_that_is_forgotten_leaves_no_listener(recorder: LMDBApplicationRecorder) -> None:
    found = recorder.subscribe()
    assert len(recorder.environment._shared.listeners) == 1
    del found
    gc.collect()
    assert recorder.environment._shared.listeners == {}


def test_errors_of_the_store_reach_the_consumer(tmp_path: Path) -> None:
    opened = LMDBEnvironment.open(tmp_path / "events")
    found = LMDBApplicationRecorder(opened, "app").subscribe()
    opened.close()
    with pytest.raises(InterfaceError, match="closed"):
        next(found)
    found.stop()


OTHER = """
import sys
from eventsourcing.persistence import StoredEvent, Tracking
from eventstore import LMDBApplicationRecorder, LMDBEnvironment, LMDBTrackingRecorder
with LMDBEnvironment.open(sys.argv[1]) as opened:
    recorder, view = LMDBApplicationRecorder(opened, "app"), LMDBTrackingRecorder(opened, "view")
    print("ready", flush=True)
    for line in sys.stdin:
        recorder.insert_events([StoredEvent("a", int(line), "topic", b"")])
        view.insert_tracking(Tracking("app", int(line)))
"""


def test_commits_of_another_process_are_seen(recorder: LMDBApplicationRecorder) -> None:
    view = LMDBTrackingRecorder(recorder.environment, "view")
    with (
        subprocess.Popen(
            [sys.executable, "-c", OTHER, recorder.environment.path],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child,
        recorder.subscribe() as found,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        for version in range(1, 4):
            child.stdin.write(f"{version}\n")
            child.stdin.flush()
            assert next(found).originator_version == version
            view.wait("app", version, timeout=HANG_S)
        child.stdin.close()
        assert child.wait(HANG_S) == 0


class Names(LMDBTrackingRecorder):
    """A view with rows of its own."""

    def __init__(self, environment: LMDBEnvironment, application: str = "") -> None:
        super().__init__(environment, application)
        self._rows = environment.database(f"view/{application}/names")

    def add(self, name: str, position: Tracking, error: Exception | None = None) -> None:
        def put(txn: object) -> None:
            txn.put(name.encode(), b"", db=self._rows)  # type: ignore[attr-defined]
            if error is not None:
                raise error

        self.write(put, position)

    def names(self) -> list[bytes]:
        return self.read(lambda txn: [key for key, _ in txn.cursor(self._rows)])


def test_a_views_rows_and_its_position_are_one_change(environment: LMDBEnvironment) -> None:
    view = Names(environment, "view")
    view.add("one", Tracking("app", 2))
    with pytest.raises(IntegrityError):
        view.add("again", Tracking("app", 2))
    with pytest.raises(KeyError):
        view.add("fails", Tracking("app", 3), KeyError())
    for bad in (Tracking("", 3), Tracking("app", -1), Tracking("app", 1 << 63)):
        with pytest.raises(DataError):
            view.add("bad", bad)
    assert (view.names(), view.max_tracking_id("app")) == ([b"one"], 2)
    assert Names(environment, "another view").max_tracking_id("app") is None


@pytest.mark.usefixtures("no_poll")
async def test_wait_returns_as_soon_as_the_position_is_committed(
    environment: LMDBEnvironment,
) -> None:
    view = LMDBTrackingRecorder(environment, "view")
    view.wait("app", None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, partial(view.wait, "app", 3, HANG_S))
        await trio.testing.wait_all_tasks_blocked()
        for position in (1, 2, 7):
            await trio.to_thread.run_sync(view.insert_tracking, Tracking("app", position))
    assert environment._shared.listeners == {}


def test_wait_ends_with_its_time_or_when_interrupted(environment: LMDBEnvironment) -> None:
    view = LMDBTrackingRecorder(environment, "view")
    begun = perf_counter()
    with pytest.raises(TimeoutError, match="event 1 of 'app'"):
        view.wait("app", 1, timeout=0.03)
    assert perf_counter() - begun >= 0.03
    interrupt = threading.Event()
    interrupt.set()
    with pytest.raises(WaitInterruptedError):
        view.wait("app", 1, timeout=HANG_S, interrupt=interrupt)
    assert environment._shared.listeners == {}


def test_a_position_that_was_changed_on_the_disk_is_not_believed(
    environment: LMDBEnvironment,
) -> None:
    view = LMDBTrackingRecorder(environment, "view")
    view.insert_tracking(Tracking("app", 1))
    database = environment.database("tracking/view")
    row = environment.read(lambda txn: txn.get(b"app", db=database))
    assert row is not None
    for damaged in (row[:-1] + b"\x02", row[:-1], b""):
        environment.write(lambda txn, row=damaged: txn.put(b"app", row, db=database))  # type: ignore[misc]
        with pytest.raises(InternalError, match="damaged"):
            view.max_tracking_id("app")


def test_positions_that_were_never_stored_are_not_made_by_a_reader(
    environment: LMDBEnvironment,
) -> None:
    with (
        LMDBEnvironment.open(environment.path, readonly=True) as reader,
        pytest.raises(OperationalError, match="has no"),
    ):
        LMDBTrackingRecorder(reader, "view").max_tracking_id("app")
