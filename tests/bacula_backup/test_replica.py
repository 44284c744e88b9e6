# SPDX-License-Identifier: AGPL-3.0-or-later
"""Backups of recovery points on the receiver: a running receiver, its control socket and its exports are real."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from bacula_adapter.backend.interface import Level
from receiver.failover.clone import CloneManager
from receiver.service.control import ControlApi
from replicator.config import check
from replicator.control.metrics import Live, Metrics
from replicator.control.server import serve_http
from replicator.errors import RefusedError, ReplicatorError, UsageError
from tests.bacula_backup.lab import GRAIN, Catalogue
from tests.sites import ReceiverSite, SourceSite, receiver_site, source_site

FULL, INCREMENTAL, DIFFERENTIAL = Level.FULL, Level.INCREMENTAL, Level.DIFFERENTIAL
GRAINS = 64


@dataclass
class ReplicaLab:
    rx: ReceiverSite
    sx: SourceSite
    values: dict[str, str]
    catalogue: Catalogue

    def configure(self, **values: str) -> None:
        self.catalogue.config = check(self.values | values)

    async def push(self, *writes: tuple[str, int, bytes]) -> dict[str, bytes]:
        """A point, applied; what it holds."""
        for disk, offset, data in writes:
            self.sx.write(disk, offset, data)
        await self.sx.push()
        await self.rx.settled()
        return {disk: self.sx.content(disk) for disk in self.sx.disks}


@asynccontextmanager
async def replica_lab(tmp_path: Path, **options: Any) -> AsyncIterator[ReplicaLab]:
    disks = {}
    for number, grains in enumerate((GRAINS, 9)):
        disks[f"disk-{number}"] = path = tmp_path / f"{number}.img"
        with path.open("wb") as file:
            file.truncate(grains * GRAIN)
    async with (
        receiver_site(tmp_path / "rx", **options) as rx,
        source_site(tmp_path / "sx", rx.port, disks) as sx,
        trio.open_nursery() as nursery,
    ):
        clones = CloneManager(rx.config, rx.log, rx.stores, nursery)
        api = ControlApi(rx.log, rx.stores, clones, tmp_path / "run", Metrics(rx.log, Live()))
        await nursery.start(serve_http, rx.config.control_path, api.handle)
        values = {"from": "replica", "state_dir": str(tmp_path / "rx")}
        yield ReplicaLab(rx, sx, values, Catalogue(check(values)))
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("apply", ["yes", "no"])
async def test_points_as_a_chain(
    apply: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether the deltas between two points are kept forward or reverse."""
    async with replica_lab(tmp_path, push_apply_remote=apply) as it:
        points = [await it.push(("disk-0", 0, os.urandom(3 * GRAIN)), ("disk-1", 0, b"x"))]
        full = await it.catalogue.run(FULL)
        assert full.description().root_name == "@replica"
        assert full.description().point == 1
        assert it.catalogue.images() == points[0]
        await it.push(("disk-0", 10 * GRAIN, os.urandom(GRAIN)))
        points.append(await it.push(("disk-0", GRAINS * GRAIN, os.urandom(GRAIN))))
        second = await it.catalogue.run(INCREMENTAL)
        assert second.description().point == 3
        assert 2 * GRAIN < second.bytes < 3 * GRAIN
        assert it.catalogue.images() == points[1]
        points.append(await it.push(("disk-1", GRAIN, b"y"), ("disk-0", 0, bytes(GRAIN))))
        third = await it.catalogue.run(DIFFERENTIAL)
        assert {disk.kind for disk in third.description().disks} == {"delta"}
        assert third.bytes < 4 * GRAIN
        assert it.catalogue.images() == points[2]
        assert "reference_snapshot" not in caplog.text
        assert not it.rx.store.is_held(4)


async def test_a_point_that_is_asked_for(tmp_path: Path) -> None:
    async with replica_lab(tmp_path) as it:
        first = await it.push(("disk-0", 0, os.urandom(GRAIN)))
        await it.push(("disk-0", 0, os.urandom(GRAIN)))
        it.configure(point="1")
        await it.catalogue.run(FULL)
        assert it.catalogue.images() == first
        it.configure(point="9")
        with pytest.raises(RefusedError, match="no recovery point 9"):
            await it.catalogue.run(FULL)
        # Back in time: what changed cannot be told in that direction, and digests are compared.
        it.configure(point="2")
        await it.catalogue.run(INCREMENTAL)
        it.configure(point="1")
        await it.catalogue.run(INCREMENTAL)
        assert it.catalogue.images() == first


async def test_a_point_that_was_let_go_of_meanwhile(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with replica_lab(tmp_path, dr_restore_points="2") as it:
        content = await it.push(("disk-0", 0, os.urandom(GRAIN)))
        await it.catalogue.run(FULL)
        for number in range(1, 4):
            content = await it.push(("disk-0", number * GRAIN, os.urandom(100)))
        assert 1 not in it.rx.store.vm.points
        delta = await it.catalogue.run(INCREMENTAL)
        assert {disk.kind for disk in delta.description().disks} == {"delta"}
        assert 3 * GRAIN < delta.bytes < 4 * GRAIN
        assert "reference_snapshot not found: VM web has no recovery point 1" in caplog.text
        assert "comparing digests" in caplog.text
        assert it.catalogue.images() == content


async def test_vms_that_are_chosen(tmp_path: Path) -> None:
    async with replica_lab(tmp_path) as it:
        with pytest.raises(UsageError, match="no VM with a recovery point"):
            await it.catalogue.run(FULL)
        await it.push(("disk-0", 0, b"x"))
        it.configure(vm="w*", exclude="nobody")
        assert (await it.catalogue.run(FULL)).description().vm == "web"
        it.configure(vm="other")
        with pytest.raises(UsageError, match="no VM with a recovery point"):
            await it.catalogue.run(FULL)


async def test_no_receiver(tmp_path: Path) -> None:
    values = {"from": "replica", "state_dir": str(tmp_path)}
    with pytest.raises(ReplicatorError, match=r"no receiver listens at .*: start it with"):
        await Catalogue(check(values)).run(FULL)


async def test_what_changed_between_two_points(tmp_path: Path) -> None:
    """The control route: ranges, growth, and its refusals."""
    async with replica_lab(tmp_path) as it:
        await it.push(("disk-0", 0, b"x"))
        await it.push(("disk-0", 3 * GRAIN, os.urandom(GRAIN)))
        await it.push(("disk-0", GRAINS * GRAIN, os.urandom(GRAIN)))
        store = it.rx.store

        async def told(older: int, newer: int, disk: str = "disk-0") -> list[tuple[int, int]]:
            async with (
                store.hold(older) as one,
                store.hold(newer) as other,
                store.open_changes(one, other, disk) as found,
            ):
                return [(each.offset // GRAIN, each.length // GRAIN) for each in found]

        assert await told(1, 1) == []
        assert await told(1, 2) == [(3, 1)]
        assert await told(1, 3) == [(3, 1), (GRAINS, 1)]
        assert await told(2, 3) == [(GRAINS, 1)]
        assert await told(1, 3, "disk-1") == []
        with pytest.raises(RefusedError, match="older"):
            await told(3, 1)
        with pytest.raises(RefusedError, match="disk-9"):
            await told(1, 3, "disk-9")
