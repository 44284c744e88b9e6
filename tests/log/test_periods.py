# SPDX-License-Identifier: AGPL-3.0-or-later
"""The books: closed with the month, sealed into segments, dropped from the live log; nothing lost and nothing twice."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import trio
import trio.lowlevel
import trio.testing
from eventsourcing.persistence import OperationalError

from eventstore.projections import ProjectionParkedError, View
from eventstore.segments import Segment
from replicator import durable
from replicator.domain.vm import ProtectedVm
from replicator.errors import DamageError
from replicator.log import EventLog, open_log, past, periods, usage
from replicator.log.archive import WholeRecorder
from replicator.log.past import Wanted
from tests.limits import HANG_S
from tests.log import support
from tests.log.support import (
    DB,
    MAIL,
    NAMES,
    WEB,
    Calendar,
    balances,
    caught_up,
    check_log,
    events_of,
    listening,
    live,
    live_rows,
    opened,
    settled,
    state,
    states,
)
from tests.log.writing import writer

ROOT = Path(__file__).resolve().parents[2]


async def two_vms(log: EventLog, events: int = 5) -> None:
    rng = random.Random(1)
    for vm in (WEB, DB):
        await log.register(vm, NAMES[vm], "receiver")
        await live(log, vm, rng, events)


# Closing


async def test_the_month_ends(tmp_path: Path, calendar: Calendar) -> None:
    """The first event of another month closes the books by itself; each VM goes on from its balance."""
    async with open_log(tmp_path, clock=calendar) as log:
        await two_vms(log)
        calendar.next_month()
        before = balances(log.vms)
        versions = {vm.vm: vm.version for vm in log.vms}
        async with log.change(WEB) as vm:
            vm.lose_tracking("the first of February")
        await settled(log, 2)
        assert [p.label for p in log.periods] == ["000001-2026-01", "000002-2026-02"]
        after = balances(log.vms)
        assert after[str(DB)] == before[str(DB)]
        assert after[str(WEB)] == before[str(WEB)] | {"tracking_lost": "the first of February"}
        # The opening events are numbered on.
        assert {vm.vm: vm.version for vm in log.vms} == {
            str(WEB): versions[str(WEB)] + 2,
            str(DB): versions[str(DB)] + 1,
        }
        memory = states(log.vms)
        await live(log, WEB, random.Random(2), 3)
        check_log(log.store)
    async with open_log(tmp_path, clock=calendar) as log:
        assert state(log.get(DB)) == memory[str(DB)]
        assert len(log.periods) == 2
        check_log(log.store)


async def test_every_state_survives_the_closing(tmp_path: Path, calendar: Calendar) -> None:
    """All fields of a VM, also those that are mostly empty: a stream that begins with a balance needs nothing older."""
    async with open_log(tmp_path, clock=calendar) as log:
        for number in range(40):
            vm = UUID(int=number + 1)
            await log.register(vm, f"vm-{number}", "source" if number % 2 else "receiver")
            await live(log, vm, random.Random(number), number % 9)
        async with log.change(UUID(int=9)) as vm_9:
            vm_9.start_test(support.clone(1))
            vm_9.break_peer("it began anew")
            vm_9.damaged(support.damage(1))
        before = balances(log.vms)
        await log.close_period()
        assert balances(log.vms) == before
        memory = states(log.vms)
        assert {vm.period for vm in log.vms} == {2}
        await log.seal()
        await caught_up(log)
    async with open_log(tmp_path, clock=calendar) as log:
        assert states(log.vms) == memory
    # And without what is kept beside the log.
    with opened(tmp_path, readonly=False) as store:
        support.forget_projections(store)
    async with open_log(tmp_path, readonly=True) as log:
        assert states(log.vms) == memory


async def test_nothing_to_close(tmp_path: Path, calendar: Calendar) -> None:
    async with open_log(tmp_path, clock=calendar) as log:
        assert await log.close_period() is None
        await two_vms(log)
        assert await log.close_period() is not None
        head = log.store.head()
        for _ in range(3):
            calendar.next_month()
            assert await log.close_period() is None
        assert log.store.head() == head
        # A period of openings only stays open for months, and a change does not close it before it is in it.
        await live(log, WEB, random.Random(1))
        await settled(log, 3)
        check_log(log.store)


async def test_a_full_period_is_closed_within_its_month(
    tmp_path: Path, calendar: Calendar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(periods, "EVENTS_MAX", 10)
    rng = random.Random(3)
    async with open_log(tmp_path, clock=calendar) as log:
        await two_vms(log, 3)
        for _ in range(20):
            await live(log, rng.choice((WEB, DB)), rng)
            await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(HANG_S):
            await log.seal()
        closed = log.periods[:-1]
        assert len(closed) >= 2
        assert {p.label[-7:] for p in log.periods} == {"2026-01"}
        # It is noticed after the change that fills it, so some may hold a few more, never fewer.
        assert all(p.last + 1 - p.first >= 10 for p in closed)
        assert len(live_rows(log.store)) <= 2 * 10
        check_log(log.store)


async def test_many_vms_do_not_close_every_period_at_once(
    tmp_path: Path, calendar: Calendar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More VMs than a period may hold events: its openings alone would fill it."""
    monkeypatch.setattr(periods, "EVENTS_MAX", 4)
    async with open_log(tmp_path, clock=calendar) as log:
        for number in range(6):
            await log.register(UUID(int=number + 1), f"vm-{number}", "receiver")
        for number in range(18):
            await live(log, UUID(int=number % 6 + 1), random.Random(number))
            await trio.testing.wait_all_tasks_blocked()
        await log.seal()
        assert all(p.last + 1 - p.first >= 12 for p in log.periods[:-1])
        check_log(log.store)


async def test_a_month_is_closed_once_whoever_wants_it(tmp_path: Path, calendar: Calendar) -> None:
    """The log's own task and an operator both see that the month has changed; events come meanwhile."""
    async with open_log(tmp_path, clock=calendar) as log:
        await two_vms(log)
        for number in range(2, 8):
            calendar.next_month()
            with trio.fail_after(HANG_S):
                async with trio.open_nursery() as nursery:
                    for vm in (WEB, DB):
                        nursery.start_soon(live, log, vm, random.Random(number), 3)
                    nursery.start_soon(log.close_period)
                    nursery.start_soon(log.close_period, log.periods[-1].number)
                    nursery.start_soon(log.close_period, log.periods[-1].number)
            await live(log, WEB, random.Random(1))
        await log.seal()
        months = [p.label[-7:] for p in log.periods]
        # By the operator's word, or for the month: not both.
        assert all(months.count(month) <= 2 for month in months), months
        check_log(log.store)


async def test_a_vm_is_registered_in_a_later_period(tmp_path: Path, calendar: Calendar) -> None:
    async with open_log(tmp_path, clock=calendar) as log:
        await two_vms(log)
        calendar.next_month()
        await log.close_period()
        await log.seal()
        found = await log.register(MAIL, "mail", "receiver")
        assert (found.period, found.version) == (2, 1)
        await live(log, MAIL, random.Random(1), 3)
        before = balances(log.vms)
        calendar.next_month()
        await log.close_period()
        await log.seal()
        assert balances(log.vms) == before
        memory = states(log.vms)
        kinds = [type(event).__name__ for event in await log.history(MAIL)]
        assert (kinds[0], kinds[-1], len(kinds)) == ("Registered", "PeriodOpened", 5)
        check_log(log.store)
    async with open_log(tmp_path, clock=calendar) as log:
        assert states(log.vms) == memory


async def test_closing_while_many_vms_change(tmp_path: Path, calendar: Calendar) -> None:
    """No event is lost, none is twice, and none stands in a period that was closed before it."""
    vms = [UUID(int=number + 1) for number in range(12)]
    rng = random.Random(4)
    async with open_log(tmp_path, clock=calendar) as log:
        done: list[str] = []

        async def work(vm: UUID) -> None:
            await log.register(vm, f"vm-{vm.int}", "receiver")
            while len(log.periods) < 5:
                async with log.change(vm) as changing:
                    await trio.lowlevel.checkpoint()
                    reason = f"{vm.int}/{changing.version}"
                    changing.lose_tracking(reason)
                done.append(reason)

        with trio.fail_after(HANG_S):
            async with trio.open_nursery() as nursery:
                for vm in rng.sample(vms, len(vms)):
                    nursery.start_soon(work, vm)
                while len(log.periods) < 5:
                    await log.wait_change()
                    calendar.next_month()
                    await log.close_period()
                    await log.seal()
        memory = states(log.vms)
        events = check_log(log.store)
        said = [e.reason for e in events if isinstance(e, ProtectedVm.TrackingLost)]
        assert sorted(said) == sorted(done)
        for period in log.periods:
            for event in events[period.first - 1 : period.last or None]:
                assert event.originator_id in {support.stream_id(vm, period.number) for vm in vms}
    async with open_log(tmp_path, clock=calendar) as log:
        assert states(log.vms) == memory


@pytest.mark.parametrize("saved", [False, True])
async def test_a_closing_that_fails_leaves_memory_equal_to_the_log(
    tmp_path: Path, calendar: Calendar, monkeypatch: pytest.MonkeyPatch, saved: bool
) -> None:
    """Also where the error came after the commit: what follows would go into a stream that has ended."""
    async with open_log(tmp_path, clock=calendar) as log:
        await two_vms(log)
        before = balances(log.vms)

        def fail(commit: Callable[[], list[Any]]) -> list[Any]:
            if saved:
                commit()
            raise OperationalError("no room")

        with monkeypatch.context() as patch:
            support.around_commits(patch, periods.Close, fail)
            with pytest.raises(OperationalError, match="no room"):
                await log.close_period()
        assert balances(log.vms) == before
        assert len(log.periods) == (2 if saved else 1)
        for vm in (WEB, DB):
            await live(log, vm, random.Random(1), 2)
        assert await log.close_period() is not None
        await log.seal()
        memory = states(log.vms)
        check_log(log.store)
    async with open_log(tmp_path, clock=calendar) as log:
        assert states(log.vms) == memory


@pytest.mark.parametrize("saved", [False, True])
async def test_a_registration_that_fails_can_be_repeated(
    tmp_path: Path, calendar: Calendar, monkeypatch: pytest.MonkeyPatch, saved: bool
) -> None:
    """And a VM that is in the log all the same is in the next period."""
    async with open_log(tmp_path, clock=calendar) as log:
        await two_vms(log)

        def fail(commit: Callable[[], list[Any]]) -> list[Any]:
            if saved:
                commit()
            raise OperationalError("no room")

        with monkeypatch.context() as patch:
            support.around_commits(patch, support.Insert, fail)
            with pytest.raises(OperationalError, match="no room"):
                await log.register(MAIL, "mail", "receiver")
        assert (log.get(MAIL) is not None) is saved
        await log.close_period()
        found = await log.register(MAIL, "mail", "receiver")
        assert found.version == (2 if saved else 1)
        check_log(log.store)


# Sealing


async def test_what_is_sealed_is_whole_and_gone_from_the_live_log(
    tmp_path: Path, calendar: Calendar
) -> None:
    async with open_log(tmp_path, clock=calendar) as log:
        await two_vms(log)
        before = events_of(log.store)
        await log.close_period()
        head = log.store.head()
        (sealed,) = await log.seal()
        assert sealed.segment == "000001-2026-01.segment"
        path = tmp_path / "segments" / "000001-2026-01.segment"
        with Segment.open(path) as segment:
            segment.verify()
            info = segment.info
            assert (info.first, info.last, info.label) == (1, len(before), sealed.label)
            assert info.root == log.store.root_at(len(before))
            assert [log.store.event(note) for note in segment.notifications()] == before
        assert log.store.recorder.live_first() == len(before) + 1
        assert live_rows(log.store) == list(range(len(before) + 1, head + 1))
        assert events_of(log.store)[: len(before)] == before
        assert await log.seal() == []


async def test_no_row_goes_before_every_projection_has_seen_it(
    tmp_path: Path,
    calendar: Calendar,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    assert autojump_clock.rate == 0  # a projection is tried again for half a minute
    bad: list[int] = [4]
    real = usage.UsageByDay.apply

    def apply(self: usage.UsageByDay, view: View, notification: Any) -> None:
        if notification.id in bad:
            raise ValueError("not this one")
        real(self, view, notification)

    monkeypatch.setattr(usage.UsageByDay, "apply", apply)
    async with open_log(tmp_path, clock=calendar) as log:
        await two_vms(log)
        count = log.store.head()
        await log.close_period()
        with pytest.raises(
            ProjectionParkedError, match=r"'usage' is parked at event 4: .*not this"
        ):
            await log.seal()
        assert live_rows(log.store)[:count] == list(range(1, count + 1))
        assert log.periods[0].segment is not None
        bad.clear()
        await trio.to_thread.run_sync(log.projections.resume, "usage")
        await log.projections.wait("usage", count)
        await log.seal()
        assert live_rows(log.store)[0] == count + 1
        check_log(log.store)


@pytest.mark.parametrize("step", ["write", "fsync", "rename", "make_dir", "verify"])
async def test_a_segment_that_cannot_be_written_is_tried_again(
    tmp_path: Path, calendar: Calendar, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """It is said, nothing of it is left, the log goes on, and the next change tries again."""
    async with open_log(tmp_path, clock=calendar) as log:
        await two_vms(log)
        before = events_of(log.store)
        with monkeypatch.context() as patch, listening("replicator.log") as said:
            fail_at(patch, step)
            calendar.next_month()
            await live(log, WEB, random.Random(1))
            with trio.fail_after(HANG_S):
                await said.one.wait()
        assert said.texts == [log.trouble]
        assert said.texts[0].startswith("the log's closed periods cannot be sealed: ")
        assert "No space left on device" in said.texts[0]
        segments = tmp_path / "segments"
        assert not segments.exists() or not os.listdir(segments)
        assert log.periods[0].segment is None
        assert live_rows(log.store)[0] == 1
        await live(log, WEB, random.Random(2), 2)
        await settled(log, 2)
        assert not log.trouble
        assert events_of(log.store)[: len(before)] == before
        check_log(log.store)


def fail_at(patch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "make_dir":
        patch.setattr(durable, "make_dir", fail)
    elif step == "verify":
        patch.setattr(Segment, "verify", fail)
    else:
        patch.setattr(os, step, fail)


async def test_a_segment_that_is_there_and_is_another_is_never_taken_for_it(
    tmp_path: Path, calendar: Calendar
) -> None:
    """Nor are the live rows dropped then."""
    async with open_log(tmp_path / "other", clock=calendar) as log:
        await log.register(WEB, "web", "receiver")
        await live(log, WEB, random.Random(9), 9)
        await log.close_period()
        await log.seal()
    async with open_log(tmp_path, clock=calendar):
        pass
    (tmp_path / "segments").mkdir()
    forged = tmp_path / "segments" / "000001-2026-01.segment"
    forged.write_bytes((tmp_path / "other" / "segments" / forged.name).read_bytes())
    async with open_log(tmp_path, clock=calendar) as log:
        await log.register(WEB, "web", "receiver")
        await live(log, WEB, random.Random(8), 9)
        await log.close_period()
        with pytest.raises(DamageError, match="is not what this log would seal"):
            await log.seal()
        assert live_rows(log.store)[0] == 1
        forged.unlink()
        await log.seal()
        check_log(log.store)


async def test_sealing_that_is_cancelled_leaves_nothing(
    tmp_path: Path, calendar: Calendar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that ends does not wait for a million records."""
    asked: list[int] = []
    real = trio.from_thread.check_cancelled
    scope = trio.CancelScope()

    async with open_log(tmp_path, clock=calendar) as log:
        await log.register(WEB, "web", "receiver")
        async with log.change(WEB) as vm:
            for number in range(600):
                vm.lose_tracking(str(number))
        await log.close_period()

        def check() -> None:
            asked.append(1)
            trio.from_thread.run_sync(scope.cancel)
            real()

        with monkeypatch.context() as patch:
            patch.setattr(trio.from_thread, "check_cancelled", check)
            with scope:
                await log.seal()
        assert scope.cancelled_caught
        assert asked == [1]
        assert log.periods[0].segment is None
        assert os.listdir(tmp_path / "segments") == []
        await log.seal()
        check_log(log.store)


async def test_a_log_in_which_years_have_passed(tmp_path: Path, calendar: Calendar) -> None:
    """The live log holds the open month only; all of it is one history."""
    rng = random.Random(6)
    async with open_log(tmp_path, clock=calendar) as log:
        for vm in (WEB, DB):
            await log.register(vm, NAMES[vm], "receiver")
        for _ in range(26):
            await live(log, rng.choice((WEB, DB)), rng, 4)
            calendar.next_month()
            await log.close_period()
            await log.seal()
        assert len(os.listdir(tmp_path / "segments")) == 26
        assert len(live_rows(log.store)) == 2
        memory = states(log.vms)
        check_log(log.store)
    async with open_log(tmp_path, clock=calendar) as log:
        assert states(log.vms) == memory


# Others look at it meanwhile


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("when", ["load", "select", "first"])
async def test_history_is_whole_while_it_is_moved_away(
    tmp_path: Path,
    calendar: Calendar,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
    forward: bool,
) -> None:
    """Rows go into a segment between any two looks of one that reads."""
    rng = random.Random(7)
    wanted = Wanted(limit=1000, after=0 if forward else None)
    async with open_log(tmp_path, clock=calendar) as log:
        await two_vms(log)
        calendar.next_month()
        await log.close_period()
        await live(log, WEB, rng, 4)
        calendar.next_month()
        await log.close_period()
        await caught_up(log)
        before, _ = await log.page(WEB, wanted)
        asked = 0
        reading: ContextVar[bool] = ContextVar("reading", default=False)

        def seal_now(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal asked
                asked += reading.get()  # the log's own tasks look too
                done = real(*args, **options)
                if reading.get() and asked == 1:
                    trio.from_thread.run(log.seal)
                return done

            return call

        with monkeypatch.context() as patch:
            if when == "load":
                patch.setattr(periods, "load", seal_now(periods.load))
            elif when == "select":
                patch.setattr(WholeRecorder, "select_events", seal_now(WholeRecorder.select_events))
            else:
                patch.setattr(WholeRecorder, "live_first", seal_now(WholeRecorder.live_first))
            reading.set(True)
            found, more = await trio.to_thread.run_sync(past.page, log.store, WEB, wanted)
        assert asked
        assert len(log.periods) == 3
        assert all(p.dropped for p in log.periods[:2])
        assert (found, more) == (before, False)


def test_another_process_reads_while_this_one_writes_and_seals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer seals one period at every look of the reader at the log's beginning; pages have no gap all the same."""
    with writer(tmp_path / "log") as step:
        step("months 3")
        with opened(tmp_path / "log") as store:
            real = periods.load
            steps = iter(["seal 1", "events 2", "seal 1", "seal 1"])

            def load(journal: Any) -> list[periods.Period]:
                found: list[periods.Period] = real(journal)
                if (what := next(steps, None)) is not None:
                    step(what)
                return found

            with monkeypatch.context() as patch:
                patch.setattr(periods, "load", load)
                for wanted in (Wanted(limit=1000, after=0), Wanted(limit=1000)):
                    found, more = past.page(store, WEB, wanted)
                    assert not more
                    ids = [event.originator_version for event in found]
                    assert ids == list(range(1, len(ids) + 1))
            assert store.recorder.live_first() > 1
            check_log(store)


# A crash anywhere


def test_a_crash_at_every_step_of_closing_sealing_and_dropping(tmp_path: Path) -> None:
    """Whatever is cut, every event is there once, the history is whole, and the next start takes up what was left."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.log.child", "crash", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=HANG_S,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, lines[-1:]
    faults = [line for line in lines if line["error"]]
    assert not faults, faults[0]
    killed = [line["killed"].split()[0] for line in lines if line["killed"]]
    assert {"mkdir", "ftruncate", "write", "fsync", "rename"} <= set(killed)
    # The event, the closing, the segment's row, 13 events dropped by fives, that none is left, and that it is done.
    assert killed.count("before-commit") == killed.count("after-commit") == 8
