# SPDX-License-Identifier: AGPL-3.0-or-later
"""The bucket of tokens: a burst, then the rate, in order of arrival. Time is jumped."""

from __future__ import annotations

import logging

import pytest
import trio
import trio.testing

from replicator.prism.rate import TokenBucket


async def taken_at(bucket: TokenBucket, count: int) -> list[float]:
    began = trio.current_time()
    times = []
    for _ in range(count):
        await bucket.take()
        times.append(trio.current_time() - began)
    return times


async def test_a_burst_of_thirty_whatever_the_rate(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    times = await taken_at(TokenBucket(6), 32)
    assert times[29] == 0
    assert times[30] == pytest.approx(10, abs=0.01)
    assert times[31] == pytest.approx(20, abs=0.01)


async def test_a_high_rate_is_its_own_burst_and_fills_up_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    bucket = TokenBucket(600)
    assert (await taken_at(bucket, 601))[-1] == pytest.approx(0.1, abs=0.01)
    await trio.sleep(3600)
    assert (await taken_at(bucket, 600))[-1] == 0


async def test_no_cap(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    assert (await taken_at(TokenBucket(0), 5000))[-1] == 0


async def test_those_who_wait_are_served_in_order_and_a_cancelled_one_takes_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    bucket = TokenBucket(60)
    await taken_at(bucket, 60)
    order: list[int] = []

    async def one(number: int, scope: trio.CancelScope) -> None:
        with scope:
            await bucket.take()
            order.append(number)

    began = trio.current_time()
    scopes = [trio.CancelScope() for _ in range(4)]
    async with trio.open_nursery() as nursery:
        for number, scope in enumerate(scopes):
            nursery.start_soon(one, number, scope)
            await trio.testing.wait_all_tasks_blocked()
        scopes[0].cancel()
        scopes[2].cancel()
    assert order == [1, 3]
    assert trio.current_time() - began == pytest.approx(2, abs=0.01)


async def test_a_hold_that_comes_while_one_waits_holds_that_one_too(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    bucket = TokenBucket(60)
    await taken_at(bucket, 60)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bucket.take)
        await trio.sleep(0.5)
        bucket.hold(30)
        bucket.hold(5)
    assert trio.current_time() - began == pytest.approx(30.5, abs=0.01)


async def test_a_long_wait_for_the_cap_is_told_once_a_minute_and_a_short_one_or_a_hold_is_not(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    del autojump_clock
    caplog.set_level(logging.INFO)
    bucket = TokenBucket(30, "pc.example")
    await taken_at(bucket, 40)  # one at a time: 2 s each
    bucket.hold(20)
    await bucket.take()
    assert caplog.messages == []
    async with trio.open_nursery() as nursery:
        for _ in range(75):  # the last waits longer than two minutes
            nursery.start_soon(bucket.take)
    assert caplog.messages == ["waiting for prism_rate_rpm = 30 (host pc.example)"] * 3
