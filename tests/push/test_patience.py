# SPDX-License-Identifier: AGPL-3.0-or-later
"""A line that breaks, and breaks again: when it is tried, when not any more, and how much is said of it."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from replicator.errors import RefusedError
from replicator.push import patience
from replicator.push.connection import Connection, ConnectionLostError
from replicator.push.patience import TELL_S, Patience
from replicator.push.schedule import beat_s
from replicator.wire import messages as m
from replicator.wire.framing import MessageStream
from replicator.wire.keys import Keyring, PreSharedKey
from replicator.wire.stream import accept_stream, connect_stream
from tests.sites import TOKEN

HOUR_S = 3600.0


class FakeConnection:
    progressed = False

    def __init__(self) -> None:
        self.heard_at = trio.current_time()


class FakeLink:
    """A way to a receiver that can be reached only when ``is_there`` says so; an attempt in vain takes ``takes_s``."""

    def __init__(self, is_there: Callable[[float], bool], takes_s: float = 0.0) -> None:
        self.is_there = is_there
        self.takes_s = takes_s
        self.attempts: list[float] = []

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Any]:
        self.attempts.append(trio.current_time())
        if not self.is_there(trio.current_time()):
            await trio.sleep(self.takes_s)
            raise ConnectionLostError("cannot reach the receiver")
        await trio.lowlevel.checkpoint()
        yield FakeConnection()


class Story:
    """Patience on a fake link, and what was noted."""

    def __init__(self, link: FakeLink, limit_s: float = math.inf, jitter: float = 1.0) -> None:
        self.link = link
        self.patience = Patience(link, limit_s, lambda: jitter)  # type: ignore[arg-type]
        self.noted: list[int] = []
        self.back_at: list[float] = []

    async def note(self, error: ConnectionLostError, attempts: int) -> None:
        assert str(error)
        await trio.lowlevel.checkpoint()
        self.noted.append(attempts)

    async def back(self) -> None:
        await trio.lowlevel.checkpoint()
        self.back_at.append(trio.current_time())

    async def run(self, work: Callable[[Any], Any]) -> Any:
        return await self.patience.keep_connected(work, self.note, self.back)


async def done(_: object) -> str:
    await trio.lowlevel.checkpoint()
    return "done"


async def breaks(_: object) -> str:
    await trio.lowlevel.checkpoint()
    raise ConnectionLostError("the line broke")


@pytest.fixture(autouse=True)
def log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, patience.__name__)


@pytest.mark.parametrize("jitter", [0.0, 1.0])
async def test_a_receiver_that_refuses_connections_is_tried_at_growing_pauses(
    jitter: float, autojump_clock: MockClock
) -> None:
    began = autojump_clock.current_time()
    story = Story(FakeLink(lambda now: now - began > 20), jitter=jitter)
    assert await story.run(done) == "done"
    pauses = [b - a for a, b in zip(story.link.attempts, story.link.attempts[1:], strict=False)]
    whole = [0.2, 0.4, 0.8, 1.6]
    assert pauses[:4] == pytest.approx([each * (0.5 + 0.5 * jitter) for each in whole])
    assert set(map(round, pauses[5:], [9] * len(pauses))) == {2.0 * (0.5 + 0.5 * jitter)}


@pytest.mark.parametrize("back_s", [0.01, 1.0, 2.99, 3.0, 3.1, 100.0, 1234.5])
async def test_whenever_the_network_returns_there_is_a_connection_soon(
    back_s: float, autojump_clock: MockClock
) -> None:
    """Attempts hear nothing until they give up (``RECONNECT_S``), and the next one begins at once."""
    began = autojump_clock.current_time()
    story = Story(FakeLink(lambda now: now - began >= back_s, takes_s=3.0))
    assert await story.run(done) == "done"
    assert trio.current_time() - began - back_s <= 3.2


async def test_an_hour_of_outage_is_a_line_a_minute_and_one_when_it_is_over(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    began = autojump_clock.current_time()
    story = Story(FakeLink(lambda now: now - began >= HOUR_S, takes_s=3.0))
    assert await story.run(done) == "done"
    first, *others, last = caplog.messages
    assert first == "cannot reach the receiver; trying again"
    assert others[0].startswith("the receiver is away for 61 s (19 more attempts): cannot reach")
    assert last.startswith("the receiver is reached again, after 360")
    assert HOUR_S / TELL_S * 0.9 < len(others) <= HOUR_S / TELL_S
    assert len(story.noted) == len(others) + 1
    # Those of the last minute were not told any more.
    assert 0 < len(story.link.attempts) - 1 - sum(story.noted) < 25
    assert story.patience.reconnects == 1


async def test_a_line_that_breaks_as_soon_as_it_is_made_fills_no_log(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    del autojump_clock
    story = Story(FakeLink(lambda _: True))
    with trio.move_on_after(HOUR_S):
        await story.run(breaks)
    assert len(story.link.attempts) > HOUR_S / 2.1
    assert story.patience.reconnects == len(story.link.attempts) - 1
    assert len(caplog.messages) <= 2 * HOUR_S / TELL_S + 2
    # For status each of them is written down, in the place of the one before.
    assert len(story.noted) == len(story.link.attempts)
    assert len(story.back_at) == story.patience.reconnects


def breaks_at(*times: float) -> Callable[[Any], Any]:
    """Work that is done 300 s after it was first begun, on a line that breaks at these times after that."""
    began: list[float] = []

    async def work(connection: FakeConnection) -> str:
        began[:] = began or [trio.current_time()]
        passed_s = trio.current_time() - began[0]
        upcoming = [at for at in times if at > passed_s]
        await trio.sleep((upcoming or [300])[0] - passed_s)
        connection.heard_at = trio.current_time()
        if upcoming:
            raise ConnectionLostError(f"cut {len(times) - len(upcoming) + 1}")
        return "done"

    return work


async def test_breaks_that_follow_soon_are_summed_up_and_none_is_lost(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    del autojump_clock
    story = Story(FakeLink(lambda _: True))
    assert await story.run(breaks_at(1, 11, 21, 31, 200)) == "done"
    assert caplog.messages == [
        "cut 1; trying again",
        "the receiver is reached again, after 0.2 s",
        "the line broke 3 more times in the last 60 s, away 0.6 s in all (cut 4); going on",
        "cut 5; trying again",
        "the receiver is reached again, after 0.2 s",
    ]
    assert story.noted == [1] * 5
    assert (len(story.back_at), story.patience.reconnects) == (5, 5)


async def test_an_outage_that_begins_soon_after_another_and_lasts_is_told_in_time(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    began = autojump_clock.current_time()
    story = Story(FakeLink(lambda now: not 20 <= now - began < 100))
    assert await story.run(breaks_at(1, 20)) == "done"
    first, back, summed_up, last = caplog.messages
    assert (first, back) == ("cut 1; trying again", "the receiver is reached again, after 0.2 s")
    assert summed_up == (
        "the line broke once more in the last 60 s, away 41.0 s in all (cannot reach the receiver);"
        " trying again"
    )
    assert last.startswith("the receiver is reached again, after 8")


@pytest.mark.parametrize("limit_s", [120, math.inf])
async def test_what_is_not_told_when_a_push_ends_is_told_by_the_last_or_with_the_next(
    limit_s: float, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    del autojump_clock
    story = Story(FakeLink(lambda _: True), limit_s)
    cuts = iter([True, True, False])

    async def work(_: object) -> str:
        await trio.sleep(1)
        if next(cuts):
            raise ConnectionLostError("cut")
        return "done"

    assert await story.run(work) == "done"
    missed = "the line broke once more in the last"
    assert caplog.messages[-1].startswith(missed) is (limit_s != math.inf)

    async def quiet(_: object) -> str:
        await trio.sleep(100)
        return "done"

    assert await story.run(quiet) == "done"
    assert sum(line.startswith(missed) for line in caplog.messages) == 1
    assert caplog.messages[-1].endswith("(cut); going on")


async def test_a_command_does_not_try_a_receiver_that_it_never_reached(
    autojump_clock: MockClock,
) -> None:
    del autojump_clock
    story = Story(FakeLink(lambda _: False), limit_s=120)
    with pytest.raises(ConnectionLostError):
        await story.run(done)
    assert (len(story.link.attempts), story.noted) == (1, [])


async def test_a_command_gives_up_when_nothing_becomes_durable(autojump_clock: MockClock) -> None:
    began = autojump_clock.current_time()
    story = Story(FakeLink(lambda _: True), limit_s=120)
    with pytest.raises(ConnectionLostError):
        await story.run(breaks)
    assert trio.current_time() - began == pytest.approx(121, abs=1)
    # The last one is the caller's to tell.
    assert sum(story.noted) == len(story.link.attempts) - 1


async def test_progress_renews_patience_and_makes_pauses_short(autojump_clock: MockClock) -> None:
    story = Story(FakeLink(lambda _: True), limit_s=120)

    async def slowly(connection: FakeConnection) -> str:
        await trio.sleep(100)
        if len(story.link.attempts) == 10:
            return "done"
        connection.progressed = True
        raise ConnectionLostError("the line broke")

    began = autojump_clock.current_time()
    assert await story.run(slowly) == "done"
    assert trio.current_time() - began == pytest.approx(1000 + 9 * 0.2)


async def test_other_errors_are_the_callers_at_once(autojump_clock: MockClock) -> None:
    del autojump_clock
    story = Story(FakeLink(lambda _: True))

    async def refused(_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise RefusedError("disk-0 shrank")

    with pytest.raises(RefusedError):
        await story.run(refused)
    assert len(story.link.attempts) == 1


async def test_how_long_it_was_away_is_told_from_when_it_was_last_heard_of(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    began = autojump_clock.current_time()
    story = Story(FakeLink(lambda now: not 0 < now - began < 30))

    async def silent(_: object) -> str:
        if len(story.link.attempts) > 1:
            return "done"
        await trio.sleep(8)
        raise ConnectionLostError("nothing came from the other side in time")

    assert await story.run(silent) == "done"
    # Heard of until it went away at 0, there again at 30, found at the next attempt.
    assert caplog.messages[-1] == "the receiver is reached again, after 31.0 s"


# Silence


@asynccontextmanager
async def session(idle_timeout_s: float) -> AsyncIterator[tuple[Connection, MessageStream]]:
    """A source's session over a line on which nothing lies: what the other side does not take cannot be sent."""
    ours, theirs = trio.testing.lockstep_stream_pair()
    key = PreSharedKey.from_hex(TOKEN)
    streams: list[Any] = [None, None]

    async def accept() -> None:
        streams[1] = await accept_stream(
            theirs, Keyring([key]), deadline_s=10, idle_timeout_s=math.inf
        )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        streams[0] = await connect_stream(ours, key, deadline_s=10, idle_timeout_s=idle_timeout_s)
    source = Connection(MessageStream(streams[0], m.LIMITS))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.read_replies)
        nursery.start_soon(source.ping, beat_s(idle_timeout_s))
        yield source, MessageStream(streams[1], m.LIMITS)
        nursery.cancel_scope.cancel()


async def test_a_peer_that_takes_nothing_and_says_nothing_is_gone_when_its_time_is_over(
    autojump_clock: MockClock,
) -> None:
    """Also for a task that is sending: it does not wait for what the system thinks of the line."""
    async with session(8) as (source, _):
        began = autojump_clock.current_time()
        with pytest.raises(ConnectionLostError):
            await source.ask(m.Query("5f0c7c3e-6f2b-4f7e-9a55-0d2f4c1b8a01", "web"), m.VmState)
        assert trio.current_time() - began == pytest.approx(8, abs=0.01)


async def test_a_peer_that_works_for_an_hour_is_not_silent(autojump_clock: MockClock) -> None:
    del autojump_clock
    async with session(8) as (source, receiver), trio.open_nursery() as nursery:
        heard: list[float] = []

        async def hear() -> None:
            while (message := await receiver.receive()) is not None:
                heard.append(trio.current_time())
                if m.decode_from_source(message[1]) != m.Ping():
                    return

        async def beat() -> None:
            while True:
                await receiver.send(m.CONTROL, m.encode(m.Pong()))
                await trio.sleep(beat_s(8))

        nursery.start_soon(hear)
        nursery.start_soon(beat)
        await trio.sleep(HOUR_S + 1)
        await source.send(m.Query("5f0c7c3e-6f2b-4f7e-9a55-0d2f4c1b8a01", "web"))
        await receiver.send(m.CONTROL, m.encode(m.VmState(None, 1, None)))
        assert await source.reply(m.VmState) == m.VmState(None, 1, None)
        nursery.cancel_scope.cancel()
    assert len(heard) == HOUR_S / 2 + 1
