# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a start does to one VM's folder: compare it with the log, sweep, mend maps, name damage. All functions block."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from receiver.store.apply import update_map
from receiver.store.landing import remove_folder
from receiver.store.layout import VmPaths, chain_end, expected_files
from replicator import durable
from replicator.domain.model import Damage, Point, PointDisk
from replicator.domain.vm import ProtectedVm
from replicator.errors import DamageError, PhcbtError, StateError
from replicator.imagemap import ImageMap
from replicator.phcbt.read import StoredDelta


@dataclass(frozen=True, slots=True)
class StackFiles:
    """What a point's disk is made of: deltas, the first that holds a grain wins, over the replica (None: zeros)."""

    deltas: list[Path]
    replica: Path | None
    replica_map: Path | None
    deepest: int


def stack_files(vm: ProtectedVm, paths: VmPaths, point: Point, disk: PointDisk) -> StackFiles:
    """The files of a view, by the log; an apply under way may have added a reverse delta, which is taken too."""
    deltas: list[Path] = []
    if point.number > vm.applied:
        first = max(vm.applied + 1, disk.since)
        for number in range(point.number, first - 1, -1):
            below = vm.points.get(number)
            at = below.disk(disk.disk) if below is not None else None
            if at is not None and at.since == disk.since:
                deltas.append(paths.forward(number, at))
        applied = vm.applied >= disk.since
        deepest = 0
    else:
        applied = True
        deepest = end = chain_end(vm, disk)
        for number in range(point.number, end + 1):
            older = vm.points[number].disk(disk.disk)
            if older is None or older.since != disk.since:
                continue
            path = paths.reverse(number, older)
            if number < end or path.exists():
                deltas.append(path)
            else:
                deepest = end - 1
    if not applied:
        return StackFiles(deltas, None, None, deepest)
    return StackFiles(deltas, paths.replica(disk), paths.replica_map(disk), deepest)


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


def mend_head(vm: ProtectedVm, paths: VmPaths) -> list[Damage]:
    """Bring every head map to the newest point; one that is lost is made again from replica map and deltas.

    Returns damage where the result does not have the recorded root: then no cycle can be committed.
    """
    newest = vm.newest
    if newest is None:
        return []
    damages: list[Damage] = []
    for disk in newest.disks:
        path = paths.head_map(disk)
        try:
            if _head_root(path, newest.number) == disk.root:
                continue
            _advance_head(vm, paths, newest, disk)
            if _head_root(path, newest.number) == disk.root:
                continue
            reason = "the map does not have the point's root"
        except (DamageError, PhcbtError, StateError, OSError) as error:
            reason = f"the map cannot be made again: {error}"
        name = str(path.relative_to(paths.root))
        damages.append(Damage(newest.number, disk.disk, 0, disk.size, name, reason))
    return damages


def _head_root(path: Path, point: int) -> bytes | None:
    try:
        digests = ImageMap.open(path)
    except (DamageError, StateError, OSError):
        return None
    try:
        return digests.root() if digests.point == point else None
    finally:
        digests.close()


def _advance_head(vm: ProtectedVm, paths: VmPaths, newest: Point, disk: PointDisk) -> None:
    path = paths.head_map(disk)
    forward = paths.forward(newest.number, disk)
    if forward.exists():
        delta = StoredDelta(forward)
        try:
            update_map(path, delta, disk, newest.number)
        except (DamageError, StateError, OSError):
            pass  # the map itself is unusable: below it is made anew
        finally:
            delta.close()
        if _head_root(path, newest.number) == disk.root:
            return
    _rebuild_head(vm, paths, newest, disk)


def _rebuild_head(vm: ProtectedVm, paths: VmPaths, newest: Point, disk: PointDisk) -> None:
    """A new head map out of the replica's digests and the forward deltas above it."""
    files = stack_files(vm, paths, newest, disk)
    path = paths.head_map(disk)
    durable.unlink(path)
    base: ImageMap | None = None
    if files.replica_map is not None:
        base = ImageMap.open(files.replica_map)
        algorithm, grain = base.algorithm, base.grain
    else:
        oldest = StoredDelta(files.deltas[-1])
        algorithm, grain = oldest.header.algorithm, oldest.header.grain
        oldest.close()
    fresh = ImageMap.create(path, algorithm, grain, disk.size, point=0)
    try:
        if base is not None:
            fresh.apply(base.iter_nonzero_runs(), disk.size, 0)
        for delta_path in reversed(files.deltas):
            delta = StoredDelta(delta_path)
            try:
                fresh.apply(delta.runs(), disk.size, 0)
            finally:
                delta.close()
        fresh.apply([], disk.size, newest.number)
    finally:
        fresh.close()
        if base is not None:
            base.close()
    durable.sync_dir(path.parent)
