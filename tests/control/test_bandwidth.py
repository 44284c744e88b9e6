# SPDX-License-Identifier: AGPL-3.0-or-later
"""The rate that holds: by a wall clock that is a test's, through daylight saving, by hand, and when the clock is set."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest
import trio
import trio.testing

from replicator.config import check
from replicator.control.bandwidth import LOOK_S, Rate, Regulator, parse_limit
from replicator.errors import UsageError
from replicator.timetable import zone_offset
from tests.wire.test_throttle import MBPS, Sink, pour

BERLIN = ZoneInfo("Europe/Berlin")
HOUR = 3600


class Wall:
    """A wall clock that goes with trio's, and can be set."""

    def __init__(self, local: str) -> None:
        self._ahead = self.at(local) - trio.current_time()

    @staticmethod
    def at(local: str) -> int:
        return int(datetime.fromisoformat(local).replace(tzinfo=BERLIN).timestamp())

    def __call__(self) -> float:
        return trio.current_time() + self._ahead

    def step(self, seconds: float) -> None:
        self._ahead += seconds

    async def sleep_until(self, instant: float) -> None:
        await trio.sleep_until(instant - self._ahead)


@asynccontextmanager
async def regulated(wall: Wall, **values: str) -> AsyncIterator[Regulator]:
    """A regulator that runs."""
    regulator = Regulator(check(values), clock=wall, offset=zone_offset(BERLIN))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(regulator.run)
        yield regulator
        nursery.cancel_scope.cancel()


def test_without_a_clock_it_is_what_the_configuration_says() -> None:
    assert Regulator(check({})).throttle.mbps == 0
    regulator = Regulator(check({"max_bandwidth_mbps": "7"}))
    assert regulator.throttle.mbps == 7
    assert regulator.rate() == Rate(7, "max_bandwidth_mbps", None, None)


async def test_the_rate_changes_when_the_wall_clock_says_so(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The night in which the clocks go forward: 02:30 does not exist, 03:30 is an hour and a half after 01:00."""
    del autojump_clock
    wall = Wall("2026-03-28T23:00")
    schedule = "sun 01:00-02:30 5; * 03:30-04:00 6; sat 9"
    expected = [
        (Wall.at("2026-03-29T00:00"), 9, 7),
        (Wall.at("2026-03-29T01:00"), 7, 5),
        (Wall.at("2026-03-29T01:00") + HOUR, 5, 7),
        (Wall.at("2026-03-29T01:00") + HOUR + HOUR // 2, 7, 6),
        (Wall.at("2026-03-29T04:00"), 6, 7),
    ]
    with caplog.at_level(logging.INFO):
        async with regulated(
            wall, max_bandwidth_mbps="7", max_bandwidth_schedule=schedule
        ) as regulator:
            for at, before, after in expected:
                await wall.sleep_until(at - 0.01)
                assert regulator.throttle.mbps == before
                assert regulator.rate().next_change == (at, after)
                await wall.sleep_until(at + 0.01)
                assert regulator.throttle.mbps == after
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "throttle: 7 Mbit/s from now on (max_bandwidth_mbps)",
        "throttle: 5 Mbit/s from now on (max_bandwidth_schedule: sun 01:00-02:30 5)",
        "throttle: 7 Mbit/s from now on (max_bandwidth_mbps)",
        "throttle: 6 Mbit/s from now on (max_bandwidth_schedule: * 03:30-04:00 6)",
        "throttle: 7 Mbit/s from now on (max_bandwidth_mbps)",
    ]


async def test_a_sender_that_waits_is_let_go_on_by_the_timetable(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    wall = Wall("2026-01-05T07:59:50")
    async with (
        regulated(wall, max_bandwidth_schedule="* 08:00-18:00 80; * 1") as regulator,
        trio.open_nursery() as nursery,
    ):
        sink = Sink()
        nursery.start_soon(pour, regulator.throttle.wrap(sink))
        await wall.sleep_until(Wall.at("2026-01-05T08:00"))
        before = sink.total
        assert before == pytest.approx(10 * MBPS, rel=0.02)
        await trio.sleep(10)
        assert sink.total - before == pytest.approx(800 * MBPS, rel=0.01)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("step_s", [12 * HOUR, -12 * HOUR, 35 * 86400 + 12 * HOUR])
async def test_a_clock_that_is_set_is_noticed_within_a_minute(
    autojump_clock: trio.testing.MockClock, step_s: float
) -> None:
    """An NTP step, or a host that was suspended."""
    del autojump_clock
    wall = Wall("2026-01-05T12:00")
    schedule = "* 06:00-18:00 50; * 0"
    async with regulated(wall, max_bandwidth_schedule=schedule) as regulator:
        await trio.sleep(10 * LOOK_S + 1)
        assert regulator.throttle.mbps == 50
        wall.step(step_s)
        await trio.sleep(LOOK_S)
        assert regulator.throttle.mbps == 0


async def test_what_is_set_by_hand_holds_at_once_until_it_is_taken_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    wall = Wall("2026-01-05T12:00")  # a Monday
    async with regulated(
        wall, max_bandwidth_mbps="7", max_bandwidth_schedule="mon-fri 08:00-18:00 50"
    ) as regulator:
        assert regulator.throttle.mbps == 50
        regulator.set_limit(parse_limit("5", 7))
        assert regulator.throttle.mbps == 5
        assert regulator.rate() == Rate(5, "replctl throttle", None, None)
        await trio.sleep(7 * 86400)  # no timetable changes it
        assert regulator.throttle.mbps == 5
        regulator.set_limit(parse_limit(" off ", 7))
        assert regulator.throttle.mbps == 0
        # A timetable of its own; outside of it max_bandwidth_mbps holds.
        regulator.set_limit(parse_limit("mon 8:00-13:00 3", 7))
        assert regulator.rate() == Rate(
            3,
            "replctl throttle",
            "mon 8:00-13:00 3",
            (Wall.at("2026-01-12T13:00"), 7),
        )
        await wall.sleep_until(Wall.at("2026-01-12T13:00") + 1)
        assert regulator.throttle.mbps == 7
        assert regulator.rate().origin == "max_bandwidth_mbps"
        regulator.set_limit(None)
        assert regulator.throttle.mbps == 50
        assert regulator.by_hand is None


async def test_without_a_timetable_it_does_not_wake(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    del autojump_clock
    looks: list[float] = []
    monkeypatch.setattr(time, "tzset", lambda: looks.append(trio.current_time()))
    async with regulated(Wall("2026-01-05T12:00"), max_bandwidth_mbps="7") as regulator:
        await trio.sleep(86400)
        assert len(looks) == 1
        regulator.set_limit(parse_limit("* 0", 0))
        await trio.sleep(10.5 * LOOK_S)
        assert len(looks) == 1 + 11


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1000001", "1000001 is no rate"),
        ("", "'': expected Mbit/s as a whole number, a timetable, off or reset"),
        ("fast", "'fast': expected Mbit/s as a whole number"),
        ("1.5", "'1.5': expected Mbit/s as a whole number"),
        ("5M", "'5M': expected Mbit/s"),
        ("-1", "'-1': expected Mbit/s"),
        ("mon 5 6 7", "'mon 5 6 7': expected DAYS"),
        ("* 0; mon 5", "'mon 5' never holds"),
        ("mon-fri 8:00 50", "8:00: expected HH:MM-HH:MM"),
        ("²", "expected Mbit/s"),
    ],
)
def test_a_limit_that_is_none(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_limit(text, 0)
