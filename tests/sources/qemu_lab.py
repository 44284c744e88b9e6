# SPDX-License-Identifier: AGPL-3.0-or-later
"""``QemuSource`` over a storage daemon, as the conformance checks want it."""

from __future__ import annotations

from typing import ClassVar

from replicator.nbd.client import open_nbd
from replicator.sources.qemu import QemuSource
from tests.lab_qemu import StorageDaemon
from tests.sources.conformance import GRAIN


def own_server(daemon: StorageDaemon, work: str = "work") -> QemuSource:
    """A source that is told of no NBD server, with a working directory of this name."""
    path = daemon.root / work
    return QemuSource(daemon.qmp_socket, path, name="vm", grain=GRAIN, scratch_free_min=1)


class QemuLab:
    tracks = True
    live = True
    reference_takes_room = False
    SIZES: ClassVar = {"disk-a": 128 * GRAIN, "disk-b": 129 * GRAIN + 512}

    def __init__(self, daemon: StorageDaemon) -> None:
        self.daemon = daemon
        self.work = daemon.root / "work"

    @property
    def disks(self) -> list[str]:
        return sorted(self.daemon.disks)

    def source(self, *, scratch_free_min: int = 1 << 20) -> QemuSource:
        return QemuSource(
            self.daemon.qmp_socket,
            self.work,
            name="vm",
            nbd_socket=self.daemon.nbd_socket,
            grain=GRAIN,
            scratch_free_min=scratch_free_min,
        )

    async def write(self, disk: str, offset: int, data: bytes) -> None:
        await self.daemon.writer(disk).write(offset, data)

    async def zero(self, disk: str, offset: int, length: int) -> None:
        await self.daemon.writer(disk).zero(offset, length)

    async def grow(self, disk: str, by: int) -> None:
        await self.daemon.resize(disk, self.daemon.disks[disk] + by)

    async def content(self, disk: str) -> bytes:
        async with open_nbd(self.daemon.nbd_socket, disk) as client:
            return await client.read(0, client.size)

    async def leftovers(self) -> list[str]:
        files = sorted(path.name for path in self.work.iterdir()) if self.work.exists() else []
        return await self.daemon.leftovers() + files
