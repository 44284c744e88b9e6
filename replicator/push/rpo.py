# SPDX-License-Identifier: AGPL-3.0-or-later
"""The recovery point objective: what it is, how old the newest point will come to be, and the record of each breach."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from uuid import UUID

import msgspec
import trio
from eventsourcing.persistence import PersistenceError

from replicator.config import Config
from replicator.domain.model import Point, PushKind
from replicator.domain.vm import ProtectedVm
from replicator.log import EventLog, Wanted

_logger = logging.getLogger(__name__)

#: How much the last of the cycles counts; the one before counts 0.7 of that, and so on.
_WEIGHT = 0.3
#: Events that are read for the last points.
_EVENTS = 32
#: How often the clock is looked at, which may be set, or stand still with the host. Seconds.
_LOOK_S = 60.0


def target_s(config: Config) -> int | None:
    """How old the newest point may become, in seconds; None where that is not watched."""
    if config.rpo_target:
        return config.rpo_target
    return 2 * config.push_interval if config.is_source else None


def forecast_s(points: Iterable[Point], interval_s: float | None, now_us: int) -> float | None:
    """How old the newest of ``points`` will be when the cycle that is due now ends; None where no cycle tells.

    The next snapshot is made ``interval_s`` seconds (None: as long as the last cycles were apart) after the last one, or
    when the last push has ended. Its push takes what was changed by then at the rates of the last cycles: of change, and
    of transfer. Both count the last cycle most. Never less than the age at ``now_us``, microseconds since the epoch.
    """
    ordered = sorted(points, key=lambda point: point.number)
    gap_s = change = sent = busy_s = 0.0
    seen = False
    for before, point in pairwise(ordered):
        apart_s = (point.taken_at_us - before.taken_at_us) / 1e6
        if point.kind is not PushKind.CYCLE or apart_s <= 0:
            continue
        keep = 1 - _WEIGHT if seen else 0.0
        add = 1 - keep
        seen = True
        gap_s = keep * gap_s + add * apart_s
        change = keep * change + add * point.bytes_pushed / apart_s
        sent = keep * sent + add * point.bytes_pushed
        busy_s = keep * busy_s + add * point.duration_us / 1e6
    if not seen:
        return None
    newest = ordered[-1]
    starts_s = max(gap_s if interval_s is None else interval_s, newest.duration_us / 1e6)
    takes_s = change * starts_s / (sent / busy_s) if sent and busy_s else busy_s
    return max(starts_s + takes_s, (now_us - newest.taken_at_us) / 1e6)


async def recent_points(log: EventLog, vm: ProtectedVm) -> list[Point]:
    """The VM's last points out of its history, which the state of a source does not keep; none where it cannot be read."""
    try:
        events, _ = await log.page(UUID(vm.vm), Wanted(_EVENTS))
    except (
        PersistenceError
    ) as error:  # an old segment may be away: no reason for a status without the rest
        _logger.debug("%s: the last points cannot be read: %s", vm.name, error)
        return []
    kinds = (ProtectedVm.SeedCommitted, ProtectedVm.CycleCommitted)
    return [msgspec.convert(event.point, Point) for event in events if isinstance(event, kinds)]


def _now_us() -> int:
    return time.time_ns() // 1000


async def watch(log: EventLog, target_s: int, now_us: Callable[[], int] = _now_us) -> None:
    """Record it when a VM's newest point comes to be older than ``target_s`` seconds; until cancelled.

    ``now_us`` is the wall clock, in microseconds since the epoch. A breach that cannot be recorded is tried again.
    """
    breached = {vm.vm for vm in log.vms if vm.breach is not None}
    while True:
        try:
            left_s = await _record(log, target_s, now_us, breached)
        except (OSError, PersistenceError) as error:
            _logger.error("a breach of rpo_target cannot be recorded: %s", error)
            await trio.sleep(_LOOK_S)
            continue
        with trio.move_on_after(min(left_s, _LOOK_S)):
            await log.wait_change()


async def _record(
    log: EventLog, target_s: int, now_us: Callable[[], int], breached: set[str]
) -> float:
    """Record every breach that there is now; how many seconds there are to the next. No wait after the last look."""
    for vm in log.vms:
        due_us = vm.breach_due_us(target_s)
        if due_us is None or now_us() <= due_us:
            continue
        async with log.change(UUID(vm.vm)) as changing:
            changing.breach_rpo(target_s, now_us())
    dues = []
    for vm in log.vms:
        if vm.breach is not None and vm.vm not in breached:
            breached.add(vm.vm)
            _logger.warning(
                "%s: recovery point %d is %d s old and there is no newer one: rpo_target is %d s",
                vm.name,
                vm.breach.point,
                vm.breach.age_s,
                vm.breach.target_s,
            )
        elif vm.breach is None and vm.vm in breached:
            breached.discard(vm.vm)
            _logger.info("%s: the newest recovery point is within rpo_target again", vm.name)
        due_us = vm.breach_due_us(target_s)
        if due_us is not None:
            dues.append(due_us)
    # A microsecond past it, so that the next look is not one too early.
    return max(0.0, (min(dues) + 1 - now_us()) / 1e6) if dues else _LOOK_S


__all__ = ["forecast_s", "recent_points", "target_s", "watch"]
