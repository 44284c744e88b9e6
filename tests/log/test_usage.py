# SPDX-License-Identifier: AGPL-3.0-or-later
"""What protection has cost, by VM and day: against sums made by hand, over sealed periods, and made anew from segments."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from eventstore import projection_keeper
from eventstore.projections import read_projection
from replicator.domain.model import Point, PushKind, Suspicion
from replicator.domain.sampling import WINDOW_DAYS, first_day
from replicator.domain.vm import ProtectedVm
from replicator.log import open_log, usage
from replicator.log.store import LogStore
from replicator.log.usage import Usage, days, sampling_of
from tests.domain.samples import point
from tests.limits import HANG_S
from tests.log.support import (
    DB,
    MAIL,
    NAMES,
    WEB,
    Calendar,
    caught_up,
    clone,
    damage,
    events_by_vm,
    events_of,
    forget_projections,
    live,
    opened,
    rebuilt,
    rows,
)


def by_hand(store: LogStore) -> dict[str, dict[str, list[int]]]:
    """Sums by VM and day, in the order of the fields."""
    found: dict[str, dict[str, list[int]]] = {}
    for vm, own in events_by_vm(events_of(store)).items():
        sums: dict[str, list[int]] = defaultdict(lambda: [0] * 9)
        for event in own:
            day = event.timestamp.strftime("%Y-%m-%d")
            kind = type(event).__name__
            if kind in ("SeedCommitted", "CycleCommitted"):
                sums[day][kind == "CycleCommitted"] += 1
                sums[day][2] += 123_456_789_012
                sums[day][3] += 9_000_000_000
                sums[day][7] += msgspec.convert(event.point, Point).sampled
            counted = ["PushAbandoned", "PointDamaged", "TestStarted", "", "ChangesMissed"]
            if kind in counted:
                sums[day][4 + counted.index(kind)] += 1
        if sums:
            found[vm] = dict(sums)
    return found


def kept(store: LogStore) -> dict[str, dict[str, list[int]]]:
    """The same as the projection has it."""

    def read(view: Any) -> dict[str, dict[str, list[int]]]:
        return {
            str(vm): {
                day: [
                    one.seeds,
                    one.cycles,
                    one.bytes_pushed,
                    one.busy_us,
                    one.abandoned,
                    one.damages,
                    one.tests,
                    one.sampled,
                    one.missed,
                ]
                for day, one in days(view, str(vm))
            }
            for vm in NAMES
            if days(view, str(vm))
        }

    return read_projection(store.environment, usage.NAME, read)


def test_sums_are_those_made_by_hand(made: Path) -> None:
    with opened(made) as store:
        assert kept(store) == by_hand(store)
        assert set(kept(store)) == {str(vm) for vm in NAMES}


async def test_days_and_everything_that_counts(tmp_path: Path, calendar: Calendar) -> None:
    async with open_log(tmp_path, clock=calendar) as log:
        await log.register(WEB, "web", "receiver")
        for number in range(1, 8):
            async with log.change(WEB) as vm:
                kind = PushKind.SEED if number in (1, 5) else PushKind.CYCLE
                made = point(number, kind, parent=number - 1)
                vm.commit(msgspec.structs.replace(made, sampled=10 * number))
                vm.miss_changes(Suspicion("disk-0", 0, number))
                vm.abandon_push(f"{number:016}", number + 1, "gone")
                vm.damaged(damage(number))
                vm.start_test(clone(number))
                vm.end_test()
            calendar._now += timedelta(hours=12)
        await caught_up(log)
        assert kept(log.store) == by_hand(log.store)
        found = kept(log.store)[str(WEB)]
        assert list(found) == sorted(found)
        assert [sum(day[n] for day in found.values()) for n in (0, 1, 4, 5, 6)] == [2, 5, 7, 7, 7]
        # Once for each chain: the first is suspect until the second seed, which is the fifth point.
        assert [sum(day[n] for day in found.values()) for n in (7, 8)] == [280, 2]
        assert len(found) >= 3


async def test_what_was_sampled_in_the_last_days(tmp_path: Path, calendar: Calendar) -> None:
    """It survives restarts and sealed periods, and ends with the day on which it is too old."""
    clean = {0: 100, 3: 20, 9: 3}
    for day, sampled in clean.items():
        async with open_log(tmp_path, clock=calendar) as log:
            await log.register(WEB, "web", "source")
            async with log.change(WEB) as vm:
                number = day + 1
                made = point(number, PushKind.SEED if day == 0 else PushKind.CYCLE, parent=0)
                parent = vm.newest.number if vm.newest else 0
                vm.commit(msgspec.structs.replace(made, parent=parent, sampled=sampled))
            await log.close_period()
            await log.seal()
            await caught_up(log)
            now_us = calendar()
            for later, expected in window(clean, day):
                recent = await log.usage(first_day(now_us + later * DAY_US))
                assert sampling_of(recent, str(WEB))["sampled"] == expected
        calendar._now += timedelta(days=3 if day == 0 else 6)


DAY_US = 86_400_000_000


def window(clean: dict[int, int], today: int) -> Iterator[tuple[int, int]]:
    """How many days from today, and what of the samples taken until today is of the last seven days then."""
    for later in range(12):
        days = range(today + later - WINDOW_DAYS + 1, today + later + 1)
        yield later, sum(n for day, n in clean.items() if day in days and day <= today)


async def test_sums_go_on_when_the_books_are_closed(tmp_path: Path, calendar: Calendar) -> None:
    """Within one day too, and for VMs that come and go quiet."""
    rng = random.Random(4)
    async with open_log(tmp_path, clock=calendar) as log:
        for number, vm in enumerate((WEB, DB, MAIL)):
            await log.register(vm, NAMES[vm], "receiver")
            for known in list(NAMES)[: number + 1]:
                await live(log, known, rng, 6)
            await log.close_period()
            await log.seal()
        await caught_up(log)
        assert kept(log.store) == by_hand(log.store)


async def test_made_anew_from_the_segments(copied: Path, calendar: Calendar) -> None:
    async with open_log(copied, clock=calendar) as log:
        await caught_up(log)
        before = rows(log.store, usage.NAME)
        await trio.to_thread.run_sync(log.projections.request_rebuild, usage.NAME)
        with trio.fail_after(HANG_S):
            await rebuilt(log, usage.NAME)
        assert rows(log.store, usage.NAME) == before
        assert kept(log.store) == by_hand(log.store)


async def test_made_anew_while_periods_are_sealed(
    tmp_path: Path, calendar: Calendar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new rows are behind when the live log's beginning moves away under them; none is passed over."""
    monkeypatch.setattr(projection_keeper, "BATCH_MAX", 2)
    rng = random.Random(5)
    async with open_log(tmp_path, clock=calendar) as log:
        for vm in (WEB, DB):
            await log.register(vm, NAMES[vm], "receiver")
        for _ in range(4):
            await live(log, WEB, rng, 6)
            await live(log, DB, rng, 6)
            calendar.next_month()
            await log.close_period()
        await trio.to_thread.run_sync(log.projections.request_rebuild, usage.NAME)
        with trio.fail_after(HANG_S):
            await log.seal()
            await live(log, WEB, rng, 6)
            await log.close_period()
            await log.seal()
            await rebuilt(log, usage.NAME)
            await caught_up(log)
        assert kept(log.store) == by_hand(log.store)


async def test_thrown_away_and_made_from_nothing(copied: Path, calendar: Calendar) -> None:
    with opened(copied, readonly=False) as store:
        expected = by_hand(store)
        forget_projections(store)
    async with open_log(copied, clock=calendar) as log:
        with trio.fail_after(HANG_S):
            await caught_up(log)
        assert kept(log.store) == expected


def test_sums_add_up() -> None:
    one, two = Usage(*range(1, 10)), Usage(*range(10, 100, 10))
    assert one.plus(two) == two.plus(one) == Usage(*range(11, 110, 11))
    assert one.plus(Usage()) == one
    vm = ProtectedVm.register(WEB, "web", "receiver")
    (event,) = vm.collect_events()
    assert usage.of(event) == Usage()
