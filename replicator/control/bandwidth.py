# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which rate the throttle has now, and why: the configuration's, or what an operator has set since, by the wall clock."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from replicator import timetable
from replicator.config import Config, parse_schedule
from replicator.errors import UsageError
from replicator.timetable import Offset, Timetable, host_offset
from replicator.wire.throttle import Throttle

_logger = logging.getLogger(__name__)

#: How long the wall clock may have been set, or the host's zone changed, before it is noticed. Seconds.
LOOK_S: Final = 60.0
#: What a limit set by an operator is called where a key of the configuration would be named.
SET_BY_HAND: Final = "replctl throttle"


@dataclass(frozen=True, slots=True)
class Limit:
    """A cap: a rate in Mbit/s (0 for none), and a timetable that goes before it. ``text`` is how it was given."""

    text: str
    mbps: int
    timetable: Timetable | None = None


@dataclass(frozen=True, slots=True)
class Rate:
    """What holds now: Mbit/s (0 for no cap), the key or command that says so, and the timetable's entry, if it is one.

    ``next_change`` is when another rate holds, seconds since the epoch, and which; None if there is none to be seen.
    """

    mbps: int
    origin: str
    entry: str | None
    next_change: tuple[int, int] | None


def parse_limit(text: str, otherwise: int) -> Limit:
    """``off``, a rate in Mbit/s, or a timetable, outside of which it is ``otherwise``. Raises UsageError."""
    words = " ".join(text.split())
    if words == "off":
        return Limit(words, 0)
    if words.isdecimal() and words.isascii():
        return Limit(words, timetable.parse_mbps(words))
    if len(words.split()) <= 1:
        raise UsageError(f"{words!r}: expected Mbit/s as a whole number, a timetable, off or reset")
    table = timetable.parse(words)
    return Limit(str(table), otherwise, table)


class Regulator:
    """Keeps a throttle at the rate that holds. ``clock``: seconds since the epoch; ``offset``: the zone of the wall clock.

    What is set by hand ends with the process.
    """

    def __init__(
        self,
        config: Config,
        *,
        clock: Callable[[], float] = time.time,
        offset: Offset = host_offset,
    ) -> None:
        self._clock = clock
        self._offset = offset
        table = parse_schedule(config.max_bandwidth_schedule)
        self._configured = Limit("", config.max_bandwidth_mbps, table)
        self._by_hand: Limit | None = None
        self._changed = trio.Event()
        self.throttle = Throttle(self.rate().mbps)

    @property
    def configured_mbps(self) -> int:
        """``max_bandwidth_mbps``: the rate where no timetable says another."""
        return self._configured.mbps

    @property
    def by_hand(self) -> Limit | None:
        """What an operator has set, if anything."""
        return self._by_hand

    def set_limit(self, limit: Limit | None) -> None:
        """Let this hold from now on; None: the configuration again."""
        self._by_hand = limit
        self.apply()
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    def rate(self) -> Rate:
        """What holds at this moment."""
        limit = self._by_hand or self._configured
        hand = self._by_hand is not None
        if limit.timetable is None:
            return Rate(limit.mbps, SET_BY_HAND if hand else "max_bandwidth_mbps", None, None)
        now = self._clock()
        entry = limit.timetable.entry_at(now, self._offset)
        at = limit.timetable.next_change(now, self._offset, limit.mbps)
        following = None
        if at is not None:
            other = limit.timetable.entry_at(at, self._offset)
            following = (at, limit.mbps if other is None else other.mbps)
        if entry is None:
            return Rate(limit.mbps, "max_bandwidth_mbps", None, following)
        origin = SET_BY_HAND if hand else "max_bandwidth_schedule"
        return Rate(entry.mbps, origin, entry.text, following)

    def apply(self) -> Rate:
        """Set the throttle to what holds at this moment, and say so if that is something else."""
        rate = self.rate()
        if rate.mbps != self.throttle.mbps:
            reason = why(rate.origin, rate.entry)
            _logger.info("throttle: %s from now on (%s)", words(rate.mbps), reason)
            self.throttle.set_rate(rate.mbps)
        return rate

    async def run(self) -> None:
        """Follow the timetable until cancelled."""
        while True:
            time.tzset()  # the host's zone may be another one now
            rate = self.apply()
            wait_s = LOOK_S if self._follows_clock else math.inf
            if rate.next_change is not None:
                wait_s = min(wait_s, max(0.0, rate.next_change[0] - self._clock()))
            with trio.move_on_after(wait_s):
                await self._changed.wait()

    @property
    def _follows_clock(self) -> bool:
        return (self._by_hand or self._configured).timetable is not None


def words(mbps: int) -> str:
    """A rate, for people."""
    return f"{mbps} Mbit/s" if mbps else "no cap"


def why(origin: str, entry: str | None) -> str:
    """Where a rate comes from, for people."""
    return origin if entry is None else f"{origin}: {entry}"


__all__ = ["SET_BY_HAND", "Limit", "Rate", "Regulator", "parse_limit", "why", "words"]
