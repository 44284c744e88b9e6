# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where the receiver keeps what, below ``state_dir/vms/<uuid>``. Names only; nothing is touched here.

    replica/disk-0.raw      the disk as of the last applied point: sparse, plain
    replica/disk-0.map      its grains' digests (docs/image-root.md)
    head/disk-0.map         the digests of the newest committed point
    points/7/disk-0.phcbt   forward delta that made point 7, until it is applied
    points/7/disk-0.rev.phcbt   reverse delta from point 8 back to 7
    points/8.partial/       a push that is landing
    clones/<id>/            overlays of test clones

A disk whose chain of deltas began anew at point N (added later, seeded again) is called ``disk-0@N`` in all of these,
so that a new chain never touches what older points are made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from replicator.domain.model import Point, PointDisk, file_stem
from replicator.domain.vm import ProtectedVm


def stem(disk: PointDisk) -> str:
    """The name of a disk's files in its chain."""
    return file_stem(disk.disk, disk.since)


@dataclass(frozen=True, slots=True)
class VmPaths:
    """The folders of one VM."""

    root: Path

    @classmethod
    def of(cls, state_dir: Path, vm: UUID) -> VmPaths:
        """The paths of a VM below the state directory; a UUID cannot lead out of it."""
        return cls(state_dir / "vms" / str(vm))

    @property
    def folders(self) -> list[Path]:
        """All folders that a VM has from the start, parents first."""
        return [self.root, self.root / "replica", self.root / "head", self.points]

    @property
    def points(self) -> Path:
        """The folders of points, and of pushes that are landing."""
        return self.root / "points"

    @property
    def clones(self) -> Path:
        """Overlays of test clones."""
        return self.root / "clones"

    def replica(self, disk: PointDisk) -> Path:
        """The replica of a disk's chain."""
        return self.root / "replica" / f"{stem(disk)}.raw"

    def replica_map(self, disk: PointDisk) -> Path:
        """The digests of the replica."""
        return self.root / "replica" / f"{stem(disk)}.map"

    def head_map(self, disk: PointDisk) -> Path:
        """The digests of the newest point."""
        return self.root / "head" / f"{stem(disk)}.map"

    def point(self, number: int) -> Path:
        """The folder of a committed point."""
        return self.points / str(number)

    def partial(self, number: int) -> Path:
        """The folder of a push that would become this point."""
        return self.points / f"{number}.partial"

    def forward(self, number: int, disk: PointDisk) -> Path:
        """The delta that brought a disk to this point."""
        return self.point(number) / f"{stem(disk)}.phcbt"

    def reverse(self, number: int, disk: PointDisk) -> Path:
        """The delta that leads back to this point from the next."""
        return self.point(number) / f"{stem(disk)}.rev.phcbt"


def chain_end(vm: ProtectedVm, disk: PointDisk) -> int:
    """The last applied point of a disk's chain: reverse deltas lead from here back. 0 if none is applied."""
    numbers = [
        number
        for number, point in vm.points.items()
        if number <= vm.applied and _same_chain(point, disk)
    ]
    return max(numbers, default=0)


def _same_chain(point: Point, disk: PointDisk) -> bool:
    other = point.disk(disk.disk)
    return other is not None and other.since == disk.since


def expected_files(vm: ProtectedVm, paths: VmPaths) -> tuple[set[Path], set[Path]]:
    """The files that must be there by the log, and those that may be there besides (an apply that was cut short)."""
    must: set[Path] = set()
    may: set[Path] = set()
    for number, point in vm.points.items():
        for disk in point.disks:
            if number > vm.applied:
                must.add(paths.forward(number, disk))
            else:
                must |= {paths.replica(disk), paths.replica_map(disk)}
                (must if chain_end(vm, disk) > number else may).add(paths.reverse(number, disk))
            may |= {paths.replica(disk), paths.replica_map(disk)}
    if vm.newest is not None:
        must |= {paths.head_map(disk) for disk in vm.newest.disks}
    return must, may - must
