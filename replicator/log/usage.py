# SPDX-License-Identifier: AGPL-3.0-or-later
"""The projection of what protection has cost, by VM and day: cycles, bytes, seconds, and what went wrong. It outlives
retention and sealed periods, and can be thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
from eventsourcing.persistence import Notification

from eventstore.projections import Projection, View
from replicator.domain.model import Point, PushKind, stream_id
from replicator.domain.views import sampling_info
from replicator.domain.vm import ProtectedVm, event_time_us

NAME = "usage"
_VM = b"v"
_DAY = b"d"


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """Sums. ``busy_us``: microseconds from a push's start to its commit. ``sampled``: grains that change tracking called
    unchanged, and were; ``missed``: times that one was not.
    """

    seeds: int = 0
    cycles: int = 0
    bytes_pushed: int = 0
    busy_us: int = 0
    abandoned: int = 0
    damages: int = 0
    tests: int = 0
    sampled: int = 0
    missed: int = 0

    def plus(self, other: Usage) -> Usage:
        """Both together."""
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)
        return Usage(*(a + b for a, b in pairs))


_decoder = msgspec.msgpack.Decoder(Usage)


def of(event: Any) -> Usage:
    """What one event adds."""
    match event:
        case ProtectedVm.SeedCommitted() | ProtectedVm.CycleCommitted():
            point = msgspec.convert(event.point, Point)
            seed = point.kind is PushKind.SEED
            return Usage(
                seeds=int(seed),
                cycles=int(not seed),
                bytes_pushed=point.bytes_pushed,
                busy_us=point.duration_us,
                sampled=point.sampled,
            )
        case ProtectedVm.ChangesMissed():
            return Usage(missed=1)
        case ProtectedVm.PushAbandoned():
            return Usage(abandoned=1)
        case ProtectedVm.PointDamaged():
            return Usage(damages=1)
        case ProtectedVm.TestStarted():
            return Usage(tests=1)
    return Usage()


class UsageByDay(Projection):
    """Keeps ``usage``. Rows: which VM a stream belongs to, and a VM's sums of one day (UTC)."""

    name = NAME
    revision = 3
    topics: Sequence[str] = ()

    def __init__(self, event: Callable[[Notification], Any]) -> None:
        self._event = event

    def apply(self, view: View, notification: Notification) -> None:
        """Add one event to its VM's day."""
        event = self._event(notification)
        stream = event.originator_id.bytes
        if isinstance(event, ProtectedVm.Registered):
            view.put(_VM + stream, event.vm.encode())
            return
        if isinstance(event, ProtectedVm.PeriodOpened):
            vm = event.mutate(None)
            view.put(_VM + stream, vm.vm.encode())
            view.delete(_VM + stream_id(UUID(vm.vm), vm.period - 1).bytes)
            return
        added = of(event)
        if added == Usage():
            return
        name = view.get(_VM + stream)
        assert name is not None, "a stream begins with its VM's name"
        day = datetime.fromtimestamp(event_time_us(event) / 1_000_000, UTC).strftime("%Y-%m-%d")
        key = _DAY + name + b"/" + day.encode()
        row = view.get(key)
        before = Usage() if row is None else _decoder.decode(row)
        view.put(key, msgspec.msgpack.encode(before.plus(added)))


def days(view: View, vm: str) -> list[tuple[str, Usage]]:
    """A VM's days, oldest first."""
    prefix = _DAY + vm.encode() + b"/"
    return [(key[len(prefix) :].decode(), _decoder.decode(row)) for key, row in view.items(prefix)]


def totals(view: View, first_day: str = "") -> dict[str, Usage]:
    """Every VM's sums since its first day, or since ``first_day`` (as ``2026-03-01``), by its UUID."""
    found: dict[str, Usage] = {}
    for key, row in view.items(_DAY):
        vm, _, day = key[len(_DAY) :].decode().rpartition("/")
        if day < first_day:
            continue
        found[vm] = found.get(vm, Usage()).plus(_decoder.decode(row))
    return found


def sampling_of(recent: dict[str, Usage], vm: str) -> dict[str, Any]:
    """SamplingInfo of a VM, from what ``totals`` has of the last days (``domain.sampling.first_day``)."""
    sums = recent.get(vm, Usage())
    return sampling_info(sums.sampled, sums.missed)


__all__ = ["NAME", "Usage", "UsageByDay", "days", "of", "sampling_of", "totals"]
