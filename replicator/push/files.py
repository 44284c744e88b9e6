# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a source keeps on its own disk for one VM: the maps of its disks, and the spools of a push. All methods block."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from uuid import UUID

import msgspec

from replicator import durable
from replicator.config import Config
from replicator.disk import DiskView
from replicator.domain.model import Point, PointDisk, file_stem
from replicator.errors import DamageError
from replicator.imagemap import ImageMap
from replicator.phcbt.format import Algorithm, StreamHeader
from replicator.push import spool
from replicator.push.differing import Differing
from replicator.push.journal import EntryDisk, PushEntry
from replicator.push.sender import DiskJob

#: Bytes of a grain in a new chain; a chain that exists keeps its own.
GRAIN = 65536
#: Digest algorithms as the configuration names them.
_DIGESTS = {Algorithm.XXH3_128: "xxh3-128", Algorithm.BLAKE3_256: "blake3-256"}


class PushFiles:
    """The maps and spools of one VM; errors are those of the maps (DamageError, StateError) and OSError."""

    def __init__(self, config: Config, vm: UUID) -> None:
        self._vm = vm
        self._work = config.work_path
        self._maps = config.state_dir / "maps" / str(vm)
        self._chunk = config.chunk
        self._algorithm = next(
            algorithm for algorithm, name in _DIGESTS.items() if name == config.dr_digest
        )

    def prepare(self) -> None:
        """Make the folders."""
        for folder in (self._work, self._maps.parent, self._maps):
            durable.make_dir(folder)

    def begin(self, entry: PushEntry) -> None:
        """Make the folder of a push's spools."""
        durable.make_dir(entry.folder(self._work))

    def end(self, entry: PushEntry) -> None:
        """Remove a push's spools."""
        _remove_tree(entry.folder(self._work))

    def sweep(self, entry: PushEntry | None) -> None:
        """Remove the spools of every push but this one."""
        keep = entry.folder(self._work) if entry is not None else None
        for folder in sorted(self._work.glob("push-*")):
            if folder != keep:
                _remove_tree(folder)

    def misfit(self, newest: Point) -> str | None:
        """A disk whose map is not the newest point's, or None if all are."""
        for disk in newest.disks:
            if not spool.map_is_at(self._map(disk), disk, newest.number):
                return disk.disk
        return None

    def other_digest(self, newest: Point) -> list[tuple[str, str]]:
        """The disks whose chain has another digest than the configuration asks for now, and which it is."""
        found = []
        for disk in newest.disks:
            path = self._map(disk)
            if not spool.map_is_at(path, disk, newest.number):
                continue  # it will be seeded
            with ImageMap.open(path) as known:
                if known.algorithm is not self._algorithm:
                    found.append((disk.disk, _DIGESTS[known.algorithm]))
        return found

    def forget_maps(self) -> None:
        """Whatever the maps say is not what the receiver has; without them no cycle is planned, only a seed."""
        _remove_files(self._maps)

    def job(self, entry: PushEntry, index: int, disk: EntryDisk, view: DiskView) -> DiskJob:
        """The sending of one disk, its spool standing where it was left. The caller closes it."""
        full = disk.since == entry.point
        shell = PointDisk(disk.disk, disk.identity, disk.size, disk.base_root, disk.since)
        known = None if full else ImageMap.open(self._map(shell))
        try:
            algorithm = known.algorithm if known is not None else self._algorithm
            grain = known.grain if known is not None else GRAIN
            header = StreamHeader(
                algorithm=algorithm,
                grain=grain,
                chunk=max(self._chunk, grain),
                disk_size=disk.size,
                vm=self._vm,
                base_point=0 if full else entry.parent,
                target_point=entry.point,
                base_root=disk.base_root,
                disk_id=disk.disk,
            )
            skeleton = spool.Spool(self._skeleton(entry, disk), header)
        except BaseException:
            if known is not None:
                known.close()
            raise
        only = None
        if known is not None and (disk.scan_root is not None or not disk.compare):
            known.close()
            known = None
        if disk.scan_root is not None:
            try:
                only = Differing(self._map(shell), self.scan(entry, shell))
            except BaseException:
                skeleton.close()
                raise
        since = entry.reference if not full and not disk.compare else None
        return DiskJob(disk.disk, index, view, since, known, skeleton, only)

    def scan(self, entry: PushEntry, disk: PointDisk) -> Path:
        """The map of a disk as it was read for a resync."""
        return entry.folder(self._work) / f"{file_stem(disk.disk, disk.since)}.scan"

    def fresh(self, entry: PushEntry, disk: PointDisk) -> Path:
        """The map of the receiver's newest point, while it is made."""
        return entry.folder(self._work) / f"{file_stem(disk.disk, disk.since)}.map"

    def install(self, entry: PushEntry, disks: Iterable[PointDisk]) -> None:
        """Take the maps that were made from the receiver's for ours."""
        for disk in disks:
            durable.rename(self.fresh(entry, disk), self._map(disk))

    def differing(self, entry: PushEntry) -> tuple[int, int]:
        """Of a resync: bytes of the disks that were compared, and bytes of them that differ."""
        compared = differ = 0
        for disk in entry.disks or ():
            if disk.scan_root is None:
                continue
            shell = PointDisk(disk.disk, disk.identity, disk.size, b"", disk.since)
            with Differing(self._map(shell), self.scan(entry, shell)) as found:
                compared += disk.size
                differ += sum(extent.length for extent in found.extents())
        return compared, differ

    def known_map(self, disk: EntryDisk) -> Path:
        """The map of the newest point's disk."""
        return self._map(PointDisk(disk.disk, disk.identity, disk.size, b"", disk.since))

    def final_disks(self, entry: PushEntry) -> list[PointDisk]:
        """What each disk is after the push.

        Raises DamageError if that is not what a resync has read: then what was sent is not what differs.
        """
        result: list[PointDisk] = []
        for disk in entry.disks or ():
            shell = PointDisk(disk.disk, disk.identity, disk.size, b"", disk.since)
            full = disk.since == entry.point
            root = spool.new_root(self._skeleton(entry, disk), self._map(shell), shell, full)
            if disk.scan_root not in (None, root):
                raise DamageError(
                    f"{disk.disk}: what was sent does not lead to what was read when it was compared"
                )
            result.append(msgspec.structs.replace(shell, root=root))
        return result

    def advance_maps(self, entry: PushEntry, point: Point) -> None:
        """Bring the maps to a committed point, and remove those of disks that it does not have. Can be repeated."""
        wanted: set[Path] = set()
        for disk, known in zip(entry.disks or (), point.disks, strict=True):
            path = self._map(known)
            wanted.add(path)
            spool.advance_map(self._skeleton(entry, disk), path, known, point.number)
        for path in sorted(self._maps.iterdir()):
            if path not in wanted:
                durable.unlink(path)

    def _map(self, disk: PointDisk) -> Path:
        return self._maps / f"{file_stem(disk.disk, disk.since)}.map"

    def _skeleton(self, entry: PushEntry, disk: EntryDisk) -> Path:
        return entry.folder(self._work) / f"{file_stem(disk.disk, disk.since)}.skeleton"


def _remove_tree(folder: Path) -> None:
    """Remove a folder of files (one level)."""
    if folder.is_dir():
        _remove_files(folder)
        durable.remove_dir(folder)


def _remove_files(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        durable.unlink(path)
    durable.sync_dir(folder)
