# SPDX-License-Identifier: AGPL-3.0-or-later
"""When the next cycle starts, whether cycles keep up, and how long to wait before a broken line is tried again. Pure."""

from __future__ import annotations

from dataclasses import dataclass

BACKOFF_MIN_S = 0.2
BACKOFF_MAX_S = 2.0
BEAT_MAX_S = 2.0
#: How often it is said that cycles take longer than the interval, seconds.
BEHIND_S = 600.0


def next_start(started: float, now: float, interval_s: float, jitter: float) -> float:
    """When the cycle after one that began at ``started`` is due, in the same clock's seconds.

    Planned from the start of the last, so that the recovery point objective holds however long a cycle takes; one that is
    overdue starts now. ``jitter`` (0 to 1) moves it earlier by up to a twentieth of the interval, so that many VMs do not
    start together and the interval is never exceeded.
    """
    return max(now, started + interval_s * (1 - 0.05 * jitter))


def backoff_s(attempt: int, jitter: float) -> float:
    """Pause before reconnect number ``attempt`` (0 = the first): doubling from 0.2 s to 2 s, half of it jitter (0 to 1)."""
    whole = min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2.0 ** min(attempt, 16))
    return whole * (0.5 + 0.5 * jitter)


def pause_s(attempt: int, spent_s: float, jitter: float) -> float:
    """How long to wait after an attempt that took ``spent_s`` seconds: the time counts, but for the shortest pause.

    So an attempt that waited in vain for a network that was away is followed by another almost at once, while one that was
    refused at once is not repeated in a tight loop.
    """
    return max(backoff_s(0, jitter), backoff_s(attempt, jitter) - spent_s)


def beat_s(timeout_s: float) -> float:
    """How often a side says that it is still there, where the line counts as broken after ``timeout_s`` seconds without a byte.

    Several beats fit into the time, so that one that is late breaks nothing.
    """
    return min(BEAT_MAX_S, timeout_s / 4)


@dataclass(frozen=True, slots=True)
class Told:
    """What to tell of the pace of cycles; ``behind``: they fall behind, else they keep up again."""

    text: str
    behind: bool


class Pace:
    """Whether cycles keep up with their interval: says when they fall behind, now and then while it lasts, and when it is over."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._told_at = -BEHIND_S
        self._told = False  # that they fall behind, and not yet that it is over

    def finished(self, took_s: float, now: float) -> Told | None:
        """What to tell of a cycle that ended at ``now`` after ``took_s`` seconds; None if there is nothing to say."""
        took = f"the last took {_seconds(took_s)} s, push_interval is {self._interval_s:g} s"
        if took_s <= self._interval_s:
            over, self._told = self._told, False
            return Told(f"cycles keep up again: {took}", behind=False) if over else None
        if now - self._told_at < BEHIND_S:
            return None
        self._told_at, self._told = now, True
        return Told(f"cycles fall behind: {took}; the next starts at once", behind=True)


def _seconds(count: float) -> str:
    return f"{count:.0f}" if count >= 10 else f"{count:.1f}"


__all__ = [
    "BACKOFF_MAX_S",
    "BACKOFF_MIN_S",
    "BEAT_MAX_S",
    "Pace",
    "Told",
    "backoff_s",
    "beat_s",
    "next_start",
    "pause_s",
]
