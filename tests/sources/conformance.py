# SPDX-License-Identifier: AGPL-3.0-or-later
"""What every source of disks must do: checks over a ``SourceLab``, run for each source by its own
test file.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Protocol

import pytest
import trio

from replicator.disk import DiskView, Extent
from replicator.errors import ReferenceLostError, SnapshotGoneError
from replicator.sources.base import HeldSnapshot, Snapshot, SnapshotName, Source

GRAIN = 64 << 10


class SourceLab(Protocol):
    """A source on which a test can play the guest."""

    #: Whether the source records changes, and whether the guest may write while a snapshot lives.
    tracks: bool
    live: bool
    #: Whether a reference is a snapshot that fills, or a record that takes no room.
    reference_takes_room: bool

    @property
    def disks(self) -> list[str]:
        """Identities."""
        ...

    def source(self) -> Source:
        """A new object for the same VM, as a new process would make it."""
        ...

    async def write(self, disk: str, offset: int, data: bytes) -> None: ...

    async def zero(self, disk: str, offset: int, length: int) -> None: ...

    async def grow(self, disk: str, by: int) -> None: ...

    async def content(self, disk: str) -> bytes:
        """What the disk holds now."""
        ...

    async def leftovers(self) -> list[str]:
        """Names of everything that the source has made and not removed."""
        ...


Check = Callable[[SourceLab], Awaitable[None]]
CHECKS: list[Check] = []


def check(function: Check) -> Check:
    CHECKS.append(function)
    return function


def pattern(seed: str, length: int) -> bytes:
    """Bytes that compress badly and are never zero for a whole grain."""
    return random.Random(seed).randbytes(length)


async def contents(lab: SourceLab) -> dict[str, bytes]:
    return {disk: await lab.content(disk) for disk in lab.disks}


async def listed(view: DiskView, since: str | None = None) -> list[Extent]:
    """The view's extents, with the promises about their order checked."""
    extents = [extent async for extent in view.extents(since)]
    assert all(one.end <= two.offset for one, two in pairwise(extents))
    assert not extents or extents[-1].end <= view.size
    return extents


async def copy_onto(view: DiskView, base: bytes, since: str | None) -> bytes:
    """What a replica that held ``base`` holds after the view's extents were applied."""
    image = bytearray(base[: view.size].ljust(view.size, b"\0"))
    for extent in await listed(view, since):
        data = bytes(extent.length)
        if not extent.zero:
            data = await view.read(extent.offset, extent.length)
            assert len(data) == extent.length
        image[extent.offset : extent.end] = data
    return bytes(image)


async def assert_full(snapshot: Snapshot, expected: dict[str, bytes]) -> None:
    """Every disk, read in whole, is ``expected``."""
    assert [disk.identity for disk in snapshot.disks] == list(expected)
    for disk in snapshot.disks:
        assert disk.view.size == len(expected[disk.identity])
        got = await copy_onto(disk.view, b"", None)
        assert _hash(got) == _hash(expected[disk.identity]), disk.identity


async def assert_changes(
    lab: SourceLab,
    snapshot: Snapshot,
    reference: str,
    before: dict[str, bytes],
    expected: dict[str, bytes],
) -> None:
    """What changed since ``reference``, applied to ``before``, is ``expected``."""
    for disk in snapshot.disks:
        if not lab.tracks:
            with pytest.raises(ReferenceLostError):
                await listed(disk.view, reference)
            continue
        got = await copy_onto(disk.view, before[disk.identity], reference)
        assert _hash(got) == _hash(expected[disk.identity]), disk.identity
    if not lab.tracks:
        await assert_full(snapshot, expected)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def fill(lab: SourceLab, seed: str) -> None:
    """Some data at odd places of every disk."""
    for disk in lab.disks:
        await lab.write(disk, 0, pattern(f"{seed} {disk} a", 3000 // 512 * 512))
        await lab.write(disk, 5 * GRAIN + 4096, pattern(f"{seed} {disk} b", 2 * GRAIN))
        size = len(await lab.content(disk))
        await lab.write(disk, size - 4096, pattern(f"{seed} {disk} c", 4096))


async def change(lab: SourceLab, seed: str) -> None:
    """Change a little: new data, data over data, zeros over data."""
    for disk in lab.disks:
        await lab.write(disk, 20 * GRAIN + 512, pattern(f"{seed} {disk} d", 1024))
        await lab.write(disk, 5 * GRAIN + 8192, pattern(f"{seed} {disk} e", 512))
        await lab.zero(disk, 6 * GRAIN, GRAIN)


async def commit(lab: SourceLab, push_id: str, reference: str | None) -> dict[str, bytes]:
    """A whole cycle up to the confirmation; returns what the disks held."""
    name = SnapshotName(push_id, reference)
    snapshot = await lab.source().take(name)
    expected = await contents(lab)
    await assert_full(snapshot, expected)
    await snapshot.check()
    await snapshot.aclose()
    await lab.source().confirm(name)
    return expected


@check
async def identity_is_stable(lab: SourceLab) -> None:
    first = await lab.source().identify()
    assert first == await lab.source().identify()
    assert first.uuid.int
    assert first.name


@check
async def full_read_is_exact(lab: SourceLab) -> None:
    await fill(lab, "full")
    snapshot = await lab.source().take(SnapshotName("p1", None))
    assert snapshot.lost_tracking is None
    expected = await contents(lab)
    await assert_full(snapshot, expected)
    for disk in snapshot.disks:
        held = expected[disk.identity]
        for offset, length in ((0, 1), (511, 3), (5 * GRAIN + 4095, 70001), (len(held) - 1, 1)):
            assert await disk.view.read(offset, length) == held[offset : offset + length]
        extents = await listed(disk.view)
        assert sum(e.length for e in extents) < disk.view.size, "holes are left out"
        assert not any(e.zero for e in extents)
    await snapshot.check()
    await snapshot.aclose()


@check
async def reads_run_side_by_side(lab: SourceLab) -> None:
    await fill(lab, "side")
    snapshot = await lab.source().take(SnapshotName("p1", None))
    expected = await contents(lab)
    view, held = snapshot.disks[0].view, expected[snapshot.disks[0].identity]

    async def one(offset: int) -> None:
        assert await view.read(offset, 5000) == held[offset : offset + 5000]

    async with trio.open_nursery() as nursery:
        for offset in range(0, 12 * GRAIN, GRAIN // 2):
            nursery.start_soon(one, offset)
    with trio.move_on_after(0):
        await view.read(0, GRAIN)
    await one(0)
    await snapshot.aclose()


@check
async def snapshot_is_one_instant(lab: SourceLab) -> None:
    """A guest that counts on one disk after the other is caught between two steps at most."""
    if not lab.live:
        return
    first, last = lab.disks[0], lab.disks[-1]
    number = 0

    async def step() -> None:
        nonlocal number
        number += 1
        for disk in (first, last):
            await lab.write(disk, 0, number.to_bytes(512, "big"))

    await step()
    done = trio.Event()

    async def guest() -> None:
        while not done.is_set():
            await step()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest)
        snapshot = await lab.source().take(SnapshotName("p1", None))
        taken_before = number
        while number < taken_before + 3:
            await trio.lowlevel.checkpoint()
        done.set()
    views = {disk.identity: disk.view for disk in snapshot.disks}
    seen = [int.from_bytes(await views[disk].read(0, 512), "big") for disk in (first, last)]
    assert seen[0] - seen[1] in (0, 1)
    assert 1 <= seen[1] <= taken_before
    await step()
    again = [int.from_bytes(await views[disk].read(0, 512), "big") for disk in (first, last)]
    assert again == seen
    await snapshot.check()
    await snapshot.aclose()


@check
async def writes_after_the_instant_are_not_seen(lab: SourceLab) -> None:
    if not lab.live:
        return
    await fill(lab, "one")
    expected = await contents(lab)
    snapshot = await lab.source().take(SnapshotName("p1", None))
    await change(lab, "later")
    await assert_full(snapshot, expected)
    await change(lab, "later still")
    await assert_full(snapshot, expected)
    await snapshot.aclose()


@check
async def changes_since_the_reference_cover_all(lab: SourceLab) -> None:
    await fill(lab, "seed")
    before = await commit(lab, "p1", None)
    for number in range(2, 5):
        await change(lab, f"cycle {number}")
        reference = f"p{number - 1}"
        name = SnapshotName(f"p{number}", reference)
        snapshot = await lab.source().take(name)
        assert snapshot.lost_tracking is None
        expected = await contents(lab)
        await assert_changes(lab, snapshot, reference, before, expected)
        if lab.tracks:
            for disk in snapshot.disks:
                extents = await listed(disk.view, reference)
                assert sum(e.length for e in extents) <= 4 * GRAIN, "unchanged grains are left out"
        await snapshot.aclose()
        await lab.source().confirm(name)
        before = expected


@check
async def growth_is_covered(lab: SourceLab) -> None:
    await fill(lab, "grow")
    before = await commit(lab, "p1", None)
    disk = lab.disks[0]
    size = len(before[disk])
    await lab.grow(disk, 40 * GRAIN)
    await lab.write(disk, size + 30 * GRAIN, pattern("new", GRAIN))
    await lab.write(disk, size - 512, pattern("across", 1024))
    snapshot = await lab.source().take(SnapshotName("p2", "p1"))
    assert snapshot.lost_tracking is None
    expected = await contents(lab)
    assert len(expected[disk]) == size + 40 * GRAIN
    await assert_full(snapshot, expected)
    await assert_changes(lab, snapshot, "p1", before, expected)
    if lab.tracks:
        # The new part may hold anything (a grown volume): none of it is left out.
        view = snapshot.disks[0].view
        new = [e for e in await listed(view, "p1") if e.end > size]
        assert sum(e.end - max(e.offset, size) for e in new) == 40 * GRAIN
    await snapshot.aclose()


@check
async def reopening_by_name(lab: SourceLab) -> None:
    await fill(lab, "reopen")
    before = await commit(lab, "p1", None)
    await change(lab, "reopen")
    name = SnapshotName("p2", "p1")
    snapshot = await lab.source().take(name)
    expected = await contents(lab)
    await snapshot.aclose()
    for _ in range(2):
        again = await lab.source().reopen(name)
        assert again.taken_at_us == snapshot.taken_at_us > 0
        assert again.lost_tracking is None
        await assert_full(again, expected)
        await assert_changes(lab, again, "p1", before, expected)
        await again.check()
        await again.aclose()
    await lab.source().confirm(name)
    with pytest.raises(SnapshotGoneError):
        await lab.source().reopen(name)


@check
async def abandoned_changes_come_with_the_next(lab: SourceLab) -> None:
    await fill(lab, "abandon")
    before = await commit(lab, "p1", None)
    await change(lab, "first")
    name = SnapshotName("p2", "p1")
    snapshot = await lab.source().take(name)
    if lab.live:
        await lab.write(lab.disks[0], 30 * GRAIN, pattern("meanwhile", GRAIN))
    await snapshot.aclose()
    for _ in range(2):
        await lab.source().abandon(name)
    with pytest.raises(SnapshotGoneError):
        await lab.source().reopen(name)
    await lab.write(lab.disks[0], 40 * GRAIN, pattern("second", GRAIN))
    snapshot = await lab.source().take(SnapshotName("p3", "p1"))
    assert snapshot.lost_tracking is None
    expected = await contents(lab)
    await assert_changes(lab, snapshot, "p1", before, expected)
    await snapshot.aclose()


@check
async def operations_can_be_repeated(lab: SourceLab) -> None:
    await fill(lab, "again")
    source = lab.source()
    await source.abandon(SnapshotName("p0", None))
    name = SnapshotName("p1", None)
    await (await source.take(name)).aclose()
    await (await lab.source().take(name)).aclose()
    before = await contents(lab)
    for _ in range(3):
        await lab.source().confirm(name)
    await change(lab, "again")
    name = SnapshotName("p2", "p1")
    snapshot = await source.take(name)
    assert snapshot.lost_tracking is None
    await assert_changes(lab, snapshot, "p1", before, await contents(lab))
    await snapshot.aclose()
    await snapshot.aclose()
    for _ in range(3):
        await lab.source().confirm(name)


@check
async def sweeping_leaves_what_is_kept(lab: SourceLab) -> None:
    await fill(lab, "sweep")
    before = await commit(lab, "p1", None)
    await change(lab, "sweep")
    name = SnapshotName("p2", "p1")
    snapshot = await lab.source().take(name)
    await snapshot.aclose()
    assert await lab.source().sweep(name, "p1") == []
    snapshot = await lab.source().reopen(name)
    await snapshot.aclose()
    # A process that died left p2, and nobody wants it any more.
    assert await lab.source().sweep(None, "p1")
    with pytest.raises(SnapshotGoneError):
        await lab.source().reopen(name)
    assert await lab.source().sweep(None, "p1") == []
    snapshot = await lab.source().take(SnapshotName("p3", "p1"))
    assert snapshot.lost_tracking is None
    await assert_changes(lab, snapshot, "p1", before, await contents(lab))
    await snapshot.aclose()
    await lab.source().sweep(None, None)
    assert await lab.leftovers() == []


@check
async def what_takes_room_is_listed(lab: SourceLab) -> None:
    """Of any process; what is read in place, and a reference that is a record, take none."""
    await fill(lab, "held")
    assert list(await lab.source().held()) == []
    await commit(lab, "p1", None)
    reference = list(await lab.source().held())
    assert [each.push_id for each in reference] == ["p1"] * lab.reference_takes_room
    name = SnapshotName("p2", "p1")
    snapshot = await lab.source().take(name)
    newest = [HeldSnapshot("p2", snapshot.taken_at_us)] if lab.live else []
    expected = reference + newest
    assert list(await lab.source().held()) == expected
    await snapshot.aclose()
    assert list(await lab.source().held()) == expected
    await lab.source().abandon(name)
    assert list(await lab.source().held()) == reference


@check
async def a_reference_that_nobody_knows(lab: SourceLab) -> None:
    await fill(lab, "unknown")
    snapshot = await lab.source().take(SnapshotName("p2", "never"))
    assert (snapshot.lost_tracking is not None) == lab.tracks
    for disk in snapshot.disks:
        with pytest.raises(ReferenceLostError):
            await listed(disk.view, "never")
    await assert_full(snapshot, await contents(lab))
    await snapshot.aclose()


@check
async def what_is_not_there_cannot_be_opened(lab: SourceLab) -> None:
    with pytest.raises(SnapshotGoneError):
        await lab.source().reopen(SnapshotName("never", None))
