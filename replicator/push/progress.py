# SPDX-License-Identifier: AGPL-3.0-or-later
"""How far the push is that is under way, and how long it may take: for the log, status and metrics. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from replicator.domain.views import push_info

#: What was measured for less than this tells nothing of the rest, seconds.
_MEASURED_S = 2.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a push is: ``done`` of ``total`` bytes of a disk looked at, ``sent`` bytes on the line in all."""

    disk: str
    done: int
    total: int
    sent: int


def left_s(done: int, total: int, gained: int, took_s: float) -> float | None:
    """How many seconds it takes from ``done`` to ``total`` bytes at the rate at which ``gained`` of them took ``took_s`` seconds;
    None where that tells nothing yet.
    """
    if done >= total:
        return 0.0
    if gained <= 0 or took_s < _MEASURED_S:
        return None
    return (total - done) / gained * took_s


@dataclass(slots=True)
class UnderWay:
    """A push that is under way. ``total``: bytes of all its disks; ``since_us``: when it began, microseconds since the epoch.

    ``kind`` is ``seed``, ``cycle`` or ``resync``. Made anew where the push goes on after a break: what is left is reckoned
    from what this connection has brought.
    """

    point: int
    kind: str
    since_us: int
    total: int
    sent: int = 0
    _done: dict[str, int] = field(default_factory=dict)
    _first: dict[str, int] = field(default_factory=dict)
    _began: float | None = None
    _now: float = 0.0

    def update(self, at: Progress, now: float) -> None:
        """A disk is that far at ``now``, seconds of any steady clock."""
        if self._began is None:
            self._began = now
        self._now = now
        # Where it stood when it was taken up was reached before.
        self._first.setdefault(at.disk, at.done)
        self._done[at.disk] = at.done
        self.sent = at.sent

    @property
    def done(self) -> int:
        """Bytes of the disks that were looked at: read, or known to be unchanged."""
        return min(self.total, sum(self._done.values()))

    @property
    def ratio(self) -> float:
        """How much of the disks was looked at, from 0 to 1."""
        return self.done / self.total if self.total else 1.0

    @property
    def eta_s(self) -> float | None:
        """How long it goes on at the rate of this connection, seconds; None where that is not known yet."""
        if self._began is None:
            return None
        gained = self.done - sum(self._first.values())
        return left_s(self.done, self.total, gained, self._now - self._began)

    def info(self) -> dict[str, Any]:
        """PushProgress of docs/json.md."""
        return push_info(
            self.point,
            self.kind,
            self.since_us,
            done=self.done,
            total=self.total,
            sent=self.sent,
            eta_s=self.eta_s,
        )


__all__ = ["Progress", "UnderWay", "left_s"]
