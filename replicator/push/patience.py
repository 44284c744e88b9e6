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

from replicator.push.connection import Connection, ConnectionLostError
from replicator.push.link import Link
from replicator.push.schedule import pause_s

_logger = logging.getLogger(__name__)

#: How often it is said, and written down for status, that the receiver is still away. Seconds.
TELL_S = 60.0

T = TypeVar("T")
Note = Callable[[ConnectionLostError, int], Awaitable[None]]


@dataclass(slots=True)
class _Outage:
    """The receiver was last heard of, or first missed, ``since`` then; ``told``: the log says so."""

    since: float
    told: bool = False


class Patience:
    """Work on connections of ``link``, again and again, until it is done.

    ``limit_s``: how long to go on although nothing more becomes durable; infinity never gives up, not even where the
    receiver was never reached. ``jitter`` gives numbers from 0 to 1.
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
        self._untold = 0  # attempts that failed since then

    async def keep_connected(self, work: Callable[[Connection], Awaitable[T]], note: Note) -> T:
        """What ``work`` returns, on the first connection that carries it to its end.

        ``note`` is awaited with an error and the number of attempts that failed since it was last called: at the first of
        them, and then at most every TELL_S seconds.
        Raises ConnectionLostError when patience is at an end, and what else ``Link.connect`` and ``work`` raise, at once.
        To be cancelled at any time; ``work`` is cancelled with it.
        """
        attempt, reached = 0, False
        deadline = trio.current_time() + self.limit_s
        outage: _Outage | None = None
        while True:
            began = trio.current_time()
            heard_at: float | None = None
            try:
                async with self._link.connect() as connection:
                    reached = True
                    if outage is not None:
                        self._back(outage)
                        outage = None
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
                outage = outage or _Outage(now if heard_at is None else heard_at)
                await self._tell(error, outage, note)
                await trio.sleep(pause_s(attempt, now - began, self._jitter()))
                attempt += 1

    async def _tell(self, error: ConnectionLostError, outage: _Outage, note: Note) -> None:
        """Say that the line is broken, unless something was said of it a short time ago."""
        now = trio.current_time()
        self._untold += 1
        if now - self._told < TELL_S:
            return
        count, self._untold, self._told = self._untold, 0, now
        outage.told = True
        if now - outage.since < TELL_S:
            _logger.warning("%s; trying again", error)
        else:
            away_s = now - outage.since
            _logger.warning(
                "the receiver is away for %.0f s (%d more attempts): %s", away_s, count, error
            )
        await note(error, count)

    async def _give_up(self, error: ConnectionLostError, note: Note) -> None:
        """What was not told yet; of the last attempt the caller is told by the error."""
        count, self._untold = self._untold, 0
        if count:
            await note(error, count)

    def _back(self, outage: _Outage) -> None:
        self.reconnects += 1
        if outage.told:
            away_s = trio.current_time() - outage.since
            _logger.info("the receiver is reached again, after %.1f s", away_s)


__all__ = ["TELL_S", "Patience"]
