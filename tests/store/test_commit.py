# SPDX-License-Identifier: AGPL-3.0-or-later
"""The steps around a commit: what is refused, what a failed save leaves, and that nothing follows from what is not durable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from eventsourcing.persistence import OperationalError

from receiver.store.admission import PushRefusedHereError
from tests.receiver.store_lab import StoreFixture, open_store
from tests.saving import intercept

GRAIN = 4096
ONE = b"one" * 4 * GRAIN
TWO = b"two" + ONE[3:]


def listing(fixture: StoreFixture) -> list[tuple[str, int]]:
    root = fixture.store.paths.root
    return sorted((str(p.relative_to(root)), p.stat().st_size) for p in root.rglob("*"))


async def test_a_shrink_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async with open_store(tmp_path) as fixture:
        await fixture.push({"disk-0": ONE})
        await fixture.settle()
        before = (listing(fixture), fixture.store.vm)
        push = fixture.prepare({"disk-0": ONE[:-GRAIN]})
        with pytest.raises(
            PushRefusedHereError, match="disk-0 shrank from 49152 to 45056"
        ) as error:
            await fixture.land(push)
        assert error.value.code == "shrink"
        assert (listing(fixture), fixture.store.vm) == before
        assert await fixture.store.unfinished() is None
        await fixture.push({"disk-0": TWO})


@pytest.mark.parametrize("saved", [False, True])
async def test_a_commit_whose_save_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bool
) -> None:
    """The error does not say whether the event is in the log. Either way the push can be finished, and nothing is lost."""
    async with open_store(tmp_path) as fixture:
        store = fixture.store
        await fixture.push({"disk-0": ONE})
        await fixture.settle()
        push = fixture.prepare({"disk-0": TWO})
        landing = await fixture.land(push)

        def save(commit: Callable[[], list[Any]]) -> list[Any]:
            if saved:
                commit()
            raise OperationalError("the disk has gone")

        with monkeypatch.context() as patch:
            intercept(patch, save)
            with pytest.raises(OperationalError):
                await fixture.commit(push, landing)
        assert store.paths.partial(2).is_dir() != saved
        assert list(store.vm.points) == ([1, 2] if saved else [1])
        await fixture.check_point(1)
        if not saved:
            await fixture.commit(push, await fixture.land(push))
            await fixture.settle()
        await fixture.check_point(2)
        expected = fixture.expected
    async with open_store(tmp_path, expected=expected) as fixture:
        await fixture.settle()
        assert await fixture.store.unfinished() is None
        await fixture.push({"disk-0": ONE})
        await fixture.settle()
        for number in (1, 2, 3):
            await fixture.check_point(number)
        assert fixture.store.vm.damages == []


async def test_nothing_is_applied_before_its_commit_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task that applies is awake while a commit is being saved: it must not see the point yet."""
    async with open_store(tmp_path) as fixture:
        store = fixture.store
        await fixture.push({"disk-0": ONE})
        await fixture.settle()
        saving, go_on = trio.Event(), trio.Event()

        def save(commit: Callable[[], list[Any]]) -> list[Any]:
            trio.from_thread.run_sync(saving.set)
            trio.from_thread.run(go_on.wait)
            return commit()

        push = fixture.prepare({"disk-0": TWO})
        landing = await fixture.land(push)
        async with trio.open_nursery() as nursery:
            with monkeypatch.context() as patch:
                intercept(patch, save)
                nursery.start_soon(fixture.commit, push, landing)
                await saving.wait()
            store.wake()
            await trio.testing.wait_all_tasks_blocked()
            assert list(store.vm.points) == [1]
            assert not store.paths.reverse(1, store.vm.points[1].disks[0]).exists()
            assert store.paths.replica(store.vm.points[1].disks[0]).read_bytes() == ONE
            go_on.set()
        await fixture.settle()
        assert store.vm.applied == 2
        await fixture.check_point(1)
        await fixture.check_point(2)


async def test_a_wake_leaves_who_waits_already_with_the_event_that_is_set(tmp_path: Path) -> None:
    async with open_store(tmp_path) as fixture:
        await fixture.push({"disk-0": ONE})
        await fixture.settle()
        fixture.store.wake()
        waited_for = fixture.store.settled
        assert not waited_for.is_set()
        fixture.store.wake()
        await fixture.settle()
        assert waited_for.is_set()


async def test_a_delta_that_was_applied_is_swept_at_start(tmp_path: Path) -> None:
    """The crash came between the record of the apply and the unlink."""
    async with open_store(tmp_path) as fixture:
        await fixture.push({"disk-0": ONE})
        await fixture.settle()
        left = fixture.store.paths.forward(1, fixture.store.vm.points[1].disks[0])
        expected = fixture.expected
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"left behind")
    async with open_store(tmp_path, expected=expected) as fixture:
        assert not left.exists()
        await fixture.check_point(1)


async def test_one_vm_that_cannot_be_made_does_not_block_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder could not be made after it had been registered: the next seed takes it up."""
    async with open_store(tmp_path) as fixture:
        push = fixture.prepare({"disk-0": ONE})
        monkeypatch.setattr(fixture.stores, "_stores", {})
        store = await fixture.stores.for_push(fixture.store.uuid, push.opened)
        assert store.uuid == fixture.store.uuid
