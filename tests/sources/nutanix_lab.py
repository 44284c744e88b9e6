# SPDX-License-Identifier: AGPL-3.0-or-later
"""``NutanixSource`` as the conformance checks want it, over a Prism in memory or over the simulator."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import trio

from replicator.prism.types import Attachment, Capability, Secrets, VolumeGroup
from replicator.sources.nutanix import NutanixSettings, NutanixSite, NutanixSource, open_site
from tests.iscsi.lab import TargetDaemon
from tests.nutanix.fake import VM, FakeDisk, FakePrism, FakeWorld, MemoryStore
from tests.sources.conformance import GRAIN

INITIATOR = "iqn.2026-01.org.example:dr-service-01"


def fake_world(disks: int) -> FakeWorld:
    """A VM with disks of odd sizes, their identities not in the order of their numbers."""
    sizes = (128 * GRAIN, 129 * GRAIN + 512)
    names = ("d0f00000-0000-4000-8000-000000000001", "a0f00000-0000-4000-8000-000000000002")
    return FakeWorld(
        [FakeDisk(names[i], f"backing-{i}", i, bytearray(sizes[i])) for i in range(disks)]
    )


def fake_settings(working_dir: Path, **changes: Any) -> NutanixSettings:
    values: dict[str, Any] = {
        "initiator": INITIATOR,
        "working_dir": working_dir,
        "data_path": "rest",
    }
    return NutanixSettings(**(values | changes))


class FakeLab:
    """Reads over REST."""

    tracks = True
    live = True
    reference_takes_room = True

    def __init__(self, world: FakeWorld, site: NutanixSite) -> None:
        self.world = world
        self.site = site

    @property
    def disks(self) -> list[str]:
        return [disk.identity for disk in self.world.disks]

    def source(self) -> NutanixSource:
        return NutanixSource(self.site, VM)

    def _disk(self, identity: str) -> FakeDisk:
        return next(disk for disk in self.world.disks if disk.identity == identity)

    async def write(self, disk: str, offset: int, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        held = self._disk(disk).data
        assert offset + len(data) <= len(held)
        held[offset : offset + len(data)] = data

    async def zero(self, disk: str, offset: int, length: int) -> None:
        await self.write(disk, offset, bytes(length))

    async def grow(self, disk: str, by: int) -> None:
        await trio.lowlevel.checkpoint()
        self._disk(disk).data.extend(bytes(by))

    async def content(self, disk: str) -> bytes:
        await trio.lowlevel.checkpoint()
        return bytes(self._disk(disk).data)

    async def leftovers(self) -> list[str]:
        await trio.lowlevel.checkpoint()
        files = [path.name for path in self.site.settings.working_dir.iterdir()]
        return self.world.objects() + files


class TargetPrism(FakePrism):
    """Volume groups are served by a real tgtd, with CHAP both ways, to the initiator that is attached."""

    def __init__(self, world: FakeWorld, daemon: TargetDaemon) -> None:
        super().__init__(world, capability=Capability.V4)
        self._daemon = daemon
        self._targets: dict[str, int] = {}
        self._accounts: set[str] = set()
        self._made = 0

    async def attach(
        self, group: VolumeGroup, initiator: str, secrets: Secrets | None, request_id: UUID
    ) -> Attachment:
        assert secrets is not None
        assert secrets.client is not None
        self._made += 1
        tid = self._targets[group.uuid] = self._made
        file = self._daemon.root / f"{tid}.raw"
        file.write_bytes(self.world.groups[group.uuid][1])
        name = f"iqn.2010-06.com.nutanix:{group.target.lower()}-tgt0"
        await self._daemon.add_target(tid, name, initiator)
        await self._daemon.add_disk(file, tid)
        # The daemon knows one password for a name: a process has one of each for all its groups.
        for user, secret, more in (
            ("cluster", secrets.client, ["--outgoing"]),
            (initiator, secrets.target, []),
        ):
            if user not in self._accounts:
                self._accounts.add(user)
                await self._daemon.admin("account", "new", f"--user={user}", f"--password={secret}")
            await self._daemon.admin("account", "bind", f"--tid={tid}", f"--user={user}", *more)
        return await super().attach(group, initiator, secrets, request_id)

    async def delete_volume_group(self, uuid: str) -> None:
        tid = self._targets.pop(uuid, None)
        if tid is not None:
            await self._daemon.admin("target", "delete", f"--tid={tid}", "--force")
        await super().delete_volume_group(uuid)


@asynccontextmanager
async def target_lab(
    working_dir: Path, daemon: TargetDaemon, disks: int = 2
) -> AsyncGenerator[FakeLab, None]:
    """Reads over iSCSI."""
    world = fake_world(disks)
    settings = fake_settings(working_dir, data_path="iscsi", data_services=daemon.portal)
    prism = TargetPrism(world, daemon)
    async with open_site(prism, MemoryStore(), settings, clock=lambda: world.now_us) as site:
        yield FakeLab(world, site)


@asynccontextmanager
async def fake_lab(working_dir: Path, disks: int = 2) -> AsyncGenerator[FakeLab, None]:
    world = fake_world(disks)
    prism = FakePrism(world)
    settings = fake_settings(working_dir)
    async with open_site(prism, MemoryStore(), settings, clock=lambda: world.now_us) as site:
        yield FakeLab(world, site)
