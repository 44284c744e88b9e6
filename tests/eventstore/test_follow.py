# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import math
import os
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import trio
from eventsourcing.persistence import Notification, ProgrammingError, StoredEvent
from trio.testing import MockClock, wait_all_tasks_blocked

from eventstore import LMDBApplicationRecorder, LMDBEnvironment, follow
from eventstore.follow import Commits, Follower
from eventstore.lane import LaneClosedError, open_lane
from tests.limits import HANG_S

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recorder(environment: LMDBEnvironment) -> LMDBApplicationRecorder:
    return LMDBApplicationRecorder(environment)


def insert(recorder: LMDBApplicationRecorder, *topics: str) -> None:
    recorder.insert_events([StoredEvent(uuid4(), 1, topic, b"state") for topic in topics])


def ids(notifications: list[Notification]) -> list[int]:
    return [notification.id for notification in notifications]


async def test_what_is_there_comes_in_pages_and_what_comes_later_too(
    recorder: LMDBApplicationRecorder,
) -> None:
    insert(recorder, *"abcde")
    got: list[list[int]] = []
    with trio.fail_after(HANG_S):
        async with (
            open_lane(recorder.environment) as lane,
            aclosing(follow.follow(lane, recorder, gt=1, page=3, poll_s=math.inf)) as pages,
            trio.open_nursery() as nursery,
        ):

            async def insert_when_waiting() -> None:
                await wait_all_tasks_blocked()
                await trio.to_thread.run_sync(insert, recorder, "f", "g")

            async for page in pages:
                got.append(ids(page))
                if len(got) == 2:
                    nursery.start_soon(insert_when_waiting)
                if len(got) == 3:
                    break
    assert got == [[2, 3, 4], [5], [6, 7]]


@pytest.mark.parametrize("moment", ["registered", "looked", "read", "waiting"])
async def test_no_insert_is_lost_whenever_it_comes(
    recorder: LMDBApplicationRecorder, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Stopped at each step between the listener's registration and the wait; without a poll, a lost
    wake-up would be one for ever.
    """
    enter, look, read_page, wait = Commits.__enter__, Commits.look, follow.read_page, Commits.wait
    pending = [moment]

    def insert_at(step: str) -> None:
        if step in pending:
            pending.remove(step)
            insert(recorder, "topic")

    def entered(self: Commits) -> Commits:
        enter(self)
        insert_at("registered")
        return self

    def looked(self: Commits) -> None:
        look(self)
        insert_at("looked")

    def read(*arguments: object) -> object:
        result = read_page(*arguments)  # type: ignore[arg-type]
        # In the reader's thread, before the result is back in the task.
        insert_at("read")
        return result

    async def waiting(self: Commits, *arguments: object, **more: object) -> None:
        insert_at("waiting")
        await wait(self, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Commits, "__enter__", entered)
    monkeypatch.setattr(Commits, "look", looked)
    monkeypatch.setattr(follow, "read_page", read)
    monkeypatch.setattr(Commits, "wait", waiting)
    with trio.fail_after(HANG_S):
        async with open_lane(recorder.environment) as lane:
            with Follower(lane, recorder, poll_s=math.inf) as follower:
                assert ids(await follower.receive()) == [1]
    assert pending == []


async def test_the_position_moves_over_what_does_not_match(
    recorder: LMDBApplicationRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert(recorder, *(["other"] * 10), "rare")
    with trio.fail_after(HANG_S):
        async with open_lane(recorder.environment) as lane:
            with Follower(lane, recorder, topics=["rare"]) as follower:
                assert ids(await follower.receive()) == [11]
                assert follower.position == 11
                insert(recorder, "other", "other")
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(follower.receive)
                        await wait_all_tasks_blocked()
                        while follower.position < 13:
                            await trio.lowlevel.checkpoint()
                        scope.cancel()
                insert(recorder, "rare")
                starts: list[int] = []
                select = recorder.select_page

                def selected(gt: int, limit: int, topics: tuple[str, ...]) -> object:
                    starts.append(gt)
                    return select(gt, limit, topics)

                monkeypatch.setattr(recorder, "select_page", selected)
                assert ids(await follower.receive()) == [14]
                # Not again from the last match.
                assert starts == [13]


CHILD = """
import sys
from uuid import UUID
from eventsourcing.persistence import StoredEvent
from eventstore import LMDBApplicationRecorder, LMDBEnvironment
with LMDBEnvironment.open(sys.argv[1]) as environment:
    recorder = LMDBApplicationRecorder(environment)
    print("ready", flush=True)
    sys.stdin.readline()
    recorder.insert_events([StoredEvent(UUID(int=7), 1, "elsewhere", b"")])
    print("stored", flush=True)
    sys.stdin.readline()
"""


async def test_another_processs_commit_is_seen(recorder: LMDBApplicationRecorder) -> None:
    with subprocess.Popen(  # noqa: ASYNC220 -- a start is short, and the pipes are read in threads
        [sys.executable, "-c", CHILD, os.fspath(recorder.environment.path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        stdin = child.stdin
        assert await trio.to_thread.run_sync(child.stdout.readline) == b"ready\n"
        with trio.fail_after(HANG_S):
            async with (
                open_lane(recorder.environment) as lane,
                trio.open_nursery() as nursery,
            ):
                with Follower(lane, recorder, poll_s=0.01) as follower:

                    async def go() -> None:
                        await trio.lowlevel.checkpoint()
                        stdin.write(b"\n")
                        stdin.flush()

                    nursery.start_soon(go)
                    (notification,) = await follower.receive()
        stdin.close()
        assert await trio.to_thread.run_sync(child.wait) == 0
    assert (notification.originator_id, notification.topic) == (UUID(int=7), "elsewhere")


@pytest.mark.parametrize("ending", ["close", "cancel"])
async def test_no_listener_is_left_behind(
    recorder: LMDBApplicationRecorder, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    listeners: list[object] = []
    add, remove = LMDBEnvironment.add_listener, LMDBEnvironment.remove_listener

    def added(self: LMDBEnvironment, listener: object) -> None:
        listeners.append(listener)
        add(self, listener)  # type: ignore[arg-type]

    def removed(self: LMDBEnvironment, listener: object) -> None:
        listeners.remove(listener)
        remove(self, listener)  # type: ignore[arg-type]

    monkeypatch.setattr(LMDBEnvironment, "add_listener", added)
    monkeypatch.setattr(LMDBEnvironment, "remove_listener", removed)
    insert(recorder, "topic")
    with trio.fail_after(HANG_S):
        async with (
            open_lane(recorder.environment) as lane,
            aclosing(follow.follow(lane, recorder)) as pages,
        ):
            with trio.CancelScope() as scope:
                async for page in pages:
                    assert ids(page) == [1]
                    assert len(listeners) == 1
                    if ending == "close":
                        break
                    scope.cancel()
    assert listeners == []
    assert scope.cancelled_caught == (ending == "cancel")


async def test_a_follower_of_a_closed_lane_does_not_wait_for_ever(
    recorder: LMDBApplicationRecorder,
) -> None:
    async def receive(follower: Follower) -> None:
        with pytest.raises(LaneClosedError):
            await follower.receive()

    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as outside, open_lane(recorder.environment) as lane:
            with Follower(lane, recorder, poll_s=0.01) as follower:
                outside.start_soon(receive, follower)
                await wait_all_tasks_blocked()


async def test_an_idle_follower_polls_on_the_virtual_clock_only(
    recorder: LMDBApplicationRecorder,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its poll is a deadline like any other: the clock jumps over it, and no thread is started."""
    del autojump_clock
    polls = 0
    last = LMDBEnvironment.last_transaction

    def counted(self: LMDBEnvironment) -> int:
        nonlocal polls
        polls += 1
        return last(self)

    monkeypatch.setattr(LMDBEnvironment, "last_transaction", counted)
    with Commits(recorder.environment, poll_s=0.05) as commits:
        commits.look()
        start = trio.current_time()
        await commits.wait(timeout_s=10)
        assert trio.current_time() - start == pytest.approx(10)
    assert 190 <= polls <= 202


def test_a_commit_after_the_programs_end_is_no_error(recorder: LMDBApplicationRecorder) -> None:
    entered: list[Commits] = []

    async def main() -> None:
        await trio.lowlevel.checkpoint()
        entered.append(Commits(recorder.environment).__enter__())

    trio.run(main)
    insert(recorder, "topic")
    entered[0]._committed()
    entered[0].__exit__()


async def test_arguments_that_make_no_sense_are_refused(recorder: LMDBApplicationRecorder) -> None:
    async with open_lane(recorder.environment) as lane:
        with pytest.raises(ProgrammingError, match="page"):
            Follower(lane, recorder, page=0)
        with pytest.raises(ProgrammingError, match="poll"):
            Follower(lane, recorder, poll_s=0)
