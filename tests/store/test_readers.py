# SPDX-License-Identifier: AGPL-3.0-or-later
"""A point that is being read stays what it was while later points are committed, applied and let go of.

Every step is waited for by an event: a read is stopped inside the replica, an apply before it writes.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from receiver.store import apply
from receiver.store.verify import verify_point
from receiver.store.view import Gate, PointView, Replica
from receiver.store.vm_store import VmStore
from replicator.domain.model import PushKind
from replicator.errors import RefusedError
from tests.limits import HANG_S
from tests.receiver.store_lab import open_store

GRAIN = 4096
GRAINS = 40


class Disk:
    """A disk that changes in a fixed course."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.content = self._random.randbytes(GRAINS * GRAIN - 100)

    def change(self) -> bytes:
        changed = bytearray(self.content)
        for _ in range(6):
            at = self._random.randrange(GRAINS - 1) * GRAIN
            fresh = self._random.choice((bytes(GRAIN), self._random.randbytes(GRAIN)))
            changed[at : at + GRAIN] = fresh
        self.content = bytes(changed)
        return self.content


@asynccontextmanager
async def view_of(store: VmStore, number: int) -> AsyncIterator[PointView]:
    async with store.hold(number) as point, store.open_disk(point, point.disks[0]) as view:
        yield view


def pieces(size: int, count: int) -> Iterator[tuple[int, int]]:
    step = -(-size // count)
    for at in range(0, size, step):
        yield at, min(step, size - at)


@pytest.mark.parametrize("apply_at_once", [True, False])
async def test_a_slow_reader_reads_one_moment(tmp_path: Path, apply_at_once: bool) -> None:
    """One piece is read between any two cycles, of a point taken at every age; retention waits for each."""
    disk = Disk(1)
    async with (
        open_store(tmp_path, keep=2, apply=apply_at_once) as fixture,
        AsyncExitStack() as stack,
    ):
        readers: list[tuple[int, PointView, bytes, Iterator[tuple[int, int]]]] = []
        for number in range(1, 13):
            await fixture.push({"disk-0": disk.change() if number > 1 else disk.content})
            if number <= 6:  # of the point just committed, applied or not yet
                view = await stack.enter_async_context(view_of(fixture.store, number))
                readers.append((number, view, disk.content, pieces(view.size, 9)))
            if number % 2:
                await fixture.settle()
            for reading, view, content, left in readers:
                for at, length in [piece for piece in [next(left, None)] if piece]:
                    found = await view.read(at, length)
                    assert found == content[at : at + length], f"point {reading} at {number}"
        await fixture.settle()
        assert list(fixture.store.vm.points) == list(range(1, 13))
        for number, view, content, _ in readers:
            assert await view.read(0, view.size) == content, f"point {number}"
            assert (await verify_point(fixture.store, number)).good
        await stack.aclose()
        await fixture.settle()
        assert list(fixture.store.vm.points) == [11, 12]
        with pytest.raises(RefusedError, match=r"no recovery point 1 \(kept: 11, 12\)"):
            async with fixture.store.hold(1):
                raise AssertionError
        await fixture.check_point(11)
        await fixture.check_point(12)


class Stop:
    """A place in a worker thread where it waits to be let go on."""

    def __init__(self) -> None:
        self.reached = trio.Event()
        self._go_on = trio.Event()

    def here(self) -> None:
        """Called in the worker thread."""
        trio.from_thread.run_sync(self.reached.set)
        trio.from_thread.run(self._go_on.wait)

    def go_on(self) -> None:
        self._go_on.set()


@contextmanager
def stopped_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stop]:
    """The next read of a replica stops before it reads."""
    stop, real = Stop(), Replica.read
    armed = [True]

    def read(self: Replica, offset: int, length: int) -> bytes:
        if armed and armed.pop():
            stop.here()
        return real(self, offset, length)

    with monkeypatch.context() as patch:
        patch.setattr(Replica, "read", read)
        yield stop


@contextmanager
def stopped_write(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stop]:
    """The next apply stops when the reverse delta is there and nothing has been written."""
    stop, real = Stop(), apply.write_replica
    armed = [True]

    def write_replica(*args: object) -> int:
        if armed and armed.pop():
            stop.here()
        return real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(apply, "write_replica", write_replica)
        yield stop


def watch_idle(gate: Gate) -> trio.Event:
    """Set when somebody waits for the reads under way to end."""
    waited_for, real = trio.Event(), gate._idle

    class Watched:
        set = real.set

        async def wait(self) -> None:
            waited_for.set()
            await real.wait()

    gate._idle = Watched()  # type: ignore[assignment]
    return waited_for


async def test_an_apply_waits_for_the_read_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(2)
    before = disk.content
    async with open_store(tmp_path) as fixture:
        await fixture.push({"disk-0": before})
        await fixture.settle()
        async with view_of(fixture.store, 1) as view, trio.open_nursery() as nursery:
            found: list[bytes] = []

            async def read() -> None:
                found.append(await view.read(0, view.size))

            with stopped_read(monkeypatch) as stop:
                nursery.start_soon(read)
                await stop.reached.wait()
                apply_waits = watch_idle(fixture.store._gate)
                # The reverse delta is built from the replica too, but only the first read was stopped.
                await fixture.push({"disk-0": disk.change()})
                with trio.fail_after(HANG_S):
                    await apply_waits.wait()
                assert fixture.store.paths.reverse(1, fixture.store.vm.points[1].disks[0]).exists()
                assert (
                    fixture.store.paths.replica(fixture.store.vm.points[1].disks[0]).read_bytes()
                    == before
                )
                stop.go_on()
            await fixture.settle()
            assert fixture.store.vm.applied == 2
            assert found == [before]
            assert await view.read(0, view.size) == before
        await fixture.check_point(2)


@pytest.mark.parametrize("apply_first", [True, False])
async def test_views_opened_while_an_apply_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apply_first: bool
) -> None:
    """Before, in the middle of and after an apply, of the point that is overwritten, of one below and of the new one."""
    disk = Disk(3)
    async with open_store(tmp_path) as fixture, AsyncExitStack() as stack:
        contents: dict[int, bytes] = {}
        views: list[tuple[int, PointView]] = []

        async def open_all() -> None:
            for number in contents:
                view = await stack.enter_async_context(view_of(fixture.store, number))
                views.append((number, view))

        async def read_all() -> None:
            for number, view in views:
                assert await view.read(0, view.size) == contents[number], f"point {number}"
                assert (await view.digest(0, 4 * GRAIN))[1] == []

        for number in (1, 2, 3):
            contents[number] = disk.change()
            await fixture.push({"disk-0": contents[number]})
        if apply_first:
            await fixture.settle()
        with stopped_write(monkeypatch) as stop:
            contents[4] = disk.change()
            await fixture.push({"disk-0": contents[4]})
            await open_all()  # some with forward deltas, if nothing is applied yet
            await stop.reached.wait()
            await open_all()
            await read_all()
            # Commits go on while an apply stands still.
            contents[5] = disk.change()
            with trio.fail_after(HANG_S):
                await fixture.push({"disk-0": contents[5]})
            await read_all()
            stop.go_on()
        await fixture.settle()
        assert fixture.store.vm.applied == 5
        await open_all()
        await read_all()
        contents[6] = disk.change()
        await fixture.push({"disk-0": contents[6]})
        await fixture.settle()
        await read_all()
        for number in contents:
            await fixture.check_point(number)


async def test_a_view_of_forward_deltas_outlives_their_files(tmp_path: Path) -> None:
    """The deltas that a view stands on are applied and unlinked under it, then overwritten in the replica."""
    disk = Disk(4)
    contents = {1: disk.content}
    async with open_store(tmp_path, apply=False) as fixture:
        await fixture.push({"disk-0": contents[1]})
        for number in (2, 3):
            contents[number] = disk.change()
            await fixture.push({"disk-0": contents[number]})
        await fixture.settle()
        expected = fixture.expected
    async with open_store(tmp_path, apply=False, expected=expected) as fixture:
        await fixture.settle()
        assert fixture.store.vm.applied == 1
    async with (
        open_store(tmp_path, keep=9, apply=True, expected=expected) as fixture,
        view_of(fixture.store, 3) as view,
        view_of(fixture.store, 2) as older,
    ):
        await fixture.settle()
        assert not fixture.store.paths.forward(3, fixture.store.vm.points[3].disks[0]).exists()
        contents[4] = disk.change()
        await fixture.push({"disk-0": contents[4]})
        await fixture.settle()
        assert await view.read(0, view.size) == contents[3]
        assert await older.read(0, older.size) == contents[2]


async def test_a_seed_leaves_readers_of_the_old_chain_alone(tmp_path: Path) -> None:
    disk = Disk(5)
    async with open_store(tmp_path, keep=2) as fixture:
        await fixture.push({"disk-0": disk.content})
        await fixture.settle()
        async with view_of(fixture.store, 1) as view:
            for kind in (PushKind.SEED, PushKind.CYCLE, PushKind.SEED):
                await fixture.push({"disk-0": disk.change()}, kind=kind)
                await fixture.settle()
            assert await view.read(0, view.size) == Disk(5).content
            assert sorted(fixture.store.vm.points) == [1, 2, 3, 4]
        await fixture.settle()
        assert sorted(fixture.store.vm.points) == [3, 4]
        replicas = sorted(path.name for path in (fixture.store.paths.root / "replica").iterdir())
        assert replicas == ["disk-0@2.map", "disk-0@2.raw", "disk-0@4.map", "disk-0@4.raw"]


async def test_a_point_that_is_being_let_go_of_cannot_be_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the decision and its record there is a wait; a reader that comes in it would lose its files."""
    disk = Disk(6)
    refused: list[str] = []
    async with open_store(tmp_path, keep=1) as fixture:
        store = fixture.store
        real = store._log._save

        async def save(vm: object) -> None:
            if store._leaving:
                try:
                    async with store.hold(1):
                        raise AssertionError("a point that goes was held")
                except RefusedError as error:
                    refused.append(str(error))
            await real(vm)  # type: ignore[arg-type]

        monkeypatch.setattr(store._log, "_save", save)
        await fixture.push({"disk-0": disk.content})
        await fixture.push({"disk-0": disk.change()})
        await fixture.settle()
        assert refused == ["recovery point 1 is being let go of"]
        assert list(store.vm.points) == [2]
