# SPDX-License-Identifier: AGPL-3.0-or-later
"""Timetables against a clock on the wall that is looked at every minute, around midnight and both changes of daylight saving."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.errors import UsageError
from replicator.timetable import Timetable, host_offset, parse, zone_offset

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MINUTE = 60
HOUR = 3600
OTHERWISE = 7

#: Instants around which something happens to the wall clock, by zone. UTC.
MOMENTS = {
    "Europe/Berlin": ("2026-03-29T01:00", "2026-10-25T01:00", "2026-12-31T23:00"),
    "America/New_York": ("2026-03-08T07:00", "2026-11-01T06:00", "2026-06-12T04:00"),
    # Half an hour: from 02:00 to 01:30, and from 02:00 to 02:30.
    "Australia/Lord_Howe": ("2026-04-04T15:00", "2026-10-03T15:30"),
}


def utc(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


def berlin(text: str, fold: int = 0) -> int:
    """The instant at which a wall clock in Berlin shows this."""
    local = datetime.fromisoformat(text).replace(tzinfo=ZoneInfo("Europe/Berlin"), fold=fold)
    return int(local.timestamp())


BERLIN = zone_offset(ZoneInfo("Europe/Berlin"))


@dataclass(frozen=True)
class Written:
    """An entry, as it is meant and as it is written. Minutes of the day."""

    days: frozenset[int]
    start: int
    end: int
    mbps: int
    text: str

    def holds(self, wall: datetime) -> bool:
        minute, today = wall.hour * 60 + wall.minute, wall.weekday()
        if self.start < self.end:
            return today in self.days and self.start <= minute < self.end
        began_today = today in self.days and minute >= self.start
        began_yesterday = (today - 1) % 7 in self.days and minute < self.end
        return began_today or began_yesterday


def clock(minute: int) -> str:
    return f"{minute // 60:02d}:{minute % 60:02d}"


#: Mostly the hours in which clocks are changed.
minutes = st.one_of(st.integers(0, 4 * 60), st.sampled_from([0, 90, 120, 150, 180]), st.integers(0, 1439))  # fmt: skip


@st.composite
def entries(draw: st.DrawFn) -> Written:
    days: set[int] = set()
    words = []
    for _ in range(draw(st.integers(0, 2))):
        first, length = draw(st.integers(0, 6)), draw(st.integers(1, 7))
        days |= {(first + step) % 7 for step in range(length)}
        last = DAYS[(first + length - 1) % 7]
        words.append(DAYS[first] if length == 1 else f"{DAYS[first]}-{last}")
    if not words:
        days, words = set(range(7)), ["*"]
    mbps = draw(st.integers(0, 3))
    if draw(st.booleans()):
        start = draw(minutes)
        end = draw(minutes.filter(lambda minute: minute != start)) or 24 * 60
        text = f"{','.join(words)} {clock(start)}-{clock(end)} {mbps}"
    else:
        start, end = 0, 24 * 60
        text = f"{','.join(words)} {mbps}"
    return Written(frozenset(days), start, end, mbps, text)


@st.composite
def instants(draw: st.DrawFn) -> tuple[ZoneInfo, int]:
    name = draw(st.sampled_from(sorted(MOMENTS)))
    moment = utc(draw(st.sampled_from(MOMENTS[name])))
    away = st.integers(-30 * HOUR, 6 * HOUR) | st.sampled_from([-1, 0, 1, -HOUR, HOUR])
    return ZoneInfo(name), moment + draw(away)


def mbps_at(table: list[Written], zone: ZoneInfo, instant: int) -> int:
    wall = datetime.fromtimestamp(instant, zone)
    return next((entry.mbps for entry in table if entry.holds(wall)), OTHERWISE)


def found_mbps(table: Timetable, zone: ZoneInfo, instant: float) -> int:
    entry = table.entry_at(instant, zone_offset(zone))
    return OTHERWISE if entry is None else entry.mbps


def parse_taken(table: list[Written]) -> Timetable:
    """The entries that are not refused because they never hold: without those the rates are the same."""
    taken: list[str] = []
    for entry in table:
        try:
            parse("; ".join([*taken, entry.text]))
        except UsageError as error:
            if not str(error).startswith(f"{entry.text!r} never holds"):
                raise
        else:
            taken.append(entry.text)
    return parse("; ".join(taken))


@settings(max_examples=600)
@given(table=st.lists(entries(), min_size=1, max_size=4), at=instants())
def test_rates_and_changes_are_those_of_the_clock_on_the_wall(
    table: list[Written], at: tuple[ZoneInfo, int]
) -> None:
    zone, instant = at
    parsed = parse_taken(table)
    now = mbps_at(table, zone, instant)
    assert found_mbps(parsed, zone, instant) == now
    assert found_mbps(parsed, zone, instant + 0.999) == now
    # The whole minutes of 36 hours: all of these zones change on one.
    first = instant - instant % MINUTE + MINUTE
    looked_at = range(first, first + 36 * HOUR, MINUTE)
    change = next((each for each in looked_at if mbps_at(table, zone, each) != now), None)
    found = parsed.next_change(instant, zone_offset(zone), OTHERWISE)
    if change is None:
        assert found is None or found >= looked_at.stop
    else:
        assert found == change
        # ... and the wall clock's rate at that instant is what the entry there says.
        assert found_mbps(parsed, zone, found) == mbps_at(table, zone, found)


NIGHT = "fri 22:00-06:00 1; sat,sun 10:00-14:00 2; mon-fri 08:00-18:00 3; * 0"


@pytest.mark.parametrize(
    ("local", "entry", "change"),
    [
        # 2026-01-05 is a Monday.
        ("2026-01-05T07:59:59", "* 0", "2026-01-05T08:00:00"),
        ("2026-01-05T08:00:00", "mon-fri 08:00-18:00 3", "2026-01-05T18:00:00"),
        ("2026-01-05T17:59:59", "mon-fri 08:00-18:00 3", "2026-01-05T18:00:00"),
        ("2026-01-09T22:00:00", "fri 22:00-06:00 1", "2026-01-10T06:00:00"),
        ("2026-01-10T05:59:59", "fri 22:00-06:00 1", "2026-01-10T06:00:00"),
        ("2026-01-10T06:00:00", "* 0", "2026-01-10T10:00:00"),
        ("2026-01-09T05:00:00", "* 0", "2026-01-09T08:00:00"),  # Thursday's night is not Friday's
        ("2026-01-11T14:00:00", "* 0", "2026-01-12T08:00:00"),
    ],
)
def test_the_first_entry_that_matches_holds_and_a_night_is_that_of_its_first_day(
    local: str, entry: str, change: str
) -> None:
    table = parse(NIGHT)
    found = table.entry_at(berlin(local), BERLIN)
    assert found is not None
    assert found.text == entry
    assert table.next_change(berlin(local), BERLIN) == berlin(change)


def changes(table: Timetable, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Each change from ``start`` to ``end``: when, and to what rate."""
    at = table.next_change(start, BERLIN, OTHERWISE)
    while at is not None and at < end:
        entry = table.entry_at(at, BERLIN)
        yield at, OTHERWISE if entry is None else entry.mbps
        at = table.next_change(at, BERLIN, OTHERWISE)


def test_a_time_that_does_not_exist_never_comes() -> None:
    """On 2026-03-29 the clocks in Berlin go from 02:00 to 03:00."""
    day = (berlin("2026-03-29T00:00"), berlin("2026-03-30T00:00"))
    assert day[1] - day[0] == 23 * HOUR
    assert list(changes(parse("* 02:10-02:50 1"), *day)) == []
    shift = utc("2026-03-29T01:00")
    assert list(changes(parse("* 02:30-04:00 1"), *day)) == [
        (shift, 1),
        (berlin("2026-03-29T04:00"), OTHERWISE),
    ]
    assert list(changes(parse("* 01:00-02:30 1"), *day)) == [
        (berlin("2026-03-29T01:00"), 1),
        (shift, OTHERWISE),
    ]


def test_a_time_that_comes_twice_has_its_rate_twice() -> None:
    """On 2026-10-25 the clocks in Berlin go from 03:00 back to 02:00."""
    day = (berlin("2026-10-25T00:00"), berlin("2026-10-26T00:00"))
    assert day[1] - day[0] == 25 * HOUR
    assert list(changes(parse("* 02:10-02:50 1"), *day)) == [
        (berlin("2026-10-25T02:10"), 1),
        (berlin("2026-10-25T02:50"), OTHERWISE),
        (berlin("2026-10-25T02:10", fold=1), 1),
        (berlin("2026-10-25T02:50", fold=1), OTHERWISE),
    ]
    # Past the change and back before it: the change itself is where the rate changes.
    shift = utc("2026-10-25T01:00")
    assert list(changes(parse("* 02:30-03:30 1"), *day)) == [
        (berlin("2026-10-25T02:30"), 1),
        (shift, OTHERWISE),
        (berlin("2026-10-25T02:30", fold=1), 1),
        (berlin("2026-10-25T03:30"), OTHERWISE),
    ]


def test_a_day_that_a_zone_skips_is_skipped() -> None:
    """Samoa had no 2011-12-30, a Friday."""
    apia = zone_offset(ZoneInfo("Pacific/Apia"))
    table = parse("fri 1; * 0")
    thursday = utc("2011-12-30T09:00")
    assert datetime.fromtimestamp(thursday, ZoneInfo("Pacific/Apia")).weekday() == 3
    assert table.next_change(thursday, apia) == utc("2012-01-05T10:00")


def test_a_change_that_never_comes_is_not_looked_for_for_ever() -> None:
    """A wall clock that is set back by a day every midnight never shows Tuesday."""
    monday = utc("2026-01-05T00:00")
    groundhog = zone_offset(UTC)
    table = parse("tue 1; * 0")
    assert table.next_change(monday, groundhog) == monday + 24 * HOUR
    assert table.next_change(monday, lambda t: -((t - monday) // 86400) * 86400) is None


def test_entries_with_the_same_rate_are_no_change() -> None:
    assert parse("mon-fri 08:00-18:00 5; * 5").next_change(utc("2026-01-05T00:00"), BERLIN) is None
    assert parse("mon-fri 08:00-18:00 5").next_change(utc("2026-01-05T00:00"), BERLIN, 5) is None
    assert parse("mon 5; * 5").next_change(utc("2026-01-05T00:00"), BERLIN, 9) is None


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("fri-mon 1", "fri,sat,sun,mon 1"),
        ("MON-Fri  8:00-18:00   50;", "mon-fri 08:00-18:00 50"),
        ("* 18:00-24:00 1", "* 18:00-00:00 1"),
        ("* 00:00-24:00 1", "* 1"),
        ("mon-mon 1", "mon 1"),
        ("tue-mon 1", "* 1"),
    ],
)
def test_ways_to_write_the_same(text: str, same: str) -> None:
    one, other = parse(text), parse(same)
    for minute in range(0, 7 * 24 * 60, 15):
        at = utc("2026-01-05T00:00") + minute * MINUTE
        assert (one.entry_at(at, BERLIN) is None) == (other.entry_at(at, BERLIN) is None)


def test_a_timetable_prints_as_it_was_written() -> None:
    assert str(parse("  mon-fri 8:00-18:00  50 ;* 0; ")) == "mon-fri 8:00-18:00 50; * 0"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" ; ", "'': expected DAYS"),
        ("mon", "'mon': expected DAYS"),
        ("* 0; mon 08:00-18:00 50 60", "'mon 08:00-18:00 50 60': expected DAYS"),
        ("* 0;; mon 5", "'': expected DAYS"),
        ("monday 5", "'monday 5': monday is no day: expected mon, tue"),
        ("mon- 5", "'mon- 5': nothing is no day"),
        ("mon,,tue 5", "nothing is no day"),
        ("*,mon 5", r"\* is no day"),
        ("mon 08:00 5", "08:00: expected HH:MM-HH:MM"),
        ("mon 08:00-18:60 5", "expected HH:MM-HH:MM"),
        ("mon 08:00-24:01 5", "expected HH:MM-HH:MM"),
        ("mon 24:00-08:00 5", "expected HH:MM-HH:MM"),
        ("mon 08:00-08:00 5", "begins when it ends"),
        ("mon ٠٨:00-18:00 5", "expected HH:MM-HH:MM"),
        ("mon 08:00-18:00 fast", "'mon 08:00-18:00 fast': fast is no rate"),
        ("mon -5", "-5 is no rate"),
        ("mon 1000001", "1000001 is no rate: .* from 0 .no cap. to 1000000"),
        ("mon ²", "is no rate"),
        ("; ".join(["* 1"] * 101), "101 entries; at most 100"),
        ("* 0; mon 5", "'mon 5' never holds"),
        ("mon 5; mon 5", "'mon 5' never holds"),
        ("mon-fri 0; mon-tue 23:00-06:00 1; * 0; sat 1", "'mon-tue 23:00-06:00 1' never holds"),
    ],
)
def test_a_bad_timetable_is_refused_by_the_part_that_is_bad(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "zone",
    ["Europe/Berlin", "CET-1CEST,M3.5.0,M10.5.0/3", ":/usr/share/zoneinfo/Europe/Berlin"],
)
def test_the_hosts_zone_in_each_form_of_tz(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        with monkeypatch.context() as patched:
            patched.setenv("TZ", zone)
            time.tzset()
            winter = utc("2026-03-29T00:59:59")
            assert [host_offset(winter), host_offset(winter + 1)] == [HOUR, 2 * HOUR]
            assert (BERLIN(winter), BERLIN(winter + 1)) == (HOUR, 2 * HOUR)
    finally:
        time.tzset()


def test_offsets_of_a_zone_are_in_seconds() -> None:
    assert zone_offset(ZoneInfo("Australia/Lord_Howe"))(utc("2026-01-01T00:00")) == 11 * HOUR
    assert zone_offset(ZoneInfo("America/New_York"))(utc("2026-01-01T00:00")) == -5 * HOUR
    amsterdam = zone_offset(ZoneInfo("Europe/Amsterdam"))
    assert timedelta(seconds=amsterdam(utc("1900-01-01T00:00"))) < timedelta(hours=1)
