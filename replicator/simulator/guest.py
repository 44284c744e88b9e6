# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whoever writes to a simulated VM's disks: keeps to the VM's lock, so that a snapshot is one instant over all disks.

A program outside does the same with ``flock --shared DIR/vms/UUID.lock COMMAND``.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import trio

from replicator import durable
from replicator.simulator.core import Core
from replicator.simulator.model import Disk, Vm


class Guest:
    """Writes to one disk of a VM. ``index`` counts the VM's disks that are no CD-ROM, in their order."""

    def __init__(self, core: Core, vm: str, index: int) -> None:
        self._core = core
        self._vm = vm
        self._index = index

    @property
    def disk(self) -> Disk:
        """The disk as the world has it now."""
        vm: Vm = self._core.world.vms[self._vm]
        return [disk for disk in vm.disks if not disk.cdrom][self._index]

    @property
    def path(self) -> Path:
        """The file with its bytes."""
        backing = self.disk.backing
        assert backing is not None
        return self._core.storage.disk(backing)

    async def write(self, offset: int, data: bytes) -> None:
        """Write; the range must lie inside the disk."""
        await trio.to_thread.run_sync(self._write, offset, data)

    def _write(self, offset: int, data: bytes) -> None:
        if offset < 0 or offset + len(data) > self.disk.size:
            raise ValueError(f"{len(data)} bytes at {offset} of a disk of {self.disk.size}")
        with self._core.storage.writing(self._vm), self.path.open("r+b") as file:
            os.pwrite(file.fileno(), data, offset)

    async def zero(self, offset: int, length: int) -> None:
        """Discard a range: it reads as zeros, and takes no room any more."""
        await trio.to_thread.run_sync(self._zero, offset, length)

    def _zero(self, offset: int, length: int) -> None:
        with self._core.storage.writing(self._vm), durable.DurableFile(self.path) as file:
            file.punch(offset, length)

    async def grow(self, by: int) -> None:
        """Make the disk longer, as Prism would; done when the task has ended."""
        task = self._core.resize_disk(self._vm, self.disk.uuid, self.disk.size + by)
        while task.completed_at is None:
            await trio.lowlevel.checkpoint()

    async def content(self) -> bytes:
        """The whole disk."""
        return await trio.to_thread.run_sync(self.path.read_bytes)

    async def sha256(self) -> str:
        """Of the whole disk."""

        def digest() -> str:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        return await trio.to_thread.run_sync(digest)
