# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the log says of earlier times: pages of a VM's history, and the VMs as they were. Everything here blocks.

A VM's events stand in one stream for each period. Streams of periods that were dropped are read from their segments.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

from replicator.domain.model import stream_id
from replicator.domain.vm import ProtectedVm, event_time_us
from replicator.errors import StateError
from replicator.log import periods
from replicator.log.periods import Period
from replicator.log.store import Fold, LogStore

T = TypeVar("T")
#: Events read in one transaction.
_PAGE = 500
#: Openings are recorded before their period's own time, by moments.
_EARLY_US = 3_600_000_000
#: How often the beginning of the log may move away under the reader.
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which events: numbered above ``after``, recorded from ``since_us`` to ``until_us`` (inclusive), at most ``limit``.

    With ``after`` or ``since_us`` the first of them, else the newest.
    """

    limit: int
    after: int | None = None
    since_us: int | None = None
    until_us: int | None = None

    @property
    def forward(self) -> bool:
        """Whether the earliest are wanted first."""
        return self.after is not None or self.since_us is not None

    def holds(self, event: Any) -> bool:
        """Whether this event is one of them, the limit apart."""
        at = event_time_us(event)
        return (
            (self.after is None or event.originator_version > self.after)
            and (self.since_us is None or at >= self.since_us)
            and (self.until_us is None or at <= self.until_us)
        )


def page(store: LogStore, vm: UUID, wanted: Wanted) -> tuple[list[Any], bool]:
    """The events, oldest first, and whether others had to be left out. Raises SegmentAwayError."""
    return _still(store, lambda known: _page(store, known, vm, wanted))


def _still(store: LogStore, read: Callable[[list[Period]], T]) -> T:
    """What ``read`` finds while no rows are moved from the live log into a segment; it is called again where some were."""
    for _ in range(_TRIES):
        first = store.recorder.live_first()
        found = read(periods.load(store.periods))
        if store.recorder.live_first() == first:
            return found
    raise StateError("the log's beginning moves away faster than it can be read")


def _page(
    store: LogStore, cut: Sequence[Period], vm: UUID, wanted: Wanted
) -> tuple[list[Any], bool]:
    if wanted.forward:
        first = _first_period(store, cut, vm, wanted)
        # A period that began later has nothing of it; within one a clock that was set back may have put times in any order.
        until_us = wanted.until_us
        ahead = [
            p for p in cut[first:] if until_us is None or p.opened_at_us - _EARLY_US <= until_us
        ]
        events = _forward(store, ahead, vm)
    else:
        events = _backward(store, cut, vm, min(_PAGE, wanted.limit + 1))
    found: list[Any] = []
    for event in events:
        if wanted.holds(event):
            if len(found) == wanted.limit:
                return (found if wanted.forward else found[::-1]), True
            found.append(event)
    return (found if wanted.forward else found[::-1]), False


def _first_period(store: LogStore, cut: Sequence[Period], vm: UUID, wanted: Wanted) -> int:
    """The index of the period that the first wanted event may stand in."""
    if wanted.after is not None:
        for index in range(len(cut) - 1, 0, -1):
            opening = next(iter(_stream(store, cut[index], vm, page_size=1)), None)
            if opening is not None and opening.originator_version <= wanted.after + 1:
                return index
        return 0
    assert wanted.since_us is not None
    return max(0, bisect.bisect_right([p.opened_at_us for p in cut], wanted.since_us) - 1)


def _forward(store: LogStore, cut: Sequence[Period], vm: UUID) -> Iterator[Any]:
    for period in cut:
        yield from _stream(store, period, vm)


def _backward(store: LogStore, cut: Sequence[Period], vm: UUID, page_size: int) -> Iterator[Any]:
    # No more than is wanted: what is damaged before that does not matter.
    for period in reversed(cut):
        for event in _stream(store, period, vm, desc=True, page_size=page_size):
            yield event
            if event.originator_version == 1:
                return  # nothing of it is in older periods, whose segments may be away


def _stream(
    store: LogStore, period: Period, vm: UUID, *, desc: bool = False, page_size: int = _PAGE
) -> Iterator[Any]:
    """A VM's events in one period, page by page."""
    stream = stream_id(vm, period.number)
    if period.segment is not None:
        stored = store.archive.stream(period, stream)
        yield from map(store.event, reversed(stored) if desc else stored)
        return
    gt = lte = None
    while True:
        rows = store.recorder.select_events(stream, gt=gt, lte=lte, desc=desc, limit=page_size)
        yield from map(store.event, rows)
        if len(rows) < page_size:
            return
        if desc:
            lte = rows[-1].originator_version - 1
        else:
            gt = rows[-1].originator_version


def states_at(store: LogStore, time_us: int) -> list[ProtectedVm]:
    """The VMs that were known at that time, as they were. Raises SegmentAwayError."""
    return _still(store, lambda known: _states_at(store, known, time_us))


def _states_at(store: LogStore, cut: Sequence[Period], time_us: int) -> list[ProtectedVm]:
    last = bisect.bisect_right([period.opened_at_us for period in cut], time_us)
    for period in reversed(cut[:last]):
        found = _fold_until(store, period, time_us)
        if found is not None:
            return found
    return []


def _fold_until(store: LogStore, period: Period, time_us: int) -> list[ProtectedVm] | None:
    """The VMs at a time, from the events of its period, read once; None if the time lies before the period's openings,
    which may be recorded a moment after its own time.
    """
    fold = Fold()
    ended: set[Any] = (
        set()
    )  # streams whose next event is later; the clock may have gone back after it
    for note in store.notifications(period.first, period.last or None):
        if note.originator_id in ended:
            continue
        event = store.event(note)
        if event_time_us(event) <= time_us:
            fold.add(event)
        elif isinstance(event, ProtectedVm.PeriodOpened):
            return None
        else:
            ended.add(note.originator_id)
    return list(fold.vms.values())


__all__ = ["Wanted", "page", "states_at"]
