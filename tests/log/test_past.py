# SPDX-License-Identifier: AGPL-3.0-or-later
"""Earlier times, over sealed and live periods, against what folding all events by hand gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from eventstore.recorders import LMDBApplicationRecorder
from replicator.domain.vm import event_time_us
from replicator.errors import DamageError, RefusedError, StateError
from replicator.log import actions, open_log, past, periods
from replicator.log.archive import SegmentAwayError, WholeRecorder
from replicator.log.past import Wanted
from replicator.log.store import LogStore
from tests.log.support import (
    DB,
    MAIL,
    NAMES,
    WEB,
    Calendar,
    balances,
    caught_up,
    check_log,
    events_by_vm,
    events_of,
    folded,
    live,
    opened,
    three_months,
)

VMS = (WEB, DB, MAIL)
FIRST, SECOND = "000001-2026-01.segment", "000002-2026-02.segment"


# Pages


def expected(own: list[Any], wanted: Wanted) -> tuple[list[Any], bool]:
    """What a page is, said simply."""
    chosen = [
        event
        for event in own
        if (wanted.after is None or event.originator_version > wanted.after)
        and (wanted.since_us is None or event_time_us(event) >= wanted.since_us)
        and (wanted.until_us is None or event_time_us(event) <= wanted.until_us)
    ]
    first = wanted.after is not None or wanted.since_us is not None
    found = chosen[: wanted.limit] if first else chosen[-wanted.limit :]
    return found, len(chosen) > wanted.limit


@pytest.fixture(scope="module")
def whole(made: Path) -> list[Any]:
    with opened(made) as store:
        return check_log(store)


@settings(max_examples=400)
@given(data=st.data())
def test_a_page_is_what_it_should_be(made: Path, whole: list[Any], data: st.DataObject) -> None:
    times = [event_time_us(event) for event in whole]
    a_time = st.none() | st.sampled_from([t + d for t in times for d in (-1, 0, 1)])
    vm = data.draw(st.sampled_from(VMS), "vm")
    own = events_by_vm(whole)[str(vm)]
    wanted = Wanted(
        limit=data.draw(st.integers(1, 25), "limit"),
        after=data.draw(st.none() | st.integers(0, len(own) + 2), "after"),
        since_us=data.draw(a_time, "since"),
        until_us=data.draw(a_time, "until"),
    )
    with opened(made) as store:
        assert past.page(store, vm, wanted) == expected(own, wanted)


def test_pages_follow_each_other(
    made: Path, whole: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small they are, within the log's own pages too, and to both ends."""
    monkeypatch.setattr(past, "_PAGE", 2)
    with opened(made) as store:
        for vm in VMS:
            own = events_by_vm(whole)[str(vm)]
            for limit in (1, 3):
                found: list[Any] = []
                more = True
                while more:
                    after = found[-1].originator_version if found else 0
                    page, more = past.page(store, vm, Wanted(limit=limit, after=after))
                    found += page
                assert found == own
            for limit in range(1, len(own) + 1):
                page, more = past.page(store, vm, Wanted(limit=limit))
                assert (page, more) == (own[-limit:], limit < len(own))


def test_a_vm_that_was_never_there(made: Path) -> None:
    with opened(made) as store:
        for wanted in (Wanted(5), Wanted(5, after=0), Wanted(5, after=99), Wanted(5, since_us=0)):
            assert past.page(store, UUID(int=99), wanted) == ([], False)


# States


def states_by_hand(whole: list[Any], time_us: int) -> dict[str, dict[str, Any]]:
    before = {
        vm: [event for event in own if event_time_us(event) <= time_us]
        for vm, own in events_by_vm(whole).items()
    }
    return balances(folded(own) for own in before.values() if own)


def test_states_at_every_moment(made: Path, whole: list[Any]) -> None:
    """At each event's time and just beside it: before the first, at the borders of periods, and after the last."""
    with opened(made) as store:
        borders = [period.opened_at_us for period in periods.load(store.periods)]
        times = [event_time_us(event) for event in whole] + borders
        for time_us in sorted({t + d for t in times for d in (-1, 0, 1)} | {0, 1 << 60}):
            found = past.states_at(store, time_us)
            assert balances(found) == states_by_hand(whole, time_us), time_us


async def test_states_by_the_log(copied: Path, whole: list[Any]) -> None:
    """By name, and those that were known then only."""
    first = {vm: event_time_us(own[0]) for vm, own in events_by_vm(whole).items()}
    async with open_log(copied, readonly=True) as log:
        assert [vm.name for vm in await log.at(first[str(MAIL)])] == ["db", "mail", "web"]
        assert [vm.name for vm in await log.at(first[str(MAIL)] - 1)] == ["db", "web"]
        assert [vm.name for vm in await log.at(first[str(DB)] - 1)] == ["web"]
        assert await log.at(first[str(WEB)] - 1) == []


# Segments that are away


def move_away(store: LogStore, folder: Path, *names: str) -> None:
    for name in names:
        actions.export(store, name, folder / name, move=True)


def test_what_is_needed_and_away_is_named(copied: Path, tmp_path: Path, whole: list[Any]) -> None:
    own = events_by_vm(whole)
    with opened(copied) as store:
        borders = [period.opened_at_us for period in periods.load(store.periods)]
        move_away(store, tmp_path, FIRST)
        for read in (
            lambda: past.page(store, WEB, Wanted(1000)),
            lambda: past.page(store, WEB, Wanted(1, after=0)),
            lambda: past.page(store, WEB, Wanted(1, since_us=0)),
            lambda: past.states_at(store, borders[1] - 5_000_000),
            lambda: list(store.notifications(1)),
        ):
            call: Callable[[], Any] = read
            with pytest.raises(SegmentAwayError) as caught:
                call()
            said = str(caught.value)
            assert said.startswith(f"events 1 to 7 are in {FIRST}, which is not in ")
            assert said.endswith("bring it back with replctl log import FILE")
        # What does not need it goes on.
        assert past.page(store, DB, Wanted(1000)) == (own[str(DB)], False)
        web = own[str(WEB)]
        assert past.page(store, WEB, Wanted(1000, after=7)) == (web[7:], False)
        assert past.page(store, WEB, Wanted(len(web) - 8)) == (web[8:], True)
        assert past.page(store, WEB, Wanted(1000, since_us=borders[1])) == (web[8:], False)
        after_us = event_time_us(own[str(DB)][0])
        assert balances(past.states_at(store, after_us)) == states_by_hand(whole, after_us)
        actions.bring_back(store, tmp_path / FIRST)
        assert check_log(store) == whole


def test_a_vm_that_came_later_needs_no_older_segment(
    copied: Path, tmp_path: Path, whole: list[Any]
) -> None:
    """``mail`` was registered in the open month: before that it was not there, and that can be known."""
    own = events_by_vm(whole)
    with opened(copied) as store:
        move_away(store, tmp_path, FIRST, SECOND)
        registered_us = event_time_us(own[str(MAIL)][0])
        for time_us in (registered_us - 1, registered_us):
            found = past.states_at(store, time_us)
            assert balances(found) == states_by_hand(whole, time_us)
        assert past.page(store, MAIL, Wanted(1000)) == (own[str(MAIL)], False)


async def test_a_log_lives_on_without_its_segments(
    copied: Path, tmp_path: Path, whole: list[Any], calendar: Calendar
) -> None:
    """It opens, grows, closes and seals; and all comes back."""
    with opened(copied) as store:
        move_away(store, tmp_path, FIRST, SECOND)
    for _ in range(3):
        calendar.next_month()
    async with open_log(copied, clock=calendar) as log:
        await live(log, WEB, random.Random(1), 3)
        await log.close_period()
        await log.seal()
        await live(log, DB, random.Random(2), 3)
        assert log.trouble is None
        with pytest.raises(SegmentAwayError, match=SECOND):
            await log.history(WEB)
        for name in (SECOND, FIRST):
            actions.bring_back(log.store, tmp_path / name)
        events = check_log(log.store)
        assert events[: len(whole)] == whole


def test_only_the_segment_that_was_sealed_comes_back(
    copied: Path, tmp_path: Path, whole: list[Any]
) -> None:
    with opened(copied) as store:
        with pytest.raises(RefusedError, match=f"{FIRST} is here already"):
            actions.bring_back(store, copied / "segments" / FIRST)
        move_away(store, tmp_path, FIRST)
    other = tmp_path / "other"
    with pytest.MonkeyPatch.context() as patch:
        calendar = Calendar(2025, 1)
        calendar.install(patch)
        trio.run(three_months, other, calendar)
    foreign = other / "segments" / "000001-2025-01.segment"
    with opened(copied) as store:
        with pytest.raises(DamageError, match=f"is not what this log sealed as {FIRST}"):
            actions.bring_back(store, foreign)
        assert not (copied / "segments" / FIRST).exists()
        damaged = bytearray((tmp_path / FIRST).read_bytes())
        damaged[len(damaged) // 2] ^= 1
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(DamageError, match="damaged: segment at byte"):
            actions.bring_back(store, tmp_path / "damaged")
        assert [path.name for path in (copied / "segments").glob("*.segment")] == [SECOND]
        actions.bring_back(store, tmp_path / FIRST)
        assert check_log(store) == whole


# Rows that go while they are read


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("topics", [(), ("replctl:vm.tracking-lost",)])
@pytest.mark.parametrize("at", [1, 2, 3])
async def test_the_log_has_no_gap_while_rows_go_into_segments(
    tmp_path: Path, calendar: Calendar, monkeypatch: pytest.MonkeyPatch, at: int, topics: Any
) -> None:
    """Whoever reads pages of it: a fold, and a projection that is made anew."""
    async with open_log(tmp_path, clock=calendar) as log:
        await log.register(WEB, "web", "receiver")
        for _ in range(3):
            for number in range(4):
                async with log.change(WEB) as vm:
                    vm.lose_tracking(str(number))
            await log.close_period()
        await caught_up(log)
        recorder = log.store.recorder
        whole = recorder.select_notifications(1, 1000, None, topics)
        assert len(whole) == (12 if topics else 16)
        reading: ContextVar[bool] = ContextVar("reading", default=False)
        looks = 0
        real = LMDBApplicationRecorder._page

        def page(*args: Any) -> Any:
            nonlocal looks
            if reading.get():
                looks += 1
                if looks == at:
                    reading.set(False)
                    trio.from_thread.run(log.seal)
                    reading.set(True)
            return real(*args)

        monkeypatch.setattr(LMDBApplicationRecorder, "_page", page)

        def read() -> list[Any]:
            reading.set(True)
            found: list[Any] = []
            seen = 0
            while seen < whole[-1].id:
                more, seen = recorder.select_page(seen, 3, topics)
                found += more
            return found

        assert await trio.to_thread.run_sync(read) == whole
        assert recorder.live_first() > 1
        assert recorder.select_notifications(None, 1000, None, topics) == whole
        assert (
            recorder.select_notifications(2, 3, 9, topics, inclusive_of_start=False)
            == [note for note in whole if 2 < note.id <= 9][:3]
        )
        assert recorder.select_notifications(1, 0) == []


# The reader's limits


def test_a_beginning_that_moves_all_the_time_is_an_error(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader does not try for ever."""
    moving = iter(range(1, 100))
    monkeypatch.setattr(WholeRecorder, "live_first", lambda _: next(moving))
    with opened(made) as store, pytest.raises(StateError, match="faster than it can be read"):
        past.page(store, WEB, Wanted(1))
    assert next(moving) < 20


async def test_a_page_of_a_vm_with_more_events_than_a_page(
    tmp_path: Path, calendar: Calendar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(past, "_PAGE", 3)
    async with open_log(tmp_path, clock=calendar) as log:
        await log.register(WEB, NAMES[WEB], "receiver")
        await live(log, WEB, random.Random(3), 11)
        own = events_of(log.store)
        for limit in (1, 2, 3, 6, 12, 13):
            for wanted in (Wanted(limit), Wanted(limit, after=0), Wanted(limit, after=5)):
                assert await log.page(WEB, wanted) == expected(own, wanted)
        for one, two in pairwise(own):
            at_us = event_time_us(one)
            assert balances(await log.at(at_us)) == states_by_hand(own, at_us)
            assert event_time_us(two) > at_us
