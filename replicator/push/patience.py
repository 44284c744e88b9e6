# SPDX-License-Identifier: AGPL-3.0-or-later
"""Goes on over broken lines: when to try again and when to give up, and what is said of it meanwhile.

It knows nothing of what is done on a connection, only whether something came of it.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import trio

from replicator.nursery import flat_nursery
from replicator.push.connection import Connection, ConnectionLostError
from replicator.push.link import Link
from replicator.push.schedule import pause_s

_logger = logging.getLogger(__name__)

#: How often it is said that the receiver is still away, or that the line broke more than once. Seconds.
TELL_S = 60.0

T = TypeVar("T")
Note = Callable[[ConnectionLostError, int], Awaitable[None]]
Back = Callable[[], Awaitable[None]]


@dataclass(slots=True)
class _Outage:
    """The receiver was last heard of, or first missed, ``since`` then; ``told``: the log says so."""

    since: float
    error: ConnectionLostError
    told: bool = False


@dataclass(slots=True)
class _Untold:
    """Outages of which the log says nothing yet: how many, how long those took that are over, the last one's error."""

    breaks: int
    away_s: float
    error: ConnectionLostError


class Patience:
    """Work on connections of ``link``, again and again, until it is done.

    ``limit_s``: how long to go on although nothing more becomes durable; infinity never gives up, not even where the
    receiver was never reached. ``jitter`` gives numbers from 0 to 1.

    The log has a line when the line breaks and one when the receiver is reached again. What breaks within TELL_S of the last
    such line is summed up in one line when that time is over.
    """

    def __init__(
        self,
        link: Link,
        limit_s: float,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.limit_s = limit_s
        #: Connections that were made after one that broke, or could not be made.
        self.reconnects = 0
        self._link = link
        self._jitter = jitter
        self._told = -math.inf  # when it was last said that the line is broken
        self._attempts = 0  # that failed since then
        self._unnoted = 0  # attempts that failed since the last note
        self._outage: _Outage | None = None  # the one that lasts
        self._untold: _Untold | None = None
        self._more = trio.Event()  # set while there is something untold

    async def keep_connected(
        self, work: Callable[[Connection], Awaitable[T]], note: Note, back: Back
    ) -> T:
        """What ``work`` returns, on the first connection that carries it to its end.

        ``note`` is awaited with an error and the number of attempts that failed since it was last called: at the beginning of
        each outage, and then at most every TELL_S seconds. ``back`` is awaited when the receiver is reached again.
        Raises ConnectionLostError when patience is at an end, and what else ``Link.connect`` and ``work`` raise, at once.
        To be cancelled at any time; ``work`` is cancelled with it.
        """
        whole = False
        try:
            async with flat_nursery() as nursery:
                nursery.start_soon(self._sum_up_in_time)
                result = await self._keep_connected(work, note, back)
                nursery.cancel_scope.cancel()
            whole = True
        finally:
            # Where there is another push to come, the line waits for its time; else this is the last chance.
            if not whole or self.limit_s != math.inf:
                self._sum_up(ending=True)
            self._outage = None
        return result

    async def _keep_connected(
        self, work: Callable[[Connection], Awaitable[T]], note: Note, back: Back
    ) -> T:
        attempt, reached = 0, False
        deadline = trio.current_time() + self.limit_s
        while True:
            began = trio.current_time()
            heard_at: float | None = None
            try:
                async with self._link.connect() as connection:
                    reached = True
                    if self._outage is not None:
                        self._back(self._outage)
                        await back()
                    try:
                        return await work(connection)
                    finally:
                        heard_at = connection.heard_at
                        # Only what became durable counts: a line that breaks at the same place each time leads nowhere.
                        if connection.progressed:
                            attempt, deadline = 0, trio.current_time() + self.limit_s
            except ConnectionLostError as error:
                now = trio.current_time()
                if self.limit_s != math.inf and (not reached or now > deadline):
                    await self._give_up(error, note)
                    raise
                await self._broken(error, now if heard_at is None else heard_at, note)
                await trio.sleep(pause_s(attempt, now - began, self._jitter()))
                attempt += 1

    async def _broken(self, error: ConnectionLostError, since: float, note: Note) -> None:
        """An attempt failed."""
        self._attempts += 1
        self._unnoted += 1
        began = self._outage is None
        outage = self._outage = self._outage or _Outage(since, error)
        outage.error = error
        told = self._tell(outage, began)
        if told or began:
            count, self._unnoted = self._unnoted, 0
            await note(error, count)

    def _tell(self, outage: _Outage, began: bool) -> bool:
        """Say that the line is broken, unless something was said of it a short time ago; whether that was said."""
        now = trio.current_time()
        soon = now - self._told < TELL_S
        if began and (soon or self._untold is not None):
            breaks, away_s = self._missed()
            self._untold = _Untold(breaks + 1, away_s, outage.error)
            self._more.set()
        if soon:
            return False
        if self._untold is not None:
            self._sum_up()
            return True
        count, self._attempts, self._told = self._attempts, 0, now
        outage.told = True
        if now - outage.since < TELL_S:
            _logger.warning("%s; trying again", outage.error)
        else:
            away_s = now - outage.since
            _logger.warning(
                "the receiver is away for %.0f s (%d more attempts): %s",
                away_s,
                count,
                outage.error,
            )
        return True

    def _missed(self) -> tuple[int, float]:
        return (0, 0.0) if self._untold is None else (self._untold.breaks, self._untold.away_s)

    async def _sum_up_in_time(self) -> None:
        while True:
            await self._more.wait()
            await trio.sleep_until(self._told + TELL_S)
            self._sum_up()

    def _sum_up(self, *, ending: bool = False) -> None:
        """Say what was not said yet of breaks that followed soon after one that was told."""
        if self._untold is None:
            return
        now, outage = trio.current_time(), self._outage
        breaks, away_s = self._missed()
        error, passed_s = self._untold.error, now - self._told
        if outage is not None:  # among those counted: from now on it is told like any other
            away_s += now - outage.since
            outage.told, error = True, outage.error
        _logger.warning(
            "the line broke %s in the last %.0f s, away %.1f s in all (%s)%s",
            "once more" if breaks == 1 else f"{breaks} more times",
            passed_s,
            away_s,
            error,
            "; going on" if outage is None else "" if ending else "; trying again",
        )
        self._told, self._attempts, self._untold, self._more = now, 0, None, trio.Event()

    async def _give_up(self, error: ConnectionLostError, note: Note) -> None:
        """What was not told yet; of the last attempt the caller is told by the error."""
        count, self._unnoted = self._unnoted, 0
        if count:
            await note(error, count)

    def _back(self, outage: _Outage) -> None:
        self.reconnects += 1
        self._outage = None
        away_s = trio.current_time() - outage.since
        if outage.told:
            _logger.info("the receiver is reached again, after %.1f s", away_s)
        elif self._untold is not None:
            self._untold.away_s += away_s


__all__ = ["TELL_S", "Patience"]
