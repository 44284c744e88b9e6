# SPDX-License-Identifier: AGPL-3.0-or-later
"""Rates by wall-clock time: `mon-fri 08:00-18:00 50; sat,sun 10:00-14:00 200; * 0`. Pure: no clock, no zone of its own.

A timetable is a table of one week of wall-clock minutes. What rate holds at an instant follows from what a clock on the wall
shows then, whatever the zone does: a time that is skipped never comes, one that comes twice has its rate twice.
"""

from __future__ import annotations

import bisect
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Final

from replicator.errors import UsageError

#: From an instant, seconds since the epoch, to how far wall clocks are ahead of UTC then, seconds.
Offset = Callable[[int], int]

RATE_MBPS_MAX: Final = 1_000_000
_ENTRIES_MAX: Final = 100
_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY_MIN: Final = 24 * 60
_WEEK_MIN: Final = 7 * _DAY_MIN
#: The epoch was a Thursday: seconds from the Monday before.
_EPOCH_S: Final = 3 * 86400
#: Zones change their offset less often than this, seconds: two changes within it would hide each other.
_STEP_S: Final = 3600
#: How far ahead a change is looked for. Further than a week, because a zone may skip the only time that differs.
_AHEAD_S: Final = 35 * 86400
_TIME = re.compile(r"([0-9]{1,2}):([0-9]{2})")


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a timetable: ``text`` as it was written, the minutes of the week that it is for, its rate in Mbit/s."""

    text: str
    spans: tuple[tuple[int, int], ...]
    mbps: int

    def holds(self, minute: int) -> bool:
        """Whether it is for this minute of the week (0 is Monday 00:00)."""
        return any(
            start <= minute < end or start <= minute + _WEEK_MIN < end for start, end in self.spans
        )


class Timetable:
    """Entries, of which the first that matches holds; ``parse`` makes one."""

    def __init__(self, entries: tuple[Entry, ...]) -> None:
        self.entries = entries
        edges = {0}
        for entry in entries:
            for span in entry.spans:
                edges.update(edge % _WEEK_MIN for edge in span)
        #: Minutes of the week at which another entry may begin to hold, and which does from then on.
        self._edges = sorted(edges)
        self._held = [self._first(minute) for minute in self._edges]

    def __str__(self) -> str:
        return "; ".join(entry.text for entry in self.entries)

    def _first(self, minute: int) -> Entry | None:
        return next((entry for entry in self.entries if entry.holds(minute)), None)

    def can_hold(self, entry: Entry) -> bool:
        """Whether this entry of the table holds at any time of the week: those before it may leave nothing to it."""
        return any(held is entry for held in self._held)

    def entry_at(self, instant: float, offset: Offset) -> Entry | None:
        """The entry that holds at an instant, seconds since the epoch; None where none does."""
        return self._entry(_week_second(instant, offset))

    def _entry(self, week_second: int) -> Entry | None:
        return self._held[bisect.bisect_right(self._edges, week_second // 60) - 1]

    def next_change(self, instant: float, offset: Offset, otherwise: int = 0) -> int | None:
        """The first instant after this one at which another rate holds; None if that is not to be seen.

        ``otherwise`` is the rate, Mbit/s, where no entry holds.
        """
        now = int(instant // 1)

        def rate(entry: Entry | None) -> int:
            return otherwise if entry is None else entry.mbps

        before = rate(self.entry_at(now, offset))
        if all(rate(entry) == before for entry in self._held):
            return None
        for edge in self._edges_after(now, offset):
            if rate(self.entry_at(edge, offset)) != before:
                return edge
        return None

    def _edges_after(self, now: int, offset: Offset) -> Iterator[int]:
        """The instants after ``now``, in order, at which another entry may begin to hold."""
        end = now + _AHEAD_S
        while now < end:
            shift = _shift_after(now, now + _STEP_S, offset)
            until = now + _STEP_S if shift is None else shift - 1
            yield from self._edges_between(now, until, offset)
            if shift is not None:
                yield shift
            now = until if shift is None else shift

    def _edges_between(self, now: int, until: int, offset: Offset) -> Iterator[int]:
        """Those after ``now`` up to ``until``, where the offset is the same all the time."""
        week_start = now - _week_second(now, offset)
        while week_start <= until:
            for edge in self._edges:
                if now < (at := week_start + edge * 60) <= until:
                    yield at
            week_start += _WEEK_MIN * 60


def _week_second(instant: float, offset: Offset) -> int:
    """Seconds since Monday 00:00 that a wall clock shows."""
    second = int(instant // 1)
    return (second + offset(second) + _EPOCH_S) % (_WEEK_MIN * 60)


def _shift_after(low: int, high: int, offset: Offset) -> int | None:
    """The first instant after ``low`` up to ``high`` with another offset."""
    before = offset(low)
    if offset(high) == before:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if offset(middle) == before:
            low = middle
        else:
            high = middle
    return high


def host_offset(instant: int) -> int:
    """The host's own zone, by the C library: `TZ` in each of its forms, else /etc/localtime."""
    return time.localtime(instant).tm_gmtoff


def zone_offset(zone: tzinfo) -> Offset:
    """The offset of a zone, such as ``zoneinfo.ZoneInfo("Europe/Berlin")``."""

    def offset(instant: int) -> int:
        found = datetime.fromtimestamp(instant, UTC).astimezone(zone).utcoffset()
        assert found is not None
        return found // timedelta(seconds=1)

    return offset


def parse(text: str) -> Timetable:
    """A timetable out of ``DAYS [HH:MM-HH:MM] RATE`` entries with ``;`` between them. Raises UsageError that names the part.

    DAYS is `*` or days and ranges with commas (`mon-wed,sat`, also over the week's end: `fri-mon`), RATE whole Mbit/s, 0 for no
    cap. Times may go past midnight: `fri 22:00-06:00` is Friday's night, until Saturday morning. 24:00 is a day's end. An entry
    to which those before it leave nothing is refused.
    """
    parts = [part.strip() for part in text.split(";")]
    if parts[-1] == "":
        parts.pop()
    if not parts:
        raise UsageError("empty; expected entries such as mon-fri 08:00-18:00 50")
    if len(parts) > _ENTRIES_MAX:
        raise UsageError(f"{len(parts)} entries; at most {_ENTRIES_MAX}")
    table = Timetable(tuple(map(_parse_entry, parts)))
    for entry in table.entries:
        if not table.can_hold(entry):
            raise UsageError(
                f"{entry.text!r} never holds: the first entry that matches does, and those before it take all of its"
                " time; put it before them"
            )
    return table


def _parse_entry(part: str) -> Entry:
    words = part.split()
    try:
        match words:
            case [days, rate]:
                start, end = 0, _DAY_MIN
            case [days, times, rate]:
                start, end = _parse_times(times)
            case _:
                raise _BadPartError("expected DAYS [HH:MM-HH:MM] RATE")
        spans = tuple(
            (day * _DAY_MIN + start, day * _DAY_MIN + end) for day in sorted(_parse_days(days))
        )
        return Entry(" ".join(words), spans, parse_mbps(rate))
    except _BadPartError as error:
        raise UsageError(f"{part!r}: {error}") from None


class _BadPartError(UsageError):
    """What is wrong with a part of an entry."""


def parse_mbps(text: str) -> int:
    """A rate in Mbit/s, 0 for no cap. Raises UsageError."""
    if not re.fullmatch(r"[0-9]{1,7}", text) or int(text) > RATE_MBPS_MAX:
        raise _BadPartError(
            f"{text} is no rate: expected a whole number of Mbit/s from 0 (no cap) to {RATE_MBPS_MAX}"
        )
    return int(text)


def _parse_days(text: str) -> set[int]:
    if text == "*":
        return set(range(7))
    days: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        start = _parse_day(first)
        end = _parse_day(last) if dash else start
        days.update((start + step) % 7 for step in range((end - start) % 7 + 1))
    return days


def _parse_day(text: str) -> int:
    try:
        return _DAYS.index(text.lower())
    except ValueError:
        raise _BadPartError(
            f"{text or 'nothing'} is no day: expected {', '.join(_DAYS)}, or * for all"
        ) from None


def _parse_times(text: str) -> tuple[int, int]:
    """Minutes of the day; the end is after the start, on the next day if need be."""
    first, dash, last = text.partition("-")
    start, end = _parse_time(first), _parse_time(last)
    if not dash or start is None or end is None or start == _DAY_MIN:
        raise _BadPartError(f"{text}: expected HH:MM-HH:MM")
    if start == end:
        raise _BadPartError(
            f"{text} begins when it ends; without times it is for the whole of its days"
        )
    return start, end if end > start else end + _DAY_MIN


def _parse_time(text: str) -> int | None:
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    hour, minute = int(match[1]), int(match[2])
    if minute > 59 or hour * 60 + minute > _DAY_MIN:
        return None
    return hour * 60 + minute


__all__ = [
    "RATE_MBPS_MAX",
    "Entry",
    "Offset",
    "Timetable",
    "host_offset",
    "parse",
    "parse_mbps",
    "zone_offset",
]
