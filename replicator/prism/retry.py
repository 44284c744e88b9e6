# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which failures may pass by themselves, and when to try again (nutanix-data-path.md, general step rules, 5). No I/O."""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Callable, Iterable
from enum import StrEnum

WAIT_MIN_S = 1.0
WAIT_MAX_S = 60.0
#: A server's Retry-After is honoured up to so long.
RETRY_AFTER_MAX_S = 120.0
#: Tries of a call that meets an error inside the server.
FEW = 3
#: Tries of any call, whatever the time says.
TRIES_MAX = 30

_RATE_GROUPS = frozenset({"RATE_LIMIT_EXCEEDED", "RATE_LIMIT_ERROR", "TOO_MANY_REQUESTS"})
_PASSING = frozenset({408, 503, 504})


class Passing(StrEnum):
    """What a failed try says of the next one."""

    NO = "no"
    BUSY = "busy"
    """Too many requests: nothing was done."""
    AWAY = "away"
    """No answer, or one in place of the server: it may have been done."""
    BROKEN = "broken"
    """An error inside the server: a few tries."""


def passing(status: int, words: Iterable[str]) -> Passing:
    """What an answer says. ``words``: its error groups and reasons."""
    if status == 429 or not _RATE_GROUPS.isdisjoint(words):
        return Passing.BUSY
    if status in _PASSING:
        return Passing.AWAY
    return Passing.BROKEN if status >= 500 and status != 501 else Passing.NO


def retry_after_s(value: str | None, clock: Callable[[], float] = time.time) -> float | None:
    """A Retry-After header in seconds (it may hold a date); None where there is none that can be read."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(min(int(value[:9]), 10**6))
    try:
        date = email.utils.parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return None
    return max(0.0, date.timestamp() - clock())


class Tries:
    """The tries of one call that began at ``now``, on a clock of seconds; ``limit_s``: the last one begins before that.

    ``jitter`` gives numbers from 0 to 1.
    """

    def __init__(
        self, now: float, limit_s: float, jitter: Callable[[], float] = random.random
    ) -> None:
        self._deadline = now + limit_s
        self._jitter = jitter
        self.failed = 0

    def wait_s(self, kind: Passing, now: float, told_s: float | None = None) -> float | None:
        """How long to wait before the next try, after one more that failed so; None: there is no next one.

        ``told_s``: the server's Retry-After.
        """
        self.failed += 1
        if kind is Passing.NO or self.failed >= (FEW if kind is Passing.BROKEN else TRIES_MAX):
            return None
        step_s = min(WAIT_MAX_S, WAIT_MIN_S * 2**self.failed)
        wait_s = WAIT_MIN_S + self._jitter() * (step_s - WAIT_MIN_S)
        if told_s is not None:
            if told_s > RETRY_AFTER_MAX_S:
                return None
            wait_s = max(told_s, WAIT_MIN_S / 10) + self._jitter() * WAIT_MIN_S
        return wait_s if now + wait_s <= self._deadline else None
