# SPDX-License-Identifier: AGPL-3.0-or-later
"""Sources over the Prism in memory, as one process after another has them, and disks over iSCSI without a network."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from replicator.iscsi import IscsiSettings, Portal, Target
from replicator.sources.base import Snapshot
from replicator.sources.nutanix import NutanixSettings, NutanixSource, expose, open_site
from tests.nutanix.fake import VM, FakePrism, FakeWorld, MemoryStore
from tests.sources.nutanix_lab import fake_settings


class DyingStore(MemoryStore):
    """The journal of a process that may die: nothing is written after that."""

    def __init__(self, items: dict[str, Any], prism: FakePrism) -> None:
        super().__init__()
        self.items = items
        self._prism = prism

    async def journal_put(self, key: str, value: Any) -> None:
        self._prism.check_alive()
        await super().journal_put(key, value)

    async def journal_delete(self, key: str) -> None:
        self._prism.check_alive()
        await super().journal_delete(key)


class FakeTargets:
    """The data services of the cluster: what is attached in the world can be read."""

    def __init__(self, world: FakeWorld) -> None:
        self.world = world
        self.hidden = 0
        self.logins: list[IscsiSettings] = []

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(expose, "discover", self.discover)
        monkeypatch.setattr(expose, "open_reader", self.open_reader)

    async def discover(self, portal: Portal, settings: IscsiSettings) -> list[Target]:
        await trio.lowlevel.checkpoint()
        if self.hidden:
            self.hidden -= 1
            return []
        world = self.world
        return [
            Target(f"iqn.2010-06.com.nutanix:{world.groups[group][0]}-{group}-tgt0", (portal,))
            for group, initiator in world.attached.items()
            if initiator == settings.initiator
        ]

    @asynccontextmanager
    async def open_reader(
        self, portal: Portal, target: str, lun: int | None, settings: IscsiSettings
    ) -> AsyncGenerator[FakeReader, None]:
        assert lun is None
        assert portal.host == "127.0.0.1"
        self.logins.append(settings)
        group = next(uuid for uuid in self.world.groups if uuid in target)
        await trio.lowlevel.checkpoint()
        yield FakeReader(self.world, group)


class FakeReader:
    """Reads as long as the volume group is there and attached."""

    def __init__(self, world: FakeWorld, group: str) -> None:
        self._world = world
        self._group = group
        self.size = len(world.groups[group][1])

    async def read(self, offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        assert self._group in self._world.attached
        return self._world.groups[self._group][1][offset : offset + length]


@asynccontextmanager
async def process(
    world: FakeWorld,
    items: dict[str, Any],
    folder: Path,
    *,
    prism: FakePrism | None = None,
    **settings: Any,
) -> AsyncGenerator[NutanixSource, None]:
    """A new process with the VM's source, over the cluster and the journal that earlier ones left."""
    prism = prism or FakePrism(world)
    with_these: NutanixSettings = fake_settings(folder, **settings)
    store = DyingStore(items, prism)
    async with open_site(prism, store, with_these, clock=lambda: world.now_us) as site:
        yield NutanixSource(site, VM)


async def replay(snapshot: Snapshot, base: dict[str, bytes], since: str | None) -> dict[str, bytes]:
    """What a replica that held ``base`` holds after the snapshot's changes."""
    result = {}
    for disk in snapshot.disks:
        size = disk.view.size
        image = bytearray(base.get(disk.identity, b"")[:size].ljust(size, b"\0"))
        async with aclosing(disk.view.extents(since)) as extents:
            async for extent in extents:
                data = bytes(extent.length)
                if not extent.zero:
                    data = await disk.view.read(extent.offset, extent.length)
                image[extent.offset : extent.end] = data
        result[disk.identity] = bytes(image)
    return result


def contents(world: FakeWorld) -> dict[str, bytes]:
    return {disk.identity: bytes(disk.data) for disk in world.disks}
