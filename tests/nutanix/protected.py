# SPDX-License-Identifier: AGPL-3.0-or-later
"""A VM that is protected by one process after another, as the pusher drives a source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from replicator.errors import SnapshotGoneError
from replicator.sources.base import SnapshotName
from tests.nutanix.cluster import contents, process, replay
from tests.nutanix.fake import FakePrism, FakeWorld
from tests.sources.nutanix_lab import fake_world

GRAIN = 64 << 10
HOUR_US = 3_600_000_000


class Protected:
    """What survives a process: cluster, journal, the receiver's replica, and which point is the newest."""

    def __init__(self, folder: Path, data_path: str) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = {"data_path": data_path}
        self.world: FakeWorld = fake_world(2)
        self.items: dict[str, Any] = {}
        self.replica: dict[str, bytes] = {}
        self.newest: str | None = None

    def write(self, number: int) -> None:
        for disk in self.world.disks:
            disk.data[number * GRAIN : number * GRAIN + 700] = bytes([number]) * 700
            disk.data[9 * GRAIN : 10 * GRAIN] = bytes(GRAIN) if number % 2 else b"x" * GRAIN

    async def cycle(self, name: SnapshotName, prism: FakePrism | None = None) -> None:
        async with process(
            self.world, self.items, self.folder, prism=prism, **self.settings
        ) as source:
            snapshot = await source.take(name)
            assert snapshot.lost_tracking is None
            replica = await replay(snapshot, self.replica, name.reference)
            await snapshot.check()
            assert replica == contents(self.world)
            self.replica, self.newest = replica, name.push_id
            await source.confirm(name)
            await snapshot.aclose()

    def assert_clean(self) -> None:
        """Nothing is there but the reference, and the ledger holds nothing else."""
        wanted = [self.newest] if self.newest is not None else []
        assert [each.split("-")[2] for each in self.world.objects()] == wanted
        assert not self.world.attached
        held = [key for key in self.items if key.startswith("prism/")]
        assert [key.split("-")[-3] for key in held] == wanted, held
        assert list(self.folder.iterdir()) == []


async def come_back(run: Protected, name: SnapshotName, *, goes_on: bool) -> None:
    """As the pusher does after a crash: settle what was committed, else go on with the push or give it up; then sweep."""
    async with process(run.world, run.items, run.folder, **run.settings) as source:
        if run.newest == name.push_id:
            await source.confirm(name)
            await source.sweep(None, name.push_id)
        elif goes_on:
            await source.sweep(name, name.reference)
            try:
                snapshot = await source.reopen(name)
            except SnapshotGoneError:
                await source.abandon(name)
            else:
                replica = await replay(snapshot, run.replica, name.reference)
                await snapshot.aclose()
                assert replica == contents(run.world)
                run.replica, run.newest = replica, name.push_id
                await source.confirm(name)
        else:
            await source.sweep(None, name.reference)
        # What was begun and never came is struck out when nothing can come of it any more.
        run.world.now_us += 2 * HOUR_US
        await source.sweep(None, run.newest)
