# SPDX-License-Identifier: AGPL-3.0-or-later
"""The cap on requests: one bucket of tokens for each host, shared by all who ask it."""

from __future__ import annotations

import logging

import trio

_logger = logging.getLogger(__name__)

BURST_MIN = 30
_TICK_S = 1e-6
#: A request that waits longer for the cap is told of, once in so long.
_LONG_S = 5.0
_TELL_S = 60.0


class TokenBucket:
    """``rpm`` requests a minute, with a burst of that many, 30 at least; 0 for no cap. In order of arrival.

    A wait for it of more than 5 s is logged, once a minute; ``host`` is for that.
    """

    def __init__(self, rpm: int, host: str = "") -> None:
        self._rpm = rpm
        self._host = host
        self._told_at: float | None = None
        self.capacity = float(max(BURST_MIN, rpm))
        self._per_s = rpm / 60
        self._tokens = self.capacity
        self._at: float | None = None
        self._held_until = 0.0
        self._turn = trio.StrictFIFOLock()

    async def take(self) -> None:
        """Wait until one more request may be sent. Cancelled: none is used up."""
        came = trio.current_time()
        async with self._turn:
            # Looked at again after the wait: ``hold`` may have been called meanwhile.
            while (wait_s := self._wait_s(trio.current_time())) > 0:
                self._tell(trio.current_time(), trio.current_time() + wait_s - came)
                await trio.sleep(wait_s)
            self._tokens -= 1 if self._per_s else 0

    def hold(self, seconds: float) -> None:
        """Send nothing for so long: the host has said that it is too much."""
        self._held_until = max(self._held_until, trio.current_time() + seconds)

    def _tell(self, now: float, waits_s: float) -> None:
        # What the host itself holds back is told of elsewhere (outage.py).
        ours = self._tokens < 1 and self._held_until <= now
        if ours and waits_s > _LONG_S and (self._told_at is None or now >= self._told_at + _TELL_S):
            self._told_at = now
            _logger.info("waiting for prism_rate_rpm = %d (host %s)", self._rpm, self._host)

    def _wait_s(self, now: float) -> float:
        if self._at is not None:
            self._tokens = min(self.capacity, self._tokens + (now - self._at) * self._per_s)
        self._at = now
        short_s = (1 - self._tokens) / self._per_s if self._per_s and self._tokens < 1 else 0.0
        held_s = self._held_until - now
        # A wait too small for the clock to show would be waited for again and again.
        return max(short_s + _TICK_S if short_s > 0 else 0.0, held_s if held_s > _TICK_S else 0.0)
