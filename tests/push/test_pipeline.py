# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a push looks at covers every change, and what it makes of it comes in order, bounded, and ends cleanly."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path
from uuid import UUID

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.disk import Extent
from replicator.imagemap import ImageMap
from replicator.phcbt import Algorithm, GrainRun, StreamHeader
from replicator.push import pipeline
from replicator.push.pipeline import chunks, chunks_to_compare, ordered

GRAIN = 4096
CHUNK = 4 * GRAIN


class ListView:
    """A view that knows where its data is and nothing else."""

    def __init__(self, size: int, extents: list[Extent]) -> None:
        self._size = size
        self._extents = extents
        self.asked: list[str | None] = []

    @property
    def size(self) -> int:
        return self._size

    async def extents(self, since: str | None = None) -> AsyncGenerator[Extent, None]:
        self.asked.append(since)
        for extent in self._extents:
            await trio.lowlevel.checkpoint()
            yield extent

    async def read(self, offset: int, length: int) -> bytes:
        raise AssertionError(f"{length} bytes at {offset}: extents are enough")


def header(size: int) -> StreamHeader:
    return StreamHeader(
        algorithm=Algorithm.XXH3_128,
        grain=GRAIN,
        chunk=CHUNK,
        disk_size=size,
        vm=UUID(int=1),
        base_point=1,
        target_point=2,
        base_root=bytes(32),
        disk_id="disk-0",
    )


@st.composite
def disks(draw: st.DrawFn) -> tuple[int, list[Extent]]:
    """A size and ascending, disjoint extents inside it, at any byte."""
    size = draw(st.integers(1, 20 * GRAIN))
    edges = sorted(draw(st.sets(st.integers(0, size), max_size=16)))
    pairs = list(zip(edges[::2], edges[1::2], strict=False))
    return size, [Extent(a, b - a, draw(st.booleans())) for a, b in pairs]


def check_cut(found: list[Extent], size: int, start: int) -> None:
    """Ascending, disjoint, inside the disk and the chunks, whole grains, nothing before the start."""
    at = start
    for extent in found:
        assert extent.offset >= at
        assert extent.end <= size
        assert extent.offset % GRAIN == 0
        assert extent.end % GRAIN == 0 or extent.end == size
        assert extent.offset // CHUNK == (extent.end - 1) // CHUNK
        at = extent.end


def grains(extents: list[Extent], start: int) -> set[int]:
    return {
        grain
        for extent in extents
        for grain in range(extent.offset // GRAIN, (extent.end - 1) // GRAIN + 1)
        if grain >= start // GRAIN
    }


@pytest.mark.parametrize("batch", [1, 2, 1024])
def test_chunks_cover_every_change(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_BATCH", batch)

    @given(disks(), st.integers(0, 20))
    def check(disk: tuple[int, list[Extent]], start_grain: int) -> None:
        size, extents = disk
        start = min(start_grain * GRAIN, size // GRAIN * GRAIN)
        view = ListView(size, extents)

        async def collect() -> list[Extent]:
            return [extent async for extent in chunks(view, header(size), "ref", start)]

        found = trio.run(collect)
        assert view.asked == ["ref"]
        check_cut(found, size, start)
        assert grains(found, start) == grains(extents, start)
        # What is called zero is zero all over: no byte of it is in an extent with data.
        data = [e for e in extents if not e.zero]
        zeros = [e for e in extents if e.zero]
        for extent in found:
            if extent.zero:
                assert not any(d.offset < extent.end and extent.offset < d.end for d in data)
                covered = sum(
                    max(0, min(z.end, extent.end) - max(z.offset, extent.offset)) for z in zeros
                )
                assert covered == extent.length

    check()


@given(disks(), st.sets(st.integers(0, 19)), st.integers(0, 20))
@settings(max_examples=40)
def test_a_comparison_looks_wherever_either_side_holds_anything(
    disk: tuple[int, list[Extent]], recorded: set[int], start_grain: int
) -> None:
    size, extents = disk
    count = -(-size // GRAIN)
    known_grains = {grain for grain in recorded if grain < count}
    start = min(start_grain * GRAIN, size // GRAIN * GRAIN)

    async def collect(known: ImageMap) -> list[Extent]:
        view = ListView(size, extents)
        wanted = chunks_to_compare(view, header(size), known, start)
        found = [extent async for extent in wanted]
        assert view.asked == [None]
        return found

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "disk.map"
        with ImageMap.create(path, Algorithm.XXH3_128, GRAIN, size, 0) as known:
            runs = [GrainRun(grain, 1, b"d" * 16) for grain in sorted(known_grains)]
            known.apply(runs, size, 1)
            found = trio.run(collect, known)
    check_cut(found, size, start)
    assert len({extent.offset // CHUNK for extent in found}) == len(found)
    assert not any(extent.zero for extent in found)
    needed = grains(extents, start) | {g for g in known_grains if g >= start // GRAIN}
    assert grains(found, start) >= needed
    # Nothing beyond what is asked for in a chunk: first and last grain of each are needed.
    for extent in found:
        assert {extent.offset // GRAIN, (extent.end - 1) // GRAIN} <= needed


def test_a_disk_that_grew_past_its_map_is_compared_to_its_end(tmp_path: Path) -> None:
    size = 10 * GRAIN + 5

    async def collect(known: ImageMap) -> list[Extent]:
        view = ListView(size, [Extent(0, 10), Extent(9 * GRAIN, GRAIN + 5)])
        return [e async for e in chunks_to_compare(view, header(size), known, 0)]

    with ImageMap.create(tmp_path / "m", Algorithm.XXH3_128, GRAIN, 3 * GRAIN, 0) as known:
        known.apply([GrainRun(2, 1, b"d" * 16)], 3 * GRAIN, 1)
        assert trio.run(collect, known) == [Extent(0, 3 * GRAIN), Extent(9 * GRAIN, GRAIN + 5)]


async def numbers(count: int) -> AsyncGenerator[int, None]:
    for number in range(count):
        await trio.lowlevel.checkpoint()
        yield number


class Work:
    """Work that ends when the test says so, and counts how much of it is under way."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.cancelled: list[int] = []
        self.done = [trio.Event() for _ in range(50)]

    async def __call__(self, item: int) -> int:
        self.started.append(item)
        try:
            await self.done[item].wait()
        except trio.Cancelled:
            self.cancelled.append(item)
            raise
        return item * 10


async def test_results_come_in_order_however_the_work_ends() -> None:
    work, found = Work(), list[int]()

    async def read() -> None:
        async with ordered(numbers(5), work, 5) as results:
            async for result in results:
                found.append(result)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        for item in (4, 2, 1):
            work.done[item].set()
        await trio.testing.wait_all_tasks_blocked()
        assert found == []
        work.done[0].set()
        await trio.testing.wait_all_tasks_blocked()
        assert found == [0, 10, 20]
        work.done[3].set()
    assert found == [0, 10, 20, 30, 40]


async def test_no_more_is_under_way_than_asked_for() -> None:
    """Counted from the start of the work until its result is taken: results that wait are memory too."""
    work = Work()
    async with ordered(numbers(20), work, 3) as results:
        await trio.testing.wait_all_tasks_blocked()
        assert work.started == [0, 1, 2]
        for event in work.done:
            event.set()
        await trio.testing.wait_all_tasks_blocked()
        assert work.started == [0, 1, 2]
        assert await anext(results) == 0
        await trio.testing.wait_all_tasks_blocked()
        assert work.started == [0, 1, 2, 3]
        assert [result async for result in results] == [n * 10 for n in range(1, 20)]


async def fail_inside(work: Work) -> None:
    async with ordered(numbers(20), work, 4):
        await trio.testing.wait_all_tasks_blocked()
        raise KeyError("ours")


async def test_leaving_early_or_by_an_error_cancels_what_is_under_way() -> None:
    work = Work()
    async with ordered(numbers(20), work, 4):
        await trio.testing.wait_all_tasks_blocked()
    assert sorted(work.cancelled) == [0, 1, 2, 3]
    work = Work()
    with pytest.raises(KeyError, match="ours"):
        await fail_inside(work)
    assert sorted(work.cancelled) == [0, 1, 2, 3]


async def test_a_cancellation_from_outside_ends_it() -> None:
    work = Work()
    with trio.CancelScope() as scope:
        async with ordered(numbers(20), work, 4) as results:
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await anext(results)
    assert scope.cancelled_caught
    assert sorted(work.cancelled) == [0, 1, 2, 3]
