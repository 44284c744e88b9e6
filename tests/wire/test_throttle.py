# SPDX-License-Identifier: AGPL-3.0-or-later
"""The throttle by a clock of its own: how much has gone out at which moment, to the byte."""

from __future__ import annotations

from functools import partial

import pytest
import trio
import trio.testing

from replicator.wire.throttle import (
    BURST_BYTES_MIN,
    PIECE_BYTES_MAX,
    PIECE_BYTES_MIN,
    Throttle,
    ThrottledStream,
)
from replicator.wire.transport import receive_into

MBPS = 125_000  # bytes a second in one Mbit/s


class Sink(trio.abc.Stream):
    """A line without a limit of its own: notes what goes out, and when."""

    def __init__(self) -> None:
        self.sent: list[tuple[float, int]] = []
        self.calls: list[str] = []

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.sent.append((trio.current_time(), len(data)))

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()
        self.calls.append("wait_send_all_might_not_block")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        self.calls.append(f"receive_some {max_bytes}")
        return b"abc"

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self.calls.append("aclose")

    @property
    def total(self) -> int:
        return sum(count for _, count in self.sent)


class FastSink(Sink):
    """... that can also receive into memory."""

    async def receive_into(self, room: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        room[:2] = b"in"
        return 2


async def pour(stream: trio.abc.Stream, size: int = 1 << 20) -> None:
    """Send for ever, as fast as the stream takes it."""
    data = bytes(size)
    while True:
        await stream.send_all(data)


def burst(mbps: int) -> int:
    """The bucket's size, bytes: 50 ms."""
    return max(mbps * MBPS // 20, BURST_BYTES_MIN)


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize(
    ("mbps", "size"),
    [
        (1, 1000), (1, 1 << 20), (3, 1 << 20), (10, 5000), (50, 1 << 20), (200, 50_000),
        (1000, 1 << 20), (2500, 4 << 20),
    ],
)  # fmt: skip
async def test_the_rate_is_kept_over_ten_seconds(
    autojump_clock: trio.testing.MockClock, mbps: int, streams: int, size: int
) -> None:
    del autojump_clock
    throttle = Throttle(mbps)
    sink = Sink()
    with trio.move_on_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(streams):
                nursery.start_soon(pour, throttle.wrap(sink), size)
    expected = 10 * mbps * MBPS
    assert expected * 0.99 <= sink.total <= expected + burst(mbps)
    assert sink.total <= expected * 1.03


@pytest.mark.parametrize("mbps", [1, 50, 1000])
async def test_no_window_of_any_length_holds_more_than_its_share_and_a_burst(
    autojump_clock: trio.testing.MockClock, mbps: int
) -> None:
    """With pauses, in which tokens are saved up, between sends of any size."""
    del autojump_clock
    throttle = Throttle(mbps)
    sink = Sink()
    stream = throttle.wrap(sink)
    for pause_s in (0.0, 5.0, 0.01, 0.06, 60.0):
        await trio.sleep(pause_s)
        await stream.send_all(bytes(2 * burst(mbps)))
        await stream.send_all(bytes(7))
    rate = mbps * MBPS
    for first in range(len(sink.sent)):
        out = 0
        began = sink.sent[first][0]
        for at, count in sink.sent[first:]:
            out += count
            assert out <= burst(mbps) + (at - began) * rate + 1
    after_pause = [at for at, _ in sink.sent if at >= 65]
    assert sum(count for at, count in sink.sent if at == after_pause[0]) >= burst(mbps) * 0.75


async def test_late_timers_cost_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """What a sender wakes too late for, it makes up for: up to the burst."""
    del autojump_clock
    throttle = Throttle(1)
    sink = Sink()
    stream = throttle.wrap(sink)
    began = trio.current_time()
    while sink.total < 10 * MBPS:
        await stream.send_all(bytes(4096))
        await trio.sleep(0.005)  # a thread held the processor
    assert trio.current_time() - began == pytest.approx(10, rel=0.01)


@pytest.mark.parametrize("mbps", [1, 50, 1000])
@pytest.mark.parametrize("streams", [2, 3, 4])
async def test_streams_share_the_rate_fairly(
    autojump_clock: trio.testing.MockClock, mbps: int, streams: int
) -> None:
    del autojump_clock
    throttle = Throttle(mbps)
    piece = min(max(mbps * MBPS // 100, PIECE_BYTES_MIN), PIECE_BYTES_MAX)
    sinks = [Sink() for _ in range(streams)]
    with trio.move_on_after(10):
        async with trio.open_nursery() as nursery:
            for number, sink in enumerate(sinks):
                # However much one asks for at once: whole pieces.
                nursery.start_soon(pour, throttle.wrap(sink), 8 * piece >> number)
    totals = [sink.total for sink in sinks]
    assert max(totals) - min(totals) <= 2 * piece
    assert sum(totals) >= 10 * mbps * MBPS * 0.99


@pytest.mark.parametrize("mbps", [1, 50, 1000])
async def test_a_heartbeat_waits_for_one_piece_of_each_other_stream_at_most(
    autojump_clock: trio.testing.MockClock, mbps: int
) -> None:
    del autojump_clock
    throttle = Throttle(mbps)
    line = throttle.wrap(Sink())
    piece_s = min(max(mbps * MBPS // 100, PIECE_BYTES_MIN), PIECE_BYTES_MAX) / (mbps * MBPS)
    waits = []
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(pour, throttle.wrap(Sink()))
        await trio.sleep(1)
        for _ in range(20):
            began = trio.current_time()
            await line.send_all(bytes(40))
            waits.append(trio.current_time() - began)
            await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
    assert max(waits) <= 3 * piece_s + 40 / (mbps * MBPS) + 1e-6
    assert max(waits) > 0


async def test_without_a_cap_each_send_goes_straight_through(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The very object, in one call, at once."""
    del autojump_clock
    handed: list[object] = []

    class Noting(Sink):
        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            handed.append(data)
            await super().send_all(data)

    stream = Throttle().wrap(Noting())
    began = trio.current_time()
    pieces: list[bytes | bytearray | memoryview] = [
        bytes(5 << 20),
        bytearray(7),
        memoryview(b"xyz"),
        b"",
    ]
    for piece in pieces:
        await stream.send_all(piece)
    assert trio.current_time() == began
    assert [id(each) for each in handed] == [id(piece) for piece in pieces]


async def test_what_is_sent_is_what_was_given(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    left, right = trio.testing.memory_stream_pair()
    data = bytes(range(256)) * 1000
    got = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Throttle(1).wrap(left).send_all, memoryview(data))
        while len(got) < len(data):
            got += await right.receive_some()
    assert got == data


async def test_a_sender_that_waits_feels_a_change_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    throttle = Throttle(1)
    sink = Sink()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pour, throttle.wrap(sink))
        for mbps in (1, 800, 8, 80):
            throttle.set_rate(mbps)
            before = sink.total
            await trio.sleep(10)
            sent = sink.total - before
            assert sent == pytest.approx(10 * mbps * MBPS, rel=0.015)
        nursery.cancel_scope.cancel()


async def test_a_cap_that_is_lifted_lets_the_rest_go_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    throttle = Throttle(1)
    sink = Sink()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(throttle.wrap(sink).send_all, bytes(100 << 20))
        await trio.sleep(1)
        assert sink.total == pytest.approx(1 * MBPS, rel=0.15)
        throttle.set_rate(0)
        lifted = trio.current_time()
        await trio.testing.wait_all_tasks_blocked()
        assert sink.total == 100 << 20
        assert sink.sent[-1][0] == lifted


async def test_a_cap_that_is_set_begins_with_an_empty_bucket(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """What went out without a cap was all that the line bore: nothing was saved up."""
    del autojump_clock
    throttle = Throttle(0)
    sink = Sink()
    stream = throttle.wrap(sink)
    await stream.send_all(bytes(1 << 20))
    await trio.sleep(100)
    throttle.set_rate(8)
    assert throttle.mbps == 8
    began = trio.current_time()
    await stream.send_all(bytes(8 * MBPS))
    assert trio.current_time() - began == pytest.approx(1, abs=1e-6)


async def test_a_lower_rate_does_not_inherit_a_larger_bucket(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    throttle = Throttle(10_000)
    sink = Sink()
    stream = throttle.wrap(sink)
    await stream.send_all(b"x")
    await trio.sleep(1)
    throttle.set_rate(1)
    began = trio.current_time()
    await stream.send_all(bytes(MBPS))
    assert trio.current_time() - began == pytest.approx(1 - burst(1) / MBPS, abs=0.001)


async def test_a_higher_rate_finds_no_more_saved_up_than_the_bucket_held(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    throttle = Throttle(1)
    stream = throttle.wrap(Sink())
    await stream.send_all(b"x")
    await trio.sleep(100)
    throttle.set_rate(1000)
    began = trio.current_time()
    await stream.send_all(bytes(1000 * MBPS))
    taken_s = trio.current_time() - began
    assert taken_s == pytest.approx(1 - burst(1) / (1000 * MBPS), abs=1e-6)


async def test_who_is_cancelled_while_waiting_has_sent_nothing_and_taken_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    throttle = Throttle(1)
    sink, other = Sink(), Sink()
    stream = throttle.wrap(sink)
    await stream.send_all(bytes(BURST_BYTES_MIN))  # the bucket is empty now
    sent = sink.total
    with trio.move_on_after(0.01) as scope:
        await stream.send_all(bytes(4096))
    assert scope.cancelled_caught
    assert sink.total == sent
    # ... and others go on as if it had never asked: by the rate, from when the bucket was empty.
    await throttle.wrap(other).send_all(bytes(4096))
    assert trio.current_time() == pytest.approx(4096 / MBPS, abs=1e-6)
    # The stream can be used again.
    await stream.send_all(b"x")
    assert sink.total == sent + 1


async def test_closing_wakes_who_waits_to_send(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    sink = Sink()
    stream = Throttle(1).wrap(sink)
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.send_all(bytes(10 << 20))

        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await stream.send_all(b"x")
        with pytest.raises(trio.BusyResourceError):
            await stream.wait_send_all_might_not_block()
        began = trio.current_time()
        await stream.aclose()
    assert trio.current_time() == began
    assert sink.calls == ["aclose"]


async def test_a_closed_stream_waits_for_nothing(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    left, _ = trio.testing.memory_stream_pair()
    throttle = Throttle(1)
    stream = throttle.wrap(left)
    await throttle.wrap(Sink()).send_all(bytes(BURST_BYTES_MIN))
    await stream.aclose()
    began = trio.current_time()
    with pytest.raises(trio.ClosedResourceError):
        await stream.send_all(bytes(4096))
    assert trio.current_time() == began


async def test_the_rest_is_passed_through() -> None:
    sink = Sink()
    stream = Throttle(1).wrap(sink)
    await stream.wait_send_all_might_not_block()
    assert await stream.receive_some(5) == b"abc"
    room = memoryview(bytearray(4))
    assert await receive_into(stream, room) == 3
    assert bytes(room) == b"abc\0"
    assert sink.calls == [
        "wait_send_all_might_not_block",
        "receive_some 5",
        "receive_some 4",
    ]
    assert await receive_into(Throttle(1).wrap(FastSink()), room) == 2
    assert bytes(room) == b"inc\0"


async def throttled_pair(mbps: int) -> tuple[ThrottledStream, ThrottledStream]:
    left, right = trio.testing.memory_stream_pair()
    throttle = Throttle(mbps)
    return throttle.wrap(left), throttle.wrap(right)


async def clogged_pair(mbps: int) -> tuple[ThrottledStream, ThrottledStream]:
    left, right = trio.testing.lockstep_stream_pair()
    throttle = Throttle(mbps)
    return throttle.wrap(left), throttle.wrap(right)


@pytest.mark.parametrize("mbps", [0, 1_000_000])
async def test_trios_own_conformance_test(
    mbps: int, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    await trio.testing.check_two_way_stream(
        partial(throttled_pair, mbps), partial(clogged_pair, mbps)
    )
