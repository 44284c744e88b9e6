# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a start does to one VM's folder: compare it with the log, sweep, name damage. All functions block."""

from __future__ import annotations

from pathlib import Path

from receiver.store.files import stack_files
from receiver.store.landing import remove_folder
from receiver.store.layout import VmPaths, expected_files
from replicator import durable
from replicator.domain.model import Damage
from replicator.domain.vm import ProtectedVm


def missing_files(vm: ProtectedVm, paths: VmPaths) -> list[Damage]:
    """A damage for every point and disk whose files are not all there."""
    found: list[Damage] = []
    for number, point in vm.points.items():
        for disk in point.disks:
            files = stack_files(vm, paths, point, disk)
            replica = [files.replica] if files.replica is not None else []
            for path in [*files.deltas, *replica]:
                if not path.exists():
                    name = str(path.relative_to(paths.root))
                    found.append(
                        Damage(number, disk.disk, 0, disk.size, name, "the file is missing")
                    )
    return found


def sweep(vm: ProtectedVm, paths: VmPaths, landing: int | None) -> list[Path]:
    """Remove every file that no event (and no landing push) knows; returns what went."""
    must, may = expected_files(vm, paths)
    known = must | may
    removed: list[Path] = []
    for folder in (paths.root / "replica", paths.root / "head"):
        for entry in sorted(folder.iterdir()):
            if entry not in known:
                durable.unlink(entry)
                removed.append(entry)
    for entry in sorted((paths.root / "points").iterdir()):
        if landing is not None and entry == paths.partial(landing):
            continue
        removed += remove_folder(entry, keep=known.__contains__)
    return removed


def settle_landing(vm: ProtectedVm, paths: VmPaths, push_id: str, point: int) -> bool:
    """Whether a journalled push is still to be finished; one that was about to be committed goes back to partial."""
    if vm.newest is not None and vm.newest.push_id == push_id:
        return False
    if vm.newest is not None and point <= vm.newest.number:
        return False
    if paths.point(point).is_dir():
        if paths.partial(point).is_dir():
            remove_folder(paths.partial(point))
        durable.rename(paths.point(point), paths.partial(point))
    return True
