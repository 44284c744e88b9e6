# SPDX-License-Identifier: AGPL-3.0-or-later
"""How old the newest point may become, how old it will, and that each breach is recorded once."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import msgspec
import pytest
import trio
import trio.testing
from eventsourcing.persistence import OperationalError
from hypothesis import given
from hypothesis import strategies as st

from replicator.config import check
from replicator.domain.model import Point, PushKind, RpoBreach
from replicator.domain.views import event_info, vm_status, warnings
from replicator.domain.vm import ProtectedVm
from replicator.log import EventLog, open_log
from replicator.push import rpo
from tests.limits import HANG_S

VM = UUID("2cfe30b1-ed0a-5d2c-b362-ab269447546d")
S = 1_000_000
T0 = 1_700_000_000 * S


def point(
    number: int,
    taken_s: float,
    took_s: float = 1,
    sent: int = 1000,
    kind: PushKind = PushKind.CYCLE,
) -> Point:
    taken_at_us = T0 + round(taken_s * S)
    return Point(
        number=number,
        parent=number - 1,
        push_id=f"push{number}",
        kind=kind,
        epoch=1,
        taken_at_us=taken_at_us,
        committed_at_us=taken_at_us + round(took_s * S),
        duration_us=round(took_s * S),
        bytes_pushed=sent,
        root=bytes(32),
        disks=(),
    )


# The target


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"dr_host": "dr", "push_interval": "300"}, 600),
        ({"dr_host": "dr", "push_interval": "300", "rpo_target": "420"}, 420),
        ({}, None),
        ({"rpo_target": "900"}, 900),
    ],
)
def test_a_source_has_a_target_and_a_receiver_only_if_it_is_given(
    values: dict[str, str], expected: int | None
) -> None:
    assert rpo.target_s(check(values)) == expected


# The forecast


def after(points: Sequence[Point], seconds: float) -> int:
    return points[-1].taken_at_us + round(seconds * S)


def test_steady_cycles_go_on_as_they_are() -> None:
    points = [point(n, 300 * n, took_s=20, sent=20_000) for n in range(1, 6)]
    assert rpo.forecast_s(points, 300, after(points, 10)) == pytest.approx(320)
    # Where the interval is not known, it is what it was.
    assert rpo.forecast_s(points, None, after(points, 10)) == pytest.approx(320)
    # In any order.
    assert rpo.forecast_s(points[::-1], 300, after(points, 10)) == pytest.approx(320)


def test_a_cycle_that_is_late_is_at_least_as_old_as_it_is() -> None:
    points = [point(n, 300 * n, took_s=20, sent=20_000) for n in range(1, 6)]
    assert rpo.forecast_s(points, 300, after(points, 4000)) == 4000


def test_what_changes_while_a_long_push_goes_on_is_sent_by_the_next() -> None:
    """100 bytes a second change, and 1000 are sent: after a push of 600 s the next begins at once, with twice as much."""
    steady = [point(n, 300 * n, took_s=30, sent=30_000) for n in range(1, 20)]
    points = [*steady, point(20, 300 * 20, took_s=600, sent=30_000)]
    found = rpo.forecast_s(points, 300, after(points, 600))
    assert found is not None
    # Slower transfers are taken to last: 600 s until the snapshot, and the push of what 600 s have changed.
    assert 600 + 60 < found < 600 + 1200


def test_the_last_cycles_count_most() -> None:
    slow = [point(n, 300 * n, took_s=200, sent=1000) for n in range(1, 10)]
    fast = [point(n, 300 * n, took_s=10, sent=1000) for n in range(10, 20)]
    towards = rpo.forecast_s([*slow, *fast], 300, after(fast, 0))
    assert towards is not None
    assert 310 < towards < 320
    away = rpo.forecast_s(
        [
            *fast,
            *[point(n + 11, p.taken_at_us / S - T0 / S + 6000, 200) for n, p in enumerate(slow, 9)],
        ],
        300,
        after(fast, 0),
    )
    assert away is not None
    assert 480 < away < 500


def test_no_cycle_tells_nothing() -> None:
    seed = point(1, 0, took_s=10_000, sent=10**12, kind=PushKind.SEED)
    assert rpo.forecast_s([], 300, T0) is None
    assert rpo.forecast_s([seed], 300, T0) is None
    assert rpo.forecast_s([point(2, 300)], 300, T0) is None
    # A clock that was set back makes no gap to count with.
    assert rpo.forecast_s([point(1, 600), point(2, 300)], 300, T0) is None
    # What a seed took says nothing of cycles.
    both = [seed, point(2, 20_000, took_s=5, sent=100)]
    assert rpo.forecast_s(both, 300, after(both, 0)) == pytest.approx(300 + 5 * 300 / 20_000)


_POINTS = st.lists(
    st.tuples(st.floats(1, 10**5), st.floats(0, 10**5), st.integers(0, 2**50)),
    min_size=2,
    max_size=8,
)


@given(_POINTS, st.one_of(st.none(), st.integers(1, 10**6)), st.floats(0, 10**6))
def test_a_forecast_is_never_less_than_the_age_nor_than_the_interval(
    steps: list[tuple[float, float, int]], interval_s: int | None, age_s: float
) -> None:
    at, points = 0.0, []
    for number, (gap_s, took_s, sent) in enumerate(steps, 1):
        at += gap_s
        points.append(point(number, at, took_s, sent))
    found = rpo.forecast_s(points, interval_s, after(points, age_s))
    assert found is not None
    assert found >= max(age_s, interval_s or 0, steps[-1][1]) - 1e-5


# The breach


def protected(*points: Point, role: str = "source") -> ProtectedVm:
    vm = ProtectedVm.register(VM, "web", role)
    for each in points:
        vm.commit(each)
    vm.collect_events()
    return vm


def test_a_breach_is_recorded_once_and_ended_by_a_point_that_is_young_enough() -> None:
    vm = protected(point(1, 0, kind=PushKind.SEED))
    vm.breach_rpo(600, T0 + 600 * S)
    assert not vm.pending_events
    vm.breach_rpo(600, T0 + 600 * S + 1)
    assert vm.breach == RpoBreach(1, 600, 600, T0 + 600 * S)
    vm.breach_rpo(600, T0 + 5000 * S)
    vm.breach_rpo(300, T0 + 5000 * S)
    event: Any
    (event,) = vm.collect_events()
    assert event_info(event)["breach"] == {
        "point": 1, "age_s": 600, "target_s": 600, "began_at": "2023-11-14T22:23:20.000Z",
    }  # fmt: skip
    assert warnings(vm) == [
        "the newest recovery point is older than rpo_target (600 s) since 2023-11-14T22:23:20.000Z"
    ]
    # This one was too old when it came.
    vm.commit(point(2, 6000, took_s=601))
    assert vm.breach is not None
    assert vm.breach_due_us(600) is None
    vm.commit(point(3, 7000, took_s=600))
    assert warnings(vm) == []
    assert vm.breach_due_us(600) == T0 + 7600 * S


def test_a_source_whose_clock_is_ahead_hides_no_breach_on_the_receiver() -> None:
    """Its points are from tomorrow; that none comes any more is known from when the last one came."""
    ahead = msgspec.structs.replace(
        point(1, 0, kind=PushKind.SEED), taken_at_us=T0 + 90_000 * S, committed_at_us=T0 + 5 * S
    )
    for role, due_us in (("receiver", T0 + 605 * S), ("source", T0 + 90_600 * S)):
        vm = protected(ahead, role=role)
        assert vm.breach_due_us(600) == due_us
        vm.breach_rpo(600, due_us + 1)
        assert vm.breach is not None
        assert vm.breach.age_s == 600
    assert vm_status(protected(ahead, role="receiver"), T0 + 65 * S)["rpo_age_s"] == 60


def test_a_vm_that_is_not_pushed_is_not_in_breach() -> None:
    vm = protected()
    vm.breach_rpo(1, T0 + 10**9 * S)
    vm = protected(point(1, 0, kind=PushKind.SEED), role="receiver")
    vm.start_promotion(1)
    vm.finish_promotion()
    vm.breach_rpo(1, T0 + 10**9 * S)
    assert vm.breach is None


@asynccontextmanager
async def logged(folder: Path, *points: Point) -> AsyncIterator[EventLog]:
    """A log with one VM; what is in it stays from call to call."""
    async with open_log(folder / "events") as log:
        await log.register(VM, "web", "receiver")
        for each in points:
            async with log.change(VM) as vm:
                vm.commit(each)
        yield log


async def breaches(log: EventLog) -> int:
    events = await log.history(VM)
    return sum(isinstance(event, ProtectedVm.RpoBreached) for event in events)


class Wall:
    """A wall clock that a test sets."""

    def __init__(self, at_s: float) -> None:
        self.at_s = at_s

    def __call__(self) -> int:
        return T0 + round(self.at_s * S)


@asynccontextmanager
async def watched(log: EventLog, wall: Callable[[], int]) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rpo.watch, log, 600, wall)
        yield
        nursery.cancel_scope.cancel()


async def changed(log: EventLog) -> None:
    with trio.fail_after(HANG_S):
        await log.wait_change()


async def test_the_watch_records_a_breach_once_also_over_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, rpo.__name__)
    wall = Wall(601)
    async with logged(tmp_path, point(1, 0, kind=PushKind.SEED)) as log:
        async with watched(log, wall):
            await changed(log)
        assert await breaches(log) == 1
        assert caplog.messages == [
            "web: recovery point 1 is 601 s old and there is no newer one: rpo_target is 600 s"
        ]
    caplog.clear()
    wall.at_s = 2000
    async with logged(tmp_path) as log:
        async with watched(log, wall):
            await trio.testing.wait_all_tasks_blocked()
            async with log.change(VM) as vm:
                vm.commit(point(2, 1999))
            await trio.testing.wait_all_tasks_blocked()
            assert caplog.messages == ["web: the newest recovery point is within rpo_target again"]
            assert await breaches(log) == 1
            wall.at_s = 3000
            async with log.change(VM) as vm:
                vm.point_verified(2, 1)
            await changed(log)
        assert await breaches(log) == 2


async def test_the_watch_wakes_up_when_a_point_comes_of_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And looks at the wall clock now and then, which may have been set."""
    slept: list[float] = []
    wall = Wall(0)

    def note(seconds: float) -> trio.CancelScope:
        slept.append(seconds)
        wall.at_s += seconds
        return trio.move_on_after(0)

    async with logged(tmp_path, point(1, 0, kind=PushKind.SEED)) as log:
        monkeypatch.setattr("replicator.push.rpo.trio", SimpleNamespace(move_on_after=note))
        async with watched(log, wall):
            await changed(log)
        monkeypatch.undo()
        assert await breaches(log) == 1
    assert slept[:10] == [60] * 10
    assert wall.at_s - sum(slept[11:]) == pytest.approx(600, abs=1e-5)


async def test_a_breach_that_cannot_be_recorded_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    naps = 0

    async def nap(_: float) -> None:
        nonlocal naps
        naps += 1
        monkeypatch.setattr(EventLog, "_save", save)
        await trio.lowlevel.checkpoint()

    async def full(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise OperationalError("No space left on device")

    async with logged(tmp_path, point(1, 0, kind=PushKind.SEED)) as log:
        save = EventLog._save
        monkeypatch.setattr(EventLog, "_save", full)
        clock = SimpleNamespace(sleep=nap, move_on_after=trio.move_on_after)
        monkeypatch.setattr("replicator.push.rpo.trio", clock)
        async with watched(log, Wall(601)):
            await changed(log)
        monkeypatch.undo()
        assert (naps, await breaches(log)) == (1, 1)
    assert "cannot be recorded: No space left on device" in caplog.text


async def test_the_last_points_come_from_the_history(tmp_path: Path) -> None:
    points = [point(1, 0, kind=PushKind.SEED), point(2, 300), point(3, 600)]
    async with logged(tmp_path, *points) as log:
        vm = log.get(VM)
        assert vm is not None
        assert await rpo.recent_points(log, vm) == points
