# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is held at the source has limits, in number and in age, whatever becomes of the receiver."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
import trio

from replicator.config import check
from replicator.credentials import SourceCredentials
from replicator.domain.model import PushKind
from replicator.domain.vm import ProtectedVm
from replicator.errors import RefusedError, SourceError
from replicator.log import EventLog, open_log
from replicator.push import held, patience, sender
from replicator.push.connection import ConnectionLostError
from replicator.push.held import HeldLimits
from replicator.push.link import Link
from replicator.push.plan import Want
from replicator.push.pusher import Pusher
from replicator.sources.base import HeldSnapshot, SnapshotName, Source
from replicator.sources.image import ImageSource
from tests.lab_qemu import storage_daemon
from tests.limits import HANG_S
from tests.push.lab import files_of
from tests.push.proxy import Cut, Line, proxied
from tests.sites import GRAIN, TOKEN, ReceiverSite, receiver_site
from tests.sources.qemu_lab import QemuLab

SIZE = 32 * GRAIN
HOUR_US = 3_600_000_000


class Wall:
    """The wall clock by which snapshots are made and ages counted: the true one, moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead_us = 0
        moved = SimpleNamespace(time_ns=lambda: self.now_us() * 1000)
        for module in ("push.held", "push.pusher", "sources.image", "sources.qemu"):
            monkeypatch.setattr(f"replicator.{module}.time", moved)

    def now_us(self) -> int:
        return time.time_ns() // 1000 + self.ahead_us

    def go_on(self, hours: float) -> None:
        self.ahead_us += round(hours * HOUR_US)


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Wall:
    """Ages are looked at all the time, a broken line is tried again at once, and images are cloned by a copy."""

    def clone(target: int, _request: int, source: int) -> None:
        os.pwrite(target, os.pread(source, SIZE, 0), 0)
        now_ns = moved.now_us() * 1000
        os.utime(target, ns=(now_ns, now_ns))

    moved = Wall(monkeypatch)
    monkeypatch.setattr("replicator.sources.image.fcntl.ioctl", clone)
    monkeypatch.setattr(held, "LOOK_S", 0.0)
    monkeypatch.setattr(patience, "pause_s", lambda *_: 0.0)
    monkeypatch.setattr(sender, "_MESSAGE_TARGET", GRAIN)
    return moved


class Site:
    """A source of any kind, with a pusher on a line to a receiver."""

    def __init__(
        self, pusher: Pusher, log: EventLog, source: Source, rx: ReceiverSite, line: Line
    ) -> None:
        self.pusher, self.log, self.source, self.rx, self.line = pusher, log, source, rx, line

    @property
    def vm(self) -> ProtectedVm:
        (vm,) = self.log.vms
        return vm

    async def events(self) -> list[Any]:
        return await self.log.history(UUID(self.vm.vm))

    async def held(self) -> list[str]:
        return [each.push_id for each in await self.source.held()]

    async def until(self, kind: type) -> Any:
        """The first event of a kind."""
        with trio.fail_after(HANG_S):
            while not (found := [e for e in await self.events() if isinstance(e, kind)]):
                await self.log.wait_change()
        return found[0]


@asynccontextmanager
async def site_of(source: Source, folder: Path, **options: str) -> AsyncIterator[Site]:
    values = {
        "state_dir": str(folder / "sx"),
        "dr_auth_token": TOKEN,
        "source": "image",
        "dr_host": "127.0.0.1",
    }
    (folder / "sx").mkdir()
    async with (
        receiver_site(folder / "rx") as rx,
        proxied(rx.port) as line,
        open_log(folder / "sx" / "events") as log,
    ):
        config = check(values | options | {"dr_port": str(line.port)})
        link = Link(config, SourceCredentials(config))
        pusher = Pusher(config, log, source, link, patience_s=float("inf"))
        yield Site(pusher, log, source, rx, line)


def image_source(folder: Path) -> ImageSource:
    path = folder / "a.raw"
    path.write_bytes(os.urandom(SIZE))
    return ImageSource("web", {"disk-0": path}, folder / "sx" / "work", GRAIN)


@asynccontextmanager
async def site(tmp_path: Path, kind: str, **options: str) -> AsyncIterator[Site]:
    if kind == "image":
        async with site_of(image_source(tmp_path), tmp_path, **options) as made:
            yield made
        return
    async with storage_daemon({"disk-0": SIZE}) as daemon:
        lab = QemuLab(daemon)
        await lab.write("disk-0", 0, os.urandom(SIZE))
        async with site_of(lab.source(), tmp_path, **options) as made:
            yield made


# Age


@pytest.mark.parametrize("kind", ["image", "qemu"])
async def test_a_push_that_is_held_for_too_long_is_given_up_while_the_receiver_is_away(
    tmp_path: Path, wall: Wall, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with site(tmp_path, kind) as at, trio.open_nursery() as nursery:
        outcomes: list[Any] = []

        async def run() -> None:
            outcomes.append(await at.pusher.push(Want.RUN))

        away = trio.Event()

        async def look() -> None:
            if len(at.line.passed) > 1:
                away.set()

        at.line.cuts = [Cut(to_receiver=10 * GRAIN)]
        at.line.always = Cut(to_receiver=0)
        at.line.accepted = look
        nursery.start_soon(run)
        with trio.fail_after(HANG_S):
            await away.wait()
        (push_id,) = await at.held()
        wall.go_on(47.9)
        assert await at.held() == [push_id]
        wall.go_on(0.2)
        abandoned = await at.until(ProtectedVm.PushAbandoned)
        assert abandoned.push_id == push_id
        assert abandoned.reason == "its snapshot was held for 48 h, held_snapshot_hours is 48"
        with trio.fail_after(HANG_S):
            while await at.held():
                await trio.lowlevel.checkpoint()
        assert not outcomes
        # The line is back: a push of its own, and the receiver forgets what had landed of the old one.
        at.line.always = None
        with trio.fail_after(HANG_S):
            while not outcomes:
                await trio.lowlevel.checkpoint()
        assert not outcomes[0].resumed
        # A number is not used twice: the receiver might have had it.
        assert outcomes[0].point.number == 2
        assert len(await at.rx.read(None)) == SIZE
        assert await at.rx.store.unfinished() is None
        assert await at.held() == []
    assert "the receiver cannot be told: " in caplog.text


async def test_a_later_process_gives_it_up_and_tells_the_receiver(
    tmp_path: Path, wall: Wall
) -> None:
    async with site(tmp_path, "image") as at:
        await at.pusher.push(Want.RUN)
        (tmp_path / "a.raw").write_bytes(os.urandom(SIZE))
        at.pusher.patience.limit_s = 0.0
        at.line.cuts = [Cut(to_receiver=10 * GRAIN)]
        with pytest.raises(ConnectionLostError):
            await at.pusher.push(Want.PUSH)
        old = await at.rx.store.unfinished()
        assert await at.held() == [old]
        wall.go_on(100)
        outcome = await at.pusher.push(Want.PUSH)
        assert (outcome.point.kind, outcome.resumed) == (PushKind.CYCLE, False)
        assert outcome.point.push_id != old
        assert [e.push_id for e in await at.events() if hasattr(e, "push_id")] == [old]
        assert await at.held() == []
        assert await at.rx.read(None) == (tmp_path / "a.raw").read_bytes()


async def test_a_push_whose_snapshot_takes_no_room_is_held_for_ever(
    tmp_path: Path, wall: Wall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that are read in place."""
    monkeypatch.setattr(ImageSource, "_clone", lambda *_: False)
    async with site(tmp_path, "image") as at:
        at.pusher.patience.limit_s = 0.0
        at.line.cuts = [Cut(to_receiver=10 * GRAIN)]
        with pytest.raises(ConnectionLostError):
            await at.pusher.push(Want.SEED)
        wall.go_on(10_000)
        assert (await at.pusher.push(Want.SEED)).resumed


async def test_a_source_that_cannot_be_asked_how_old_its_snapshots_are_is_pushed_on(
    tmp_path: Path, wall: Wall, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def gone(_: object) -> list[HeldSnapshot]:
        await trio.lowlevel.checkpoint()
        raise SourceError("no QEMU at /run/qmp")

    async with site(tmp_path, "image") as at:
        at.pusher.patience.limit_s = 0.0
        at.line.cuts = [Cut(to_receiver=10 * GRAIN)]
        with pytest.raises(ConnectionLostError):
            await at.pusher.push(Want.SEED)
        wall.go_on(100)
        monkeypatch.setattr(ImageSource, "held", gone)
        assert (await at.pusher.push(Want.SEED)).resumed
    assert "how old snapshots are cannot be seen: no QEMU at /run/qmp" in caplog.messages


class SnapshotSource(ImageSource):
    """A platform whose reference is a snapshot that takes room, as a Nutanix cluster's is."""

    def __init__(self, folder: Path) -> None:
        path = folder / "a.raw"
        path.write_bytes(os.urandom(SIZE))
        super().__init__("web", {"disk-0": path}, folder / "sx" / "work", GRAIN)
        self.references: dict[str, HeldSnapshot] = {}
        self.taken: list[SnapshotName] = []
        self.stuck = False

    async def take(self, name: SnapshotName) -> Any:
        self.taken.append(name)
        return await super().take(name)

    async def confirm(self, name: SnapshotName) -> None:
        await super().confirm(name)
        self.references = {name.push_id: HeldSnapshot(name.push_id, held.now_us())}

    async def held(self) -> list[HeldSnapshot]:
        return [*await super().held(), *self.references.values()]

    async def sweep(self, keep: SnapshotName | None, reference: str | None) -> list[str]:
        if self.stuck:
            return []
        gone = [push for push in self.references if push != reference]
        for push in gone:
            del self.references[push]
        return [*gone, *await super().sweep(keep, reference)]


async def test_a_reference_that_is_held_for_too_long_is_let_go_of(
    tmp_path: Path, wall: Wall, caplog: pytest.LogCaptureFixture
) -> None:
    source = SnapshotSource(tmp_path)
    async with site_of(source, tmp_path) as at:
        await at.pusher.push(Want.RUN)
        (seed,) = source.references
        wall.go_on(49)
        outcome = await at.pusher.push(Want.RUN)
        assert outcome.point.kind is PushKind.CYCLE
        lost = await at.until(ProtectedVm.TrackingLost)
        assert lost.reason == "its reference was held for 49 h, held_snapshot_hours is 48"
        # Of the point that was made meanwhile it is the reference.
        assert list(source.references) == [outcome.point.push_id] != [seed]
    assert "web: the reference is let go of: its reference was held for 49 h" in caplog.text


async def test_a_push_goes_with_the_reference_that_it_rests_on(tmp_path: Path, wall: Wall) -> None:
    source = SnapshotSource(tmp_path)
    async with site_of(source, tmp_path) as at:
        await at.pusher.push(Want.RUN)
        (reference,) = source.references
        wall.go_on(30)
        source.references = {reference: HeldSnapshot(reference, held.now_us() - 30 * HOUR_US)}
        (tmp_path / "a.raw").write_bytes(os.urandom(SIZE))
        at.pusher.patience.limit_s = 0.0
        at.line.cuts = [Cut(to_receiver=10 * GRAIN)]
        with pytest.raises(ConnectionLostError):
            await at.pusher.push(Want.RUN)
        wall.go_on(19)  # the push is 19 hours old then
        await at.pusher.push(Want.RUN)
        abandoned = await at.until(ProtectedVm.PushAbandoned)
        assert abandoned.reason == "its reference was held for 49 h, held_snapshot_hours is 48"


# Number


class Listed:
    """A source that has these snapshots; ``sweep`` removes what it is told to be able to."""

    def __init__(self, held_ids: Sequence[str], removable: Sequence[str]) -> None:
        self.ids = list(held_ids)
        self.removable = removable
        self.sweeps: list[tuple[SnapshotName | None, str | None]] = []

    async def held(self) -> list[HeldSnapshot]:
        await trio.lowlevel.checkpoint()
        return [HeldSnapshot(each, 1) for each in self.ids]

    async def sweep(self, keep: SnapshotName | None, reference: str | None) -> list[str]:
        await trio.lowlevel.checkpoint()
        self.sweeps.append((keep, reference))
        gone = [each for each in self.ids if each in self.removable]
        self.ids = [each for each in self.ids if each not in self.removable]
        return gone


def limits(source: Listed, **options: str) -> HeldLimits:
    return HeldLimits(check(options), source)  # type: ignore[arg-type]


async def test_one_more_snapshot_may_be_made_while_there_is_room() -> None:
    source = Listed(["r", "s1"], ["s1"])
    await limits(source).make_room("r")
    assert source.sweeps == []


async def test_strays_go_before_one_more_is_made(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    source = Listed(["r", "s1", "s2"], ["s1", "s2"])
    await limits(source).make_room("r")
    assert (source.ids, source.sweeps) == (["r"], [(None, "r")])
    assert caplog.messages == [
        f"removed {each}, to make room for a snapshot" for each in ("s1", "s2")
    ]


@pytest.mark.parametrize(("most", "held_ids"), [("3", ["r", "s1", "s2"]), ("2", ["r", "s1"])])
async def test_none_is_made_where_strays_cannot_be_removed(most: str, held_ids: list[str]) -> None:
    source = Listed(held_ids, [])
    with pytest.raises(RefusedError) as caught:
        await limits(source, held_snapshots_max=most).make_room("r")
    assert str(caught.value) == (
        f"no snapshot is made: {most} of ours are at the source already (of the pushes {', '.join(held_ids)}) and"
        f" held_snapshots_max is {most}; see why they cannot be removed, remove them there by hand,"
        " or raise held_snapshots_max"
    )


async def test_a_push_that_finds_no_room_touches_nothing(tmp_path: Path, wall: Wall) -> None:
    del wall
    source = SnapshotSource(tmp_path)
    async with site_of(source, tmp_path) as at:
        await at.pusher.push(Want.RUN)
        taken, files = list(source.taken), files_of(tmp_path / "sx" / "work")
        source.references |= {each: HeldSnapshot(each, held.now_us()) for each in ("s1", "s2")}
        source.stuck = True
        with pytest.raises(RefusedError, match="held_snapshots_max is 3"):
            await at.pusher.push(Want.RUN)
        assert (source.taken, files_of(tmp_path / "sx" / "work")) == (taken, files)
        assert await at.rx.store.unfinished() is None
        source.stuck = False
        assert (await at.pusher.push(Want.RUN)).point.number == 2
        assert len(source.references) == 1
