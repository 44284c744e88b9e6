# SPDX-License-Identifier: AGPL-3.0-or-later
"""Resyncs: whatever the source has lost, digests are compared and only what differs travels."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from receiver.service import digests, sessions
from replicator.domain.model import PushKind, Suspicion
from replicator.domain.vm import ProtectedVm
from replicator.errors import (
    DamageError,
    PeerRefusedError,
    RefusedError,
    SnapshotGoneError,
    WireError,
)
from replicator.imagemap import ImageMap, vm_root
from replicator.imagemap.layout import REGIONS
from replicator.push import patience, resync
from replicator.push.connection import ConnectionLostError
from replicator.push.differing import Differing
from replicator.push.ending import Ending
from replicator.push.files import PushFiles
from replicator.push.plan import Want
from replicator.push.resync import Comparer
from replicator.push.transfer import Transfer
from replicator.wire import messages as m
from tests.push.lab import files_of, state_of
from tests.push.proxy import Cut, Line, proxied
from tests.push.tracked import tracked
from tests.sites import GRAIN, ReceiverSite, SourceSite, receiver_site, source_site

#: 320 grains: two pages of digests, and one of nodes above them.
SIZE = 20 << 20
LARGE = 64 << 20
#: What a disk holds: grains here and there.
HELD = (0, 1, 255, 256, 300, 511, 512, 1000)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "pause_s", lambda *_: 0.0)


def grain(seed: object) -> bytes:
    return random.Random(str(seed)).randbytes(GRAIN)


def make_disk(path: Path, size: int = SIZE) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for number in HELD:
            if number * GRAIN < size:
                file.seek(number * GRAIN)
                file.write(grain(number))
    return path


@asynccontextmanager
async def pair(
    folder: Path, size: int = SIZE, **options: str
) -> AsyncIterator[tuple[ReceiverSite, Line, SourceSite]]:
    """A source with one disk, seeded, a receiver, and the line between them."""
    disks = {"disk-0": make_disk(folder / "a.raw", size)}
    async with (
        receiver_site(folder / "rx", dr_restore_points="100") as rx,
        proxied(rx.port) as line,
        source_site(folder / "sx", line.port, disks, **options) as sx,
    ):
        await sx.push(Want.SEED)
        yield rx, line, sx


@asynccontextmanager
async def without_state(
    folder: Path, sx: SourceSite, port: int, **options: str
) -> AsyncIterator[SourceSite]:
    """The source as it is after it lost its state directory."""
    async with source_site(folder / "sx again", port, sx.disks, **options) as again:
        yield again


def forget_maps(sx: SourceSite) -> None:
    shutil.rmtree(sx.config.state_dir / "maps")


async def same_on_both_sides(rx: ReceiverSite, sx: SourceSite, *disks: str) -> None:
    (vm,) = sx.log.vms
    assert vm.newest is not None
    assert rx.store.newest() == m.PointRef(vm.newest.number, vm.newest.root, vm.newest.push_id)
    for disk in disks or ("disk-0",):
        assert await rx.read(None, disk) == sx.content(disk)
    assert not files_of(sx.config.work_path)


async def kinds(sx: SourceSite) -> list[str]:
    return [type(event).__name__ for event in await sx.log.history(sx.uuid)]


# What it costs


async def test_where_nothing_differs_the_disk_is_read_once_and_hardly_anything_travels(
    tmp_path: Path,
) -> None:
    """Under a thousandth of the disk, all that both sides say counted."""
    async with (
        pair(tmp_path, LARGE) as (rx, line, sx),
        without_state(tmp_path, sx, line.port) as again,
    ):
        mine = tracked(again)
        source = mine.source
        line.passed.clear()
        outcome = await again.push(Want.RESYNC)
        (passed,) = line.passed
        assert sum(passed) < LARGE // 1000
        read = sorted(read for view in source.views for read in view.reads)
        assert all(one.end <= two.offset for one, two in itertools.pairwise(read))
        assert source.bytes_read >= len(HELD) * GRAIN
        # A new point with the instant of its snapshot all the same.
        assert (outcome.point.number, outcome.point.kind) == (2, PushKind.CYCLE)
        assert outcome.point.root == rx.store.vm.points[1].root
        assert outcome.compared is not None
        assert (outcome.compared.compared, outcome.compared.differing) == (LARGE, 0)
        await same_on_both_sides(rx, again)
        # And from there cycles go on.
        mine.write("disk-0", 0, grain("new"))
        assert (await again.push(Want.RUN)).point.number == 3
        await same_on_both_sides(rx, again)


async def test_only_grains_that_differ_travel(tmp_path: Path) -> None:
    async with pair(tmp_path, LARGE) as (rx, line, sx):
        sx.write("disk-0", 256 * GRAIN, grain("changed"))
        sx.write("disk-0", 400 * GRAIN, grain("new"))
        sx.write("disk-0", 1023 * GRAIN, grain("last"))
        sx.write("disk-0", 512 * GRAIN, bytes(GRAIN))
        async with without_state(tmp_path, sx, line.port) as again:
            source = tracked(again).source
            outcome = await again.push(Want.RESYNC)
            assert outcome.compared is not None
            assert outcome.compared.differing == 4 * GRAIN
            assert 3 * GRAIN <= outcome.point.bytes_pushed < 3.2 * GRAIN
            # What differs, and is not zeros now, was read once more.
            read = sum(r.length for view in source.views for r in view.reads if r.length == GRAIN)
            assert read >= 3 * GRAIN
            await same_on_both_sides(rx, again)
            assert await rx.read(1) == make_disk(tmp_path / "old", LARGE).read_bytes()


@pytest.mark.parametrize("digest", ["xxh3-128", "blake3-256"])
async def test_a_map_of_three_levels(tmp_path: Path, digest: str) -> None:
    """Of 5 GiB: pages of two levels are asked for, and only where something differs."""
    size = 5 << 30
    asked: list[tuple[int, int]] = []
    receive = resync._Walk._receive

    async def noted(walk: Any, level: int, indexes: list[int]) -> list[bytes]:
        asked.extend((level, index) for index in indexes)
        return await receive(walk, level, indexes)

    async with pair(tmp_path, size, dr_digest=digest) as (rx, line, sx):
        changed = [70_000, 70_001, 80_000]
        for number in changed:
            sx.write("disk-0", number * GRAIN, grain(number))
        # Only here is the receiver's map not zeros while ours differs.
        sx.write("disk-0", 1000 * GRAIN, bytes(GRAIN))
        async with without_state(tmp_path, sx, line.port, dr_digest="xxh3-128") as again:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(resync._Walk, "_receive", noted)
                outcome = await again.push(Want.RESYNC)
            assert outcome.compared is not None
            assert outcome.compared.differing == 4 * GRAIN
            assert asked == [(2, 0), (1, 0), (0, 1000 // 256)]
        point = rx.store.vm.newest
        assert point is not None
        async with (
            rx.store.hold(None) as held,
            rx.store.open_disk(held, held.disks[0]) as view,
        ):
            for number in (*changed, 0, 1000):
                expected = grain(number) if number != 1000 else bytes(GRAIN)
                assert await view.read(number * GRAIN, GRAIN) == expected


async def test_more_pages_than_are_asked_for_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(m, "PAGES_ASKED_MAX", 3)
    monkeypatch.setattr(m, "PAGES_SENT_MAX", 2)
    async with pair(tmp_path, LARGE) as (rx, line, sx):
        for page in range(4):
            sx.write("disk-0", (page * 256 + 17) * GRAIN, grain(page))
        async with without_state(tmp_path, sx, line.port) as again:
            outcome = await again.push(Want.RESYNC)
            assert outcome.compared is not None
            assert outcome.compared.differing == 4 * GRAIN
            await same_on_both_sides(rx, again)


# What can be lost


def damage_map(sx: SourceSite) -> None:
    """A digest that does not fit the nodes above it."""
    (path,) = (sx.config.state_dir / "maps").rglob("*.map")
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"damage", REGIONS[0])


async def lost_maps(sx: SourceSite) -> None:
    forget_maps(sx)


async def damaged_map(sx: SourceSite) -> None:
    (path,) = (sx.config.state_dir / "maps").rglob("*.map")
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"damage", 0)


async def refused(sx: SourceSite) -> None:
    """The receiver does not come to the content that this side says."""
    finish = sx.pusher.transfer.finish

    def lie(*args: Any) -> m.Finish:
        return msgspec.structs.replace(finish(*args), root=bytes(32))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sx.pusher.transfer, "finish", lie)
        with pytest.raises(PeerRefusedError) as caught:
            await sx.push(Want.PUSH)
    assert caught.value.code == "root-mismatch"


async def suspect(sx: SourceSite) -> None:
    async with sx.log.change(sx.uuid) as vm:
        vm.miss_changes(Suspicion("disk-0", GRAIN, 1))


Loss = Callable[[SourceSite], Awaitable[None]]
LOSSES: list[Loss] = [
    lost_maps,
    damaged_map,
    refused,
    suspect,
]


@pytest.mark.parametrize("want", [Want.RUN, Want.PUSH])
@pytest.mark.parametrize("loss", LOSSES)
async def test_what_is_lost_is_compared(tmp_path: Path, loss: Loss, want: Want) -> None:
    async with pair(tmp_path) as (rx, _, sx):
        sx.write("disk-0", 5 * GRAIN, grain("new"))
        await loss(sx)
        outcome = await sx.push(want)
        assert outcome.point.kind is PushKind.CYCLE
        assert outcome.point.compared
        assert outcome.compared is not None
        assert outcome.compared.differing == GRAIN
        assert outcome.point.bytes_pushed < 2 * GRAIN
        await same_on_both_sides(rx, sx)
        (vm,) = sx.log.vms
        assert vm.suspect is None
        assert "DisksCompared" in await kinds(sx)
        sx.write("disk-0", 6 * GRAIN, grain("later"))
        assert (await sx.push(want)).compared is None
        await same_on_both_sides(rx, sx)


@pytest.mark.parametrize("loss", LOSSES)
async def test_on_reference_loss_seed(tmp_path: Path, loss: Loss) -> None:
    async with pair(tmp_path, on_reference_loss="seed") as (rx, _, sx):
        await loss(sx)
        outcome = await sx.push(Want.RUN)
        assert outcome.point.kind is PushKind.SEED
        await same_on_both_sides(rx, sx)
        assert sx.log.vms[0].suspect is None
        # Asked for, it is a resync all the same.
        forget_maps(sx)
        assert (await sx.push(Want.RESYNC)).compared is not None


@pytest.mark.parametrize("loss", LOSSES)
async def test_on_reference_loss_fail(tmp_path: Path, loss: Loss) -> None:
    async with pair(tmp_path, on_reference_loss="fail") as (rx, _, sx):
        await loss(sx)
        await rx.settled()
        before = {k: v for k, v in (await state_of(rx)).items() if not k.startswith("events")}
        for want in (Want.RUN, Want.PUSH):
            with pytest.raises(RefusedError, match="on_reference_loss is fail: run replctl resync"):
                await sx.push(want)
        assert not files_of(sx.config.work_path)
        after = await state_of(rx)
        assert {k: v for k, v in after.items() if not k.startswith("events")} == before
        assert (await sx.push(Want.RESYNC)).compared is not None
        await same_on_both_sides(rx, sx)


async def test_a_damaged_page_of_the_own_map_is_found_and_compared(tmp_path: Path) -> None:
    """Its root looks well: the push that comes to the page is given up, and the next one compares."""
    async with pair(tmp_path) as (rx, _, sx):
        damage_map(sx)
        sx.write("disk-0", 0, grain("new"))
        with pytest.raises(DamageError):
            await sx.push(Want.PUSH)
        assert (await sx.push(Want.PUSH)).compared is not None
        await same_on_both_sides(rx, sx)


async def test_a_source_without_state_goes_on_only_when_told(tmp_path: Path) -> None:
    async with (
        pair(tmp_path) as (rx, line, sx),
        without_state(tmp_path, sx, line.port) as again,
    ):
        for want in (Want.RUN, Want.PUSH):
            with pytest.raises(RefusedError, match=r"never pushed.*run replctl resync"):
                await again.push(want)
        await again.push(Want.RESYNC)
        await same_on_both_sides(rx, again)


async def test_a_receiver_that_was_put_back(tmp_path: Path) -> None:
    """It has an older point than the source: the source goes on from that one, and uses no number twice."""
    disks = {"disk-0": make_disk(tmp_path / "a.raw")}
    async with (
        receiver_site(tmp_path / "rx") as rx,
        source_site(tmp_path / "sx", rx.port, disks) as sx,
    ):
        await sx.push(Want.SEED)
        await rx.settled()
    shutil.copytree(tmp_path / "rx" / "events", tmp_path / "kept" / "events")
    shutil.copytree(tmp_path / "rx" / "vms", tmp_path / "kept" / "vms", copy_function=copy_sparse)
    async with (
        receiver_site(tmp_path / "rx") as rx,
        source_site(tmp_path / "sx", rx.port, disks) as sx,
    ):
        for number in (2, 3):
            sx.write("disk-0", number * GRAIN, grain(number))
            assert (await sx.push(Want.RUN)).point.number == number
    async with (
        receiver_site(tmp_path / "kept") as rx,
        source_site(tmp_path / "sx", rx.port, disks) as sx,
    ):
        outcome = await sx.push(Want.RUN)
        assert outcome.compared is not None
        assert outcome.compared.differing == 2 * GRAIN
        assert (outcome.point.number, outcome.point.parent) == (4, 1)
        assert sorted(rx.store.vm.points) == [1, 4]
        await same_on_both_sides(rx, sx)
        sx.write("disk-0", 9 * GRAIN, grain(9))
        assert (await sx.push(Want.RUN)).point.number == 5
        await same_on_both_sides(rx, sx)
        await rx.settled()
        assert await rx.read(1) == make_disk(tmp_path / "as it was").read_bytes()


def copy_sparse(source: str, target: str) -> None:
    with Path(source).open("rb") as a, Path(target).open("wb") as b:
        shutil.copymode(source, target)
        end = a.seek(0, os.SEEK_END)
        b.truncate(end)
        at = 0
        while at < end:
            try:
                at = os.lseek(a.fileno(), at, os.SEEK_DATA)
            except OSError:
                return
            data = os.pread(a.fileno(), 1 << 16, at)
            os.pwrite(b.fileno(), data, at)
            at += len(data)


async def test_a_source_that_was_put_back_behind_the_receiver_goes_on_only_when_told(
    tmp_path: Path,
) -> None:
    disks = {"disk-0": make_disk(tmp_path / "a.raw")}
    async with receiver_site(tmp_path / "rx") as rx:
        async with source_site(tmp_path / "sx", rx.port, disks) as sx:
            await sx.push(Want.SEED)
        shutil.copytree(tmp_path / "sx", tmp_path / "kept", copy_function=copy_sparse)
        async with source_site(tmp_path / "sx", rx.port, disks) as sx:
            sx.write("disk-0", 0, grain("new"))
            await sx.push(Want.RUN)
        async with source_site(tmp_path / "kept", rx.port, disks) as sx:
            with pytest.raises(RefusedError, match="never pushed"):
                await sx.push(Want.RUN)
            outcome = await sx.push(Want.RESYNC)
            assert (outcome.point.number, outcome.point.parent) == (3, 2)
            await same_on_both_sides(rx, sx)


async def test_a_receiver_without_points_cannot_be_compared_with(tmp_path: Path) -> None:
    disks = {"disk-0": make_disk(tmp_path / "a.raw")}
    async with (
        receiver_site(tmp_path / "rx") as rx,
        source_site(tmp_path / "sx", rx.port, disks) as sx,
    ):
        with pytest.raises(RefusedError, match="run replctl seed first"):
            await sx.push(Want.RESYNC)


# Disks that come, go and change


async def test_disks_that_grew_came_and_went(tmp_path: Path) -> None:
    first = make_disk(tmp_path / "a.raw")
    second = make_disk(tmp_path / "b.raw", 3 * GRAIN + 100)
    third = make_disk(tmp_path / "c.raw", 2 * GRAIN)
    async with receiver_site(tmp_path / "rx") as rx:
        disks = {"disk-0": first, "disk-1": second}
        async with source_site(tmp_path / "sx", rx.port, disks) as sx:
            await sx.push(Want.SEED)
        os.truncate(first, SIZE + 5 * GRAIN + 7)
        disks = {"disk-0": first, "disk-7": third}
        async with source_site(tmp_path / "sx 2", rx.port, disks) as sx:
            sx.write("disk-0", SIZE + 2 * GRAIN, grain("grown"))
            sx.write("disk-0", SIZE + 5 * GRAIN, b"the end")
            outcome = await sx.push(Want.RESYNC)
            assert outcome.compared is not None
            assert outcome.compared.differing == GRAIN + 7
            await same_on_both_sides(rx, sx, "disk-0", "disk-7")
            assert [(d.disk, d.since) for d in outcome.point.disks] == [
                ("disk-0", 1),
                ("disk-7", 2),
            ]
            (vm,) = sx.log.vms
            assert vm.points == {2: outcome.point}


@pytest.mark.parametrize("old", [3 * GRAIN + 100, 256 * GRAIN, 255 * GRAIN + 1])
async def test_a_disk_whose_last_grain_was_not_whole_or_whose_map_grows(
    tmp_path: Path, old: int
) -> None:
    """The grain in which the disk ended holds more now; and a map of one level becomes one of two."""
    path = make_disk(tmp_path / "a.raw", old)
    async with receiver_site(tmp_path / "rx") as rx:
        async with source_site(tmp_path / "sx", rx.port, {"disk-0": path}) as sx:
            await sx.push(Want.SEED)
        os.truncate(path, 600 * GRAIN + 3)
        async with source_site(tmp_path / "sx 2", rx.port, {"disk-0": path}) as sx:
            outcome = await sx.push(Want.RESYNC)
            assert outcome.compared is not None
            assert outcome.compared.differing == 0
            await same_on_both_sides(rx, sx)
        async with source_site(tmp_path / "sx 3", rx.port, {"disk-0": path}) as sx:
            sx.write("disk-0", old, b"right behind the old end")
            sx.write("disk-0", 500 * GRAIN, grain("far"))
            outcome = await sx.push(Want.RESYNC)
            assert outcome.compared is not None
            assert outcome.compared.differing == 2 * GRAIN
            await same_on_both_sides(rx, sx)


async def test_a_disk_that_shrank_is_refused_before_it_is_read(tmp_path: Path) -> None:
    async with pair(tmp_path) as (rx, line, sx):
        await rx.settled()
        before = await state_of(rx)
        os.truncate(sx.disks["disk-0"], SIZE // 2)
        async with without_state(tmp_path, sx, line.port) as again:
            source = tracked(again).source
            with pytest.raises(RefusedError, match="shrank from"):
                await again.push(Want.RESYNC)
            assert source.bytes_read == 0
            assert not files_of(again.config.work_path)
        assert await state_of(rx) == before


# Receivers that cannot be compared with, and that lie


async def test_a_damaged_page_of_the_receivers_map_is_mended_and_served(tmp_path: Path) -> None:
    async with pair(tmp_path) as (rx, line, sx):
        await rx.settled()
        (path,) = (rx.store.paths.root / "head").iterdir()
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), b"damage", REGIONS[0])
        sx.write("disk-0", 5 * GRAIN, grain("new"))
        async with without_state(tmp_path, sx, line.port) as again:
            outcome = await again.push(Want.RESYNC)
            assert outcome.compared is not None
            assert outcome.compared.differing == GRAIN
            await same_on_both_sides(rx, again)


async def test_a_receiver_whose_map_cannot_be_made_again_is_seeded(tmp_path: Path) -> None:
    async with pair(tmp_path) as (rx, _, sx):
        store = await rx.settled()
        for path in [*store.paths.root.rglob("*.map"), *store.paths.root.rglob("*.raw")]:
            path.unlink()
        forget_maps(sx)
        with pytest.raises(
            RefusedError, match=r"map.* is lost or damaged.*run replctl seed --again"
        ):
            await sx.push(Want.RESYNC)
        assert (await sx.push(Want.RUN)).point.kind is PushKind.SEED
        await same_on_both_sides(rx, sx)


Answer = Callable[[Any], Any]


def other_page(answer: m.Pages) -> m.Pages:
    return m.Pages((bytes([answer.pages[0][0] ^ 1]) + answer.pages[0][1:], *answer.pages[1:]))


PAGE_LIES: dict[str, tuple[Answer, str]] = {
    "another page": (other_page, "does not fit its root: page 0 of level"),
    "one page more": (lambda a: m.Pages((*a.pages, b"")), "other pages of a map than"),
    "a long page": (lambda a: m.Pages((b"\1" * 8192,) * len(a.pages)), "page"),
}


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("name", PAGE_LIES)
async def test_a_receiver_that_lies_about_a_page_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, level: int
) -> None:
    lie, match = PAGE_LIES[name]
    pages = digests.pages

    async def lying(store: Any, asked: m.AskPages) -> list[m.Pages]:
        found = await pages(store, asked)
        return [lie(found[0]), *found[1:]] if asked.level == level else found

    async with pair(tmp_path) as (rx, line, sx):
        sx.write("disk-0", 5 * GRAIN, grain("new"))
        async with without_state(tmp_path, sx, line.port) as again:
            with monkeypatch.context() as patch:
                patch.setattr(digests, "pages", lying)
                with pytest.raises(WireError, match=match):
                    await again.push(Want.RESYNC)
            assert again.log.vms[0].newest is None
            # From an honest one it goes on, and the disk is not read again.
            source = tracked(again).source
            await again.push(Want.RESYNC)
            assert source.bytes_read == GRAIN
            await same_on_both_sides(rx, again)


async def test_a_receiver_that_sends_too_few_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(*_: Any) -> list[m.Pages]:
        await trio.lowlevel.checkpoint()
        return []

    async with pair(tmp_path) as (_, line, sx):
        sx.write("disk-0", 5 * GRAIN, grain("new"))
        monkeypatch.setattr(digests, "pages", silent)
        async with without_state(tmp_path, sx, line.port) as again:
            with pytest.raises(WireError, match="other pages of a map than those asked for"):
                await again.push(Want.RESYNC)


def two_disks(said: m.Described, **fields: Any) -> m.Described:
    return msgspec.structs.replace(
        said, disks=(*said.disks, msgspec.structs.replace(said.disks[0], **fields))
    )


def one_disk(said: m.Described, **fields: Any) -> m.Described:
    return msgspec.structs.replace(said, disks=(msgspec.structs.replace(said.disks[0], **fields),))


POINT_LIES: dict[str, tuple[Answer, str]] = {
    "another root": (lambda d: msgspec.structs.replace(d, root=bytes(32)), "another point"),
    "another number": (lambda d: msgspec.structs.replace(d, number=9), "another point"),
    "another size": (lambda d: one_disk(d, size=5), "another point"),
    "another disk": (lambda d: one_disk(d, root=bytes(32)), "another point"),
    "a disk twice": (two_disks, "cannot be"),
    "one more": (lambda d: two_disks(d, disk="disk-5", identity="x"), "another point"),
    "a chain of the future": (lambda d: one_disk(d, since=2), "disk-0 as it cannot be"),
    "no chain": (lambda d: one_disk(d, since=0), "disk-0 as it cannot be"),
    "an odd grain": (lambda d: one_disk(d, grain=65537), "disk-0 as it cannot be"),
    "another grain": (lambda d: one_disk(d, grain=4096), "does not fit its root"),
    "another algorithm": (lambda d: one_disk(d, algorithm=2), "does not fit its root"),
}


@pytest.mark.parametrize("name", POINT_LIES)
async def test_a_receiver_that_lies_about_its_point_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    lie, match = POINT_LIES[name]
    describe = digests.describe

    async def lying(store: Any) -> Any:
        return lie(await describe(store))

    async with pair(tmp_path) as (rx, line, sx):
        monkeypatch.setattr(digests, "describe", lying)
        await rx.settled()
        before = await state_of(rx)
        async with without_state(tmp_path, sx, line.port) as again:
            with pytest.raises((WireError, PeerRefusedError), match=match):
                await again.push(Want.RESYNC)
            assert again.log.vms[0].newest is None
        assert await state_of(rx) == before


async def test_a_point_that_names_one_identity_twice() -> None:
    disk = m.DiskMap("disk-0", "same", 5, bytes(32), 1, 65536, 1)
    other = msgspec.structs.replace(disk, disk="disk-1")
    said = m.Described(
        1, 0, "0" * 16, PushKind.SEED, 1, 1, 1, 1, 1, bytes(32), 0, False, (disk, other)
    )
    root = vm_root([(d.disk, d.size, d.root) for d in said.disks])
    said = msgspec.structs.replace(said, root=root)
    with pytest.raises(WireError, match="one disk twice"):
        resync.check_described(said, 1, root)
    good = msgspec.structs.replace(said, disks=(disk, msgspec.structs.replace(other, identity="y")))
    assert [d.identity for d in resync.check_described(good, 1, root).point.disks] == ["same", "y"]


# Cut and crashed


@pytest.mark.parametrize("at", range(300, 9000, 700))
@pytest.mark.parametrize("way", ["to_receiver", "to_source"])
async def test_a_resync_goes_on_wherever_its_line_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, at: int
) -> None:
    """And the disk is read once, also where it takes several sessions."""
    monkeypatch.setattr(sessions, "ACK_BYTES", 3 * GRAIN)
    async with pair(tmp_path) as (rx, line, sx):
        for number in (5, 300, 310):
            sx.write("disk-0", number * GRAIN, b"few bytes that compress well" * 9)
        async with without_state(tmp_path, sx, line.port) as again:
            source = tracked(again).source
            line.cuts = [Cut(to_receiver=at) if way == "to_receiver" else Cut(to_source=at)]
            outcome = await again.push(Want.RESYNC)
            assert outcome.point.number == 2
            await same_on_both_sides(rx, again)
            firsts = [r.offset for view in source.views for r in view.reads if r.offset == 0]
            assert len(firsts) == 1


#: (where, what): the process ends instead of this step, or after it.
STEPS: dict[str, tuple[type, str]] = {
    "reading": (Comparer, "scan"),
    "asking": (Comparer, "fetch"),
    "taking the maps": (PushFiles, "install"),
    "sending": (Transfer, "send"),
    "committing": (Ending, "commit"),
    "settling": (Ending, "settle"),
}


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
async def test_a_resync_that_died_is_taken_up_or_begun_anew(
    tmp_path: Path, step: str, when: str
) -> None:
    where, name = STEPS[step]
    original = getattr(where, name)

    async def killed(*args: Any, **options: Any) -> None:
        if when == "after":
            await original(*args, **options)
        raise Killed

    def killed_there(*args: Any) -> None:
        if when == "after":
            original(*args)
        raise Killed

    async with pair(tmp_path) as (rx, line, sx):
        sx.write("disk-0", 5 * GRAIN, grain("new"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(where, name, killed_there if where is PushFiles else killed)
            with pytest.raises(Killed):
                async with without_state(tmp_path, sx, line.port) as again:
                    await again.push(Want.RESYNC)
        async with without_state(tmp_path, sx, line.port) as again:
            # What was begun is taken up, or begun anew, whatever is asked for now.
            outcome = await again.push(Want.RUN)
            await same_on_both_sides(rx, again)
            assert outcome.point.number in (2, 3)
            assert sorted(rx.store.vm.points) == list(range(1, outcome.point.number + 1))


async def test_a_resync_whose_snapshot_is_gone_begins_anew(tmp_path: Path) -> None:
    async with pair(tmp_path) as (rx, line, sx):
        sx.write("disk-0", 5 * GRAIN, grain("new"))
        async with without_state(tmp_path, sx, line.port) as again:
            line.cuts = [Cut(to_receiver=1500)]
            again.pusher.patience.limit_s = 0.0
            with pytest.raises(ConnectionLostError):
                await again.push(Want.RESYNC)
            again.write("disk-0", 5 * GRAIN, grain("newer"))
            outcome = await again.push(Want.RUN)
            assert outcome.point.compared
            await same_on_both_sides(rx, again)


async def test_after_a_lost_snapshot_the_next_push_compares_by_itself(tmp_path: Path) -> None:
    """Or goes by tracking where that still works."""
    async with pair(tmp_path) as (rx, line, sx):
        mine = tracked(sx)
        await sx.push(Want.RUN)
        for lost in (False, True):
            mine.write("disk-0", 5 * GRAIN, grain(("cut", lost)))
            line.cuts, sx.pusher.patience.limit_s = [Cut(to_receiver=20_000)], 0.0
            with pytest.raises(ConnectionLostError):
                await sx.push(Want.RUN)
            mine.write("disk-0", 7 * GRAIN, grain(("meanwhile", lost)))
            if lost:
                mine.source.reference = None
            outcome = await sx.push(Want.RUN)
            assert "PushAbandoned" in await kinds(sx)
            assert outcome.point.compared is lost
            await same_on_both_sides(rx, sx)


async def test_an_unfinished_push_is_finished_before_a_resync_that_is_asked_for(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as (rx, line, sx):
        sx.write("disk-0", 5 * GRAIN, grain("new"))
        line.cuts, sx.pusher.patience.limit_s = [Cut(to_receiver=20_000)], 0.0
        with pytest.raises(ConnectionLostError):
            await sx.push(Want.RUN)
        outcome = await sx.push(Want.RESYNC)
        assert (outcome.point.number, outcome.compared is not None) == (3, True)
        await same_on_both_sides(rx, sx)


async def test_what_is_sent_must_lead_to_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grain that is left out would be missed by every later check: the map would not know of it."""
    async with pair(tmp_path) as (rx, line, sx):
        sx.write("disk-0", 5 * GRAIN, grain("new"))
        sx.write("disk-0", 310 * GRAIN, grain("new too"))
        await rx.settled()
        before = await state_of(rx)
        with monkeypatch.context() as patch:
            every = Differing.extents
            patch.setattr(Differing, "extents", lambda self: iter(list(every(self))[:1]))
            async with without_state(tmp_path, sx, line.port) as again:
                with pytest.raises(
                    DamageError, match="what was sent does not lead to what was read"
                ):
                    await again.push(Want.RESYNC)
        assert await state_of(rx) == before


async def test_the_snapshot_that_changes_while_it_is_compared(tmp_path: Path) -> None:
    """An image that is read in place: it is no snapshot any more, and nothing is committed."""
    async with pair(tmp_path) as (rx, line, sx):
        sx.write("disk-0", 5 * GRAIN, grain("new"))
        async with without_state(tmp_path, sx, line.port) as again:
            fetch = Comparer.fetch

            async def write_then(self: Comparer, *args: Any) -> Any:
                again.write("disk-0", 6 * GRAIN, grain("meanwhile"))
                return await fetch(self, *args)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Comparer, "fetch", write_then)
                with pytest.raises(SnapshotGoneError):
                    await again.push(Want.RESYNC)
            assert sorted(rx.store.vm.points) == [1]
            await again.push(Want.RUN)
            await same_on_both_sides(rx, again)


async def test_what_the_log_says_of_a_resync(tmp_path: Path) -> None:
    async with (
        pair(tmp_path) as (_, line, sx),
        without_state(tmp_path, sx, line.port) as again,
    ):
        await again.push(Want.RESYNC)
        events: list[Any] = await again.log.history(again.uuid)
        assert [type(event).__name__ for event in events] == [
            "Registered",
            "DisksCompared",
            "CycleCommitted",
        ]
        assert isinstance(events[1], ProtectedVm.DisksCompared)
        assert "no log or no maps" in events[1].reason
        (path,) = (again.config.state_dir / "maps").rglob("*.map")
        with ImageMap.open(path) as known:
            assert known.point == 2
            assert list(known.check()) == []
