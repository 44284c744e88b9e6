# SPDX-License-Identifier: AGPL-3.0-or-later
"""Many cycles on a cluster that fails at random: nothing is left behind, and every point is the disks to the byte.

The seeds are fixed. Nothing is tried again by the client: what it would hide has to be borne here.
"""

from __future__ import annotations

import dataclasses
import random
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from replicator.errors import ReferenceLostError, SnapshotGoneError, SourceError
from replicator.simulator.faults import Kind
from replicator.simulator.running import Simulator, running_simulator
from replicator.sources.base import Snapshot, SnapshotName
from replicator.sources.nutanix import NutanixSource
from tests.limits import HANG_S
from tests.nutanix.fake import MemoryStore
from tests.sources.simulated import WAITS, Api, SimulatedLab, objects, scenario, site_on

GRAIN: Final = 64 << 10
RUNS: Final = 50
SIZES: Final = (24 * GRAIN, 17 * GRAIN + 512)
#: Nor is anything waited for that does not come.
HARSH: Final = dataclasses.replace(
    WAITS,
    retry_s=0.0,
    settle_s=0.0,
    snapshot_s=3.0,
    snapshot_application_s=3.0,
    group_s=3.0,
    delete_s=3.0,
)
FAULTS: Final[tuple[Kind, ...]] = (
    "rate-limit",
    "rate-limit-400",
    "unauthorized",
    "forget-sessions",
    "server-error",
    "reset-before",
    "reset-after",
    "etag-stale",
    "etag-stale-in-task",
    "task-failed",
    "half-created",
    "snapshot-expired",
    "reference-invalid",
    "regions-not-found",
    "regions-stuck",
    "application-downgraded",
)


async def _replay(
    snapshot: Snapshot, base: dict[str, bytes], since: str | None
) -> dict[str, bytes]:
    """What a replica holds afterwards; a disk that cannot be told of is read in whole."""
    result = {}
    for disk in snapshot.disks:
        size = disk.view.size
        for reference in (since, None):
            older = base[disk.identity] if reference is not None else b""
            image = bytearray(older[:size].ljust(size, b"\0"))
            try:
                async with aclosing(disk.view.extents(reference)) as extents:
                    async for extent in extents:
                        data = bytes(extent.length)
                        if not extent.zero:
                            data = await disk.view.read(extent.offset, extent.length)
                        image[extent.offset : extent.end] = data
            except ReferenceLostError:
                assert reference is not None
                continue
            result[disk.identity] = bytes(image)
            break
    return result


class Run:
    """A VM that is protected while its cluster fails."""

    def __init__(self, simulator: Simulator, lab: SimulatedLab, dice: random.Random) -> None:
        self.simulator = simulator
        self.lab = lab
        self.dice = dice
        self.replica: dict[str, bytes] = {}
        self.newest: str | None = None
        self.failed = 0

    async def write(self) -> None:
        for disk, size in zip(self.lab.disks, SIZES, strict=True):
            for _ in range(3):
                at = self.dice.randrange(0, size - 5120, 512)
                await self.lab.write(disk, at, self.dice.randbytes(4608))
            await self.lab.zero(disk, self.dice.randrange(16) * GRAIN, GRAIN)

    async def contents(self) -> dict[str, bytes]:
        return {disk: await self.lab.content(disk) for disk in self.lab.disks}

    async def cycle(self, push_id: str) -> None:
        source = self.lab.source()
        name = SnapshotName(push_id, self.newest)
        expected = await self.contents()
        for kind in self.dice.sample(FAULTS, 3):
            every = self.dice.randrange(1, 12)
            self.simulator.faults.add(kind, count=1, every=every, value=0)
        try:
            await self._finish(source, name, await source.take(name), expected)
        except SourceError:
            self.failed += 1
            self.simulator.faults.clear()
            await self._come_back(name, expected)
        self.simulator.faults.clear()

    async def _finish(
        self,
        source: NutanixSource,
        name: SnapshotName,
        snapshot: Snapshot,
        expected: dict[str, bytes],
    ) -> None:
        try:
            replica = await _replay(snapshot, self.replica, name.reference)
            await snapshot.check()
            assert replica == expected
            self.replica, self.newest = replica, name.push_id
            await source.confirm(name)
        finally:
            with trio.CancelScope(shield=True):
                await snapshot.aclose()

    async def _come_back(self, name: SnapshotName, expected: dict[str, bytes]) -> None:
        source = self.lab.source()
        if self.newest == name.push_id:
            await source.confirm(name)
            return
        if self.dice.random() < 0.5:
            try:
                await self._finish(source, name, await source.reopen(name), expected)
            except SnapshotGoneError:
                await source.abandon(name)
            return
        await source.abandon(name)

    async def settle(self) -> None:
        """Until no task runs; then nothing may be left but the reference."""
        with trio.fail_after(HANG_S):
            tasks = self.simulator.world.tasks
            while any(task.completed_at is None for task in tasks.values()):
                await trio.lowlevel.checkpoint()
        await self.lab.source().sweep(None, self.newest)
        wanted = [] if self.newest is None else [self.newest]
        assert [each.split("-")[2] for each in objects(self.simulator)] == wanted
        assert not self.simulator.world.volume_groups


@pytest.mark.parametrize("api", ["v3", "v4"])
async def test_random_faults_on_the_cluster(api: Api, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    store = MemoryStore()
    settings: dict[str, Any] = {"cleanup_s": float(HANG_S)}
    async with (
        running_simulator(tmp_path / "simulator", scenario(2, SIZES)) as simulator,
        site_on(simulator, api, store, work, waits=HARSH, **settings) as site,
    ):
        run = Run(simulator, SimulatedLab(simulator, site), random.Random(api))
        for number in range(RUNS):
            await run.write()
            await run.cycle(f"r{number}")
            await run.settle()
        await run.write()
        await run.cycle("last")
    assert RUNS // 5 < run.failed < RUNS, "some fail and some do not"
