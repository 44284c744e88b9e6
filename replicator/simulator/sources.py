# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where the bytes of a new disk come from: the file is there, and its size is known, when the source is made."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from replicator.simulator.model import Snapshot, SnapshotDisk, World
from replicator.simulator.storage import Storage, copy, make_blank
from replicator.simulator.web import HttpError

_SNAPSHOT_PATH = re.compile(
    r"/[^/]+/\.snapshot/\d+/[\w-]+-(?P<number>\d+)/\.acropolis/vmdisk/(?P<backing>[\w-]+)"
)
_LIVE_PATH = re.compile(r"/[^/]+/\.acropolis/vmdisk/(?P<backing>[\w-]+)")


@dataclass(frozen=True, slots=True)
class DiskSource:
    """``size`` in bytes; ``fill`` makes the new disk's file, at least ``size`` long. Blocks."""

    size: int
    fill: Callable[[Path, int], None]

    async def write(self, target: Path, size: int) -> None:
        """Make the file in a worker thread."""
        await trio.to_thread.run_sync(self.fill, target, size)


class Sources:
    """Finds sources. Each method raises HttpError 404 for what is not there."""

    def __init__(self, world: World, storage: Storage) -> None:
        self._world = world
        self._storage = storage

    def _file(self, path: Path, what: str) -> DiskSource:
        if not path.is_file():
            raise HttpError(404, f"{what} has no data", "not_found")
        return DiskSource(path.stat().st_size, lambda target, size: copy(path, target, size))

    def blank(self, size: int) -> DiskSource:
        """Zeros."""
        return DiskSource(size, make_blank)

    def snapshot_disk(self, uuid: str) -> DiskSource:
        """A disk in a snapshot, by the disk recovery point's id."""
        find_snapshot_disk(self._world, uuid)
        return self._file(self._storage.snapshot(uuid), f"disk recovery point {uuid}")

    def path(self, path: str) -> DiskSource:
        """A file by its path in a container: one of a snapshot, or a disk as it is now."""
        snapshot = _SNAPSHOT_PATH.fullmatch(path)
        if snapshot is not None:
            _, disk = find_path(self._world, path)
            return self.snapshot_disk(disk.uuid)
        live = _LIVE_PATH.fullmatch(path)
        if live is None:
            raise HttpError(404, f"kInvalidValue: no file {path}", "not_found")
        return self._file(self._storage.disk(live["backing"]), path)

    def vm_disk(self, uuid: str) -> DiskSource:
        """A VM's disk as it is now, by device or backing."""
        for vm in self._world.vms.values():
            for disk in vm.disks:
                if uuid in (disk.uuid, disk.backing) and disk.backing is not None:
                    return self._file(self._storage.disk(disk.backing), f"disk {uuid}")
        raise HttpError(404, f"no VM disk {uuid}", "not_found")

    def group_disk(self, uuid: str) -> DiskSource:
        """A disk of a volume group."""
        return self._file(self._storage.group_disk(uuid), f"volume disk {uuid}")

    def image(self, uuid: str) -> DiskSource:
        """An image with data."""
        if uuid not in self._world.images:
            raise HttpError(404, f"no image {uuid}", "not_found")
        return self._file(self._storage.image(uuid), f"image {uuid}")


def find_snapshot_disk(world: World, uuid: str) -> tuple[Snapshot, SnapshotDisk]:
    """The snapshot that holds a disk recovery point. Raises HttpError 404."""
    for snapshot in world.snapshots.values():
        for part in snapshot.vms:
            for disk in part.disks:
                if disk.uuid == uuid:
                    return snapshot, disk
    raise HttpError(404, f"no disk recovery point {uuid}", "not_found")


def snapshot_path(world: World, uuid: str) -> str:
    """v3's path of a disk in a snapshot. Raises HttpError 404."""
    snapshot, disk = find_snapshot_disk(world, uuid)
    container = world.containers.get(disk.container)
    name = container.name if container is not None else "default-container"
    number = snapshot.number
    return (
        f"/{name}/.snapshot/{number % 100:02d}/6547-1700000000000000-{number}"
        f"/.acropolis/vmdisk/{disk.backing}"
    )


def live_path(world: World, backing: str, container: str) -> str:
    """v3's path of a disk as it is now."""
    found = world.containers.get(container)
    return f"/{found.name if found else 'default-container'}/.acropolis/vmdisk/{backing}"


def find_path(world: World, path: str) -> tuple[Snapshot, SnapshotDisk]:
    """The disk in a snapshot that v3's path names. Raises HttpError 404 as v3 words it."""
    match = _SNAPSHOT_PATH.fullmatch(path)
    if match is not None:
        for snapshot in world.snapshots.values():
            if snapshot.number != int(match["number"]):
                continue
            for part in snapshot.vms:
                for disk in part.disks:
                    if disk.backing == match["backing"] and snapshot_path(world, disk.uuid) == path:
                        return snapshot, disk
    raise HttpError(404, "kInvalidValue: snapshot file not found", "not_found")
