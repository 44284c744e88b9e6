# SPDX-License-Identifier: AGPL-3.0-or-later
"""Limits of what is held at the source: how many snapshots of ours there may be, and how old one may become.

A snapshot grows while it is held, and what it fills is production's: so it goes before that, whatever it costs us.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from replicator.config import Config
from replicator.domain.model import Point
from replicator.errors import RefusedError, SourceError
from replicator.push.journal import PushEntry
from replicator.sources.base import HeldSnapshot, Source

_logger = logging.getLogger(__name__)

#: How often ages are looked at: the wall clock may be set, and a host may have slept. Seconds.
LOOK_S = 60.0
_HOUR_US = 3_600_000_000


@dataclass(frozen=True, slots=True)
class Overdue:
    """What has been held for too long, and why it must go; None where nothing must."""

    push: str | None
    reference: str | None


def now_us() -> int:
    """The wall clock, in microseconds since the epoch."""
    return time.time_ns() // 1000


class HeldLimits:
    """The limits of one VM's source."""

    def __init__(self, config: Config, source: Source) -> None:
        self._count_max = config.held_snapshots_max
        self._hours = config.held_snapshot_hours
        self._source = source

    async def make_room(self, reference: str | None) -> None:
        """See that one more snapshot may be made: strays go first. Called while no push is unfinished.

        ``reference``: the push whose snapshot is the reference. Raises RefusedError, which names what is held, and
        SourceError.
        """
        if len(await self._source.held()) < self._count_max:
            return
        for name in await self._source.sweep(None, reference):
            _logger.warning("removed %s, to make room for a snapshot", name)
        held = await self._source.held()
        if len(held) >= self._count_max:
            names = ", ".join(each.push_id for each in held)
            raise RefusedError(
                f"no snapshot is made: {len(held)} of ours are at the source already (of the pushes {names}) and"
                f" held_snapshots_max is {self._count_max}; see why they cannot be removed, remove them there by hand,"
                " or raise held_snapshots_max"
            )

    async def overdue(self, entry: PushEntry | None, newest: Point | None) -> Overdue | None:
        """What takes room for longer than is allowed: the snapshot of the unfinished push, or that of the newest point.

        A push rests on its reference: where that must go, so must the push. None also where the source cannot be asked,
        which is logged: nothing could be removed then.
        """
        at_us = now_us()
        ages = {}
        if entry is not None:
            ages[entry.push_id] = at_us - (entry.taken_at_us or entry.started_us)
        if newest is not None:
            ages[newest.push_id] = at_us - newest.taken_at_us
        if not any(self._is_old(age_us) for age_us in ages.values()):
            return None
        try:
            held = {each.push_id: each for each in await self._source.held()}
        except SourceError as error:
            _logger.warning("how old snapshots are cannot be seen: %s", error)
            return None
        reference = self._why(held.get(newest.push_id), at_us, "reference") if newest else None
        push = self._why(held.get(entry.push_id), at_us, "snapshot") if entry else None
        if push is None and entry is not None and entry.rests_on_reference:
            push = reference
        return Overdue(push, reference) if push or reference else None

    def _is_old(self, age_us: int) -> bool:
        return age_us > self._hours * _HOUR_US

    def _why(self, held: HeldSnapshot | None, at_us: int, what: str) -> str | None:
        if held is None or not self._is_old(at_us - held.taken_at_us):
            return None
        hours = (at_us - held.taken_at_us) // _HOUR_US
        return f"its {what} was held for {hours} h, held_snapshot_hours is {self._hours}"


__all__ = ["LOOK_S", "HeldLimits", "Overdue", "now_us"]
