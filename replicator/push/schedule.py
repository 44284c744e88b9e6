# SPDX-License-Identifier: AGPL-3.0-or-later
"""When the next cycle starts, and how long to wait before a broken line is tried again. Pure."""

from __future__ import annotations

BACKOFF_MAX_S = 30.0


def next_start(started: float, now: float, interval_s: float, jitter: float) -> float:
    """When the cycle after one that began at ``started`` is due, in the same clock's seconds.

    Planned from the start of the last, so that the recovery point objective holds however long a cycle takes; one that is
    overdue starts now. ``jitter`` (0 to 1) moves it earlier by up to a twentieth of the interval, so that many VMs do not
    start together and the interval is never exceeded.
    """
    return max(now, started + interval_s * (1 - 0.05 * jitter))


def backoff_s(attempt: int, jitter: float) -> float:
    """Pause before reconnect number ``attempt`` (0 = the first): doubling from half a second, half of it jitter (0 to 1)."""
    whole = min(BACKOFF_MAX_S, 0.5 * 2.0 ** min(attempt, 16))
    return whole * (0.5 + 0.5 * jitter)
