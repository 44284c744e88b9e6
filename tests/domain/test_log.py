# SPDX-License-Identifier: AGPL-3.0-or-later
"""The log and memory: nobody sees a change before it is durable, and a change that fails leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from eventsourcing.persistence import OperationalError

from replicator.domain.model import Damage, PushKind
from replicator.domain.vm import DAMAGES_MAX, ProtectedVm
from replicator.errors import RefusedError
from replicator.log import EventLog, open_log
from tests.domain.samples import VM, point
from tests.limits import HANG_S
from tests.saving import intercept


def state(vm: ProtectedVm | None) -> dict[str, Any]:
    assert vm is not None
    return {name: value for name, value in vars(vm).items() if name != "_pending_events"}


async def seeded(log: EventLog) -> None:
    await log.register(VM, "web", "receiver")
    async with log.change(VM) as vm:
        vm.commit(point(1, PushKind.SEED))


async def commit_and_apply(log: EventLog) -> None:
    async with log.change(VM) as vm:
        vm.commit(point(2, PushKind.CYCLE, parent=1))
        vm.delta_applied(1)


async def apply_and_end_test(log: EventLog) -> None:
    async with log.change(VM) as vm:
        vm.delta_applied(1)
        vm.end_test()


async def test_nobody_sees_a_change_before_it_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    async with open_log(tmp_path) as log:
        await seeded(log)
        before = log.get(VM)
        assert before is not None

        def save(commit: Callable[[], list[Any]]) -> list[Any]:
            done = commit()
            seen.append(state(log.get(VM)))
            return done

        intercept(monkeypatch, save)
        async with log.change(VM) as vm:
            vm.commit(point(2, PushKind.CYCLE, parent=1))
            vm.delta_applied(1)
            vm.damaged(Damage(1, "disk-0", 0, 1, "f", "r"))
            vm.point_verified(2, 5)
            assert state(log.get(VM)) == state(before)
        assert seen == [state(before)]
        assert list(before.points) == [1]
        after = log.get(VM)
        assert after is not None
        assert list(after.points) == [1, 2]
        async with open_log(tmp_path) as again:
            assert state(again.get(VM)) == state(after)


@pytest.mark.parametrize("saved", [False, True])
async def test_a_save_that_fails_leaves_memory_equal_to_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bool
) -> None:
    """Also where the error came after the events had been stored: an error does not say which."""
    async with open_log(tmp_path) as log:
        await seeded(log)

        def save(commit: Callable[[], list[Any]]) -> list[Any]:
            if saved:
                commit()
            raise OperationalError("no room")

        with monkeypatch.context() as patch:
            intercept(patch, save)
            with pytest.raises(OperationalError, match="no room"):
                await commit_and_apply(log)
        found = log.get(VM)
        assert found is not None
        assert (list(found.points), found.applied) == (([1, 2], 1) if saved else ([1], 0))
        # And it goes on from there.
        number = 3 if saved else 2
        async with log.change(VM) as vm:
            vm.commit(point(number, PushKind.CYCLE, parent=number - 1))
        memory = state(log.get(VM))
    async with open_log(tmp_path) as log:
        assert state(log.get(VM)) == memory


async def test_an_error_inside_a_change_leaves_nothing_pending(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        await seeded(log)
        before = state(log.get(VM))
        with pytest.raises(RefusedError, match="no test clone is running"):
            await apply_and_end_test(log)
        assert state(log.get(VM)) == before
        async with log.change(VM) as vm:
            vm.release([1])
        kinds = [type(event).__name__ for event in await log.history(VM)]
        assert kinds == ["Registered", "SeedCommitted", "PointsReleased"]


async def test_a_cancelled_change_leaves_nothing_pending(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        await seeded(log)
        before = state(log.get(VM))
        with trio.CancelScope() as scope:
            async with log.change(VM) as vm:
                vm.delta_applied(1)
                scope.cancel()
                await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        assert state(log.get(VM)) == before
        async with log.change(VM) as vm:
            assert not vm.pending_events
        assert len(await log.history(VM)) == 2


async def test_changes_of_one_vm_come_one_after_the_other(tmp_path: Path) -> None:
    """Each sees what the one before has saved; changes of another VM do not wait."""
    other = point(1, PushKind.SEED)
    async with open_log(tmp_path) as log, trio.open_nursery() as nursery:
        await seeded(log)
        inside = 0

        async def grow() -> None:
            nonlocal inside
            async with log.change(VM) as vm:
                inside += 1
                assert inside == 1
                newest = vm.newest
                assert newest is not None
                await trio.testing.wait_all_tasks_blocked()
                vm.commit(point(newest.number + 1, PushKind.CYCLE, parent=newest.number))
                inside -= 1

        async with trio.open_nursery() as changes:
            for _ in range(5):
                changes.start_soon(grow)
        vm = log.get(VM)
        assert vm is not None
        assert list(vm.points) == [1, 2, 3, 4, 5, 6]
        second = VM.__class__(int=1)
        await log.register(second, "db", "receiver")
        async with log.change(VM) as held:
            held.delta_applied(1)
            with trio.fail_after(HANG_S):
                async with log.change(second) as free:
                    free.commit(other)
        nursery.cancel_scope.cancel()


async def test_who_waits_for_a_change_is_told_when_it_is_durable(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log, trio.open_nursery() as nursery:
        await seeded(log)
        told: list[int] = []

        async def wait() -> None:
            await log.wait_change()
            vm = log.get(VM)
            assert vm is not None
            told.append(vm.applied)

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        async with log.change(VM):
            pass  # nothing changed: nobody is told
        await trio.testing.wait_all_tasks_blocked()
        assert told == []
        async with log.change(VM) as vm:
            vm.delta_applied(1)
        await trio.testing.wait_all_tasks_blocked()
        assert told == [1]


async def test_one_bad_point_hides_no_other(tmp_path: Path) -> None:
    """Damages are bounded for each point: neither memory nor the log grows, and the next point's are recorded."""
    async with open_log(tmp_path) as log:
        await seeded(log)
        async with log.change(VM) as vm:
            for offset in range(DAMAGES_MAX + 5):
                vm.damaged(Damage(1, "disk-0", offset, 1, "f", "r"))
            vm.damaged(Damage(2, "disk-0", 0, 1, "f", "r"))
            vm.damaged(Damage(2, "disk-0", 0, 1, "f", "r"))
        found = log.get(VM)
        assert found is not None
        assert [d.point for d in found.damages] == [1] * DAMAGES_MAX + [2]
        assert found.version == 2 + DAMAGES_MAX + 1


async def test_find_names_what_there_is(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        with pytest.raises(RefusedError, match=r"no VM 'web' here \(known: none\)"):
            log.find("web")
        await seeded(log)
        assert log.find("web") is log.find(str(VM)) is log.get(VM)
        with pytest.raises(RefusedError, match=r"no VM 'db' here \(known: web\)"):
            log.find("db")
        with pytest.raises(RefusedError, match=r"no recovery point 7 \(kept: 1\)"):
            log.find("web").get_point(7)
