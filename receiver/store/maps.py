# SPDX-License-Identifier: AGPL-3.0-or-later
"""The maps of digests beside the replica and of the newest point: bringing them forward, and making them again.

A map can always be made again: out of the other map and the deltas between them, or out of the replica's content. The
root that the log has recorded says whether what came out is right. All functions block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from receiver.store.files import StackFiles, stack_files
from receiver.store.layout import VmPaths, stem
from receiver.store.view import Replica, Shape
from replicator import durable
from replicator.disk import Extent, split, widen
from replicator.domain.model import Damage, PointDisk
from replicator.domain.vm import ProtectedVm
from replicator.errors import DamageError, PhcbtError, StateError
from replicator.imagemap import ImageMap
from replicator.phcbt.format import Algorithm, GrainRun
from replicator.phcbt.read import StoredDelta

_CHUNK = 1 << 20
#: What a map or a delta that cannot be used, or is not there, raises.
UNUSABLE = (DamageError, PhcbtError, StateError, OSError)


#: What sources use, for a disk of which no file is left that says it; the recorded root proves the guess.
_USUAL = Shape(Algorithm.XXH3_128, 65536)


def update_map(path: Path, delta: StoredDelta, disk: PointDisk, point: int) -> None:
    """Bring a map to ``point`` by a delta; a chain's first delta makes the map anew. Can be repeated.

    Raises DamageError if the map does not come to the disk's recorded root, StateError if there is none.
    """
    if disk.since == point:
        durable.unlink(path)
        header = delta.header
        digests = ImageMap.create(path, header.algorithm, header.grain, disk.size, point=0)
    else:
        digests = ImageMap.open(path)
    with digests:
        if digests.point > point:
            raise DamageError(f"{path} is at point {digests.point}, past {point}")
        if digests.point < point:
            digests.apply(delta.runs(), disk.size, point, expected_root=disk.root)
    durable.sync_dir(path.parent)


def find_shape(paths: VmPaths, disk: PointDisk) -> Shape:
    """Grain and digest of a disk, out of the first of its chain's files that still says so."""
    for path in (paths.replica_map(disk), paths.head_map(disk)):
        try:
            with ImageMap.open(path) as digests:
                return Shape(digests.algorithm, digests.grain)
        except UNUSABLE:
            continue
    name = stem(disk)
    for path in sorted(paths.points.glob(f"*/{name}.phcbt")) + sorted(
        paths.points.glob(f"*/{name}.rev.phcbt")
    ):
        try:
            with StoredDelta(path) as delta:
                return Shape.of(delta.header)
        except UNUSABLE:
            continue
    return _USUAL


def remake_replica_map(paths: VmPaths, disk: PointDisk, point: int, shape: Shape) -> None:
    """A new map of the replica, out of its content, which must be the disk as of ``point``.

    Reads all of the replica. Raises DamageError, and leaves the old map, if the content does not have the disk's root.
    """
    path = paths.replica_map(disk)
    fresh = path.with_name(f"{path.name}.fresh")
    durable.unlink(fresh)
    with ImageMap.create(fresh, shape.algorithm, shape.grain, disk.size, point=0) as digests:
        digests.apply(_content_runs(paths, disk, shape), disk.size, point, expected_root=disk.root)
    durable.rename(fresh, path)


def _content_runs(paths: VmPaths, disk: PointDisk, shape: Shape) -> Iterator[GrainRun]:
    """The digests of what a replica holds."""
    replica = Replica(paths.replica(disk), None)
    try:
        for extent in split(widen(_data(replica, disk.size), shape.grain, disk.size), _CHUNK):
            digests = shape.algorithm.digest_grains(
                replica.read(extent.offset, extent.length), shape.grain
            )
            count = len(digests) // shape.algorithm.digest_size
            yield GrainRun(extent.offset // shape.grain, count, digests)
    finally:
        replica.close()


def _data(replica: Replica, size: int) -> Iterator[Extent]:
    at = 0
    while found := replica.extents(at, size):
        yield from found
        at = found[-1].end


def is_good(path: Path, disk: PointDisk, point: int, *, thorough: bool = False) -> bool:
    """Whether a map is usable and of this content. ``thorough`` reads all of it."""
    try:
        with ImageMap.open(path) as digests:
            if digests.point != point or digests.root() != disk.root:
                return False
            return not thorough or next(digests.check(), None) is None
    except UNUSABLE:
        return False


def heads_good(vm: ProtectedVm, paths: VmPaths, *, thorough: bool = False) -> bool:
    """Whether every disk's head map stands at the newest point."""
    newest = vm.newest
    return newest is None or all(
        is_good(paths.head_map(disk), disk, newest.number, thorough=thorough)
        for disk in newest.disks
    )


def advance_heads(vm: ProtectedVm, paths: VmPaths) -> None:
    """Bring the head maps to the newest point by its deltas. Raises what a map or delta that is no good raises."""
    newest = vm.newest
    assert newest is not None
    for disk in newest.disks:
        _advance_head(paths, disk, newest.number)


def _advance_head(paths: VmPaths, disk: PointDisk, point: int) -> None:
    path = paths.head_map(disk)
    if not is_good(path, disk, point):
        with StoredDelta(paths.forward(point, disk)) as delta:
            update_map(path, delta, disk, point)


def mend_heads(vm: ProtectedVm, paths: VmPaths, *, thorough: bool = False) -> list[Damage]:
    """Make every head map good again that is not; nothing may be applied or committed meanwhile.

    Returns damage where none comes to the recorded root: then no cycle can be committed.
    """
    newest = vm.newest
    if newest is None:
        return []
    damages: list[Damage] = []
    for disk in newest.disks:
        path = paths.head_map(disk)
        if is_good(path, disk, newest.number, thorough=thorough):
            continue
        reason = _mend_head(vm, paths, disk, thorough=thorough)
        if reason is not None:
            name = str(path.relative_to(paths.root))
            damages.append(Damage(newest.number, disk.disk, 0, disk.size, name, reason))
    return damages


def _mend_head(vm: ProtectedVm, paths: VmPaths, disk: PointDisk, *, thorough: bool) -> str | None:
    """Why it cannot be done, or None. The cheapest way first: one delta, all digests stored, the replica's content."""
    newest = vm.newest
    assert newest is not None
    files = stack_files(vm, paths, newest, disk)
    shape = find_shape(paths, disk)
    rebuild = partial(_rebuild_head, paths, disk, files, shape, newest.number)
    path = paths.head_map(disk)
    ways: list[Callable[[], None]] = [partial(rebuild, use_content=u) for u in (False, True)]
    if not thorough:
        ways.insert(0, partial(_advance_head, paths, disk, newest.number))
    reason = ""
    for way in ways:
        try:
            way()
        except UNUSABLE as error:
            reason = f"the map cannot be made again: {error}"
        else:
            return None
    durable.unlink(path)  # what is wrong must not be built on
    return reason


def _rebuild_head(
    paths: VmPaths,
    disk: PointDisk,
    files: StackFiles,
    shape: Shape,
    point: int,
    *,
    use_content: bool,
) -> None:
    path = paths.head_map(disk)
    durable.unlink(path)
    with ImageMap.create(path, shape.algorithm, shape.grain, disk.size, point=0) as fresh:
        if files.replica is not None and use_content:
            fresh.apply(_content_runs(paths, disk, shape), disk.size, 0)
        elif files.replica_map is not None:
            with ImageMap.open(files.replica_map) as base:
                fresh.apply(base.iter_nonzero_runs(), disk.size, 0)
        for delta_path in reversed(files.deltas):
            with StoredDelta(delta_path) as delta:
                fresh.apply(delta.runs(), disk.size, 0)
        fresh.apply([], disk.size, point, expected_root=disk.root)
    durable.sync_dir(path.parent)


def mend_replica_maps(vm: ProtectedVm, paths: VmPaths) -> None:
    """Replace replica maps that cannot be opened by the newest point's, where the replica holds that point.

    One that lags is made again by the next apply; until then the points read the same without it.
    """
    newest = vm.newest
    if newest is None or vm.applied != newest.number:
        return
    for disk in newest.disks:
        path = paths.replica_map(disk)
        head = paths.head_map(disk)
        if _opens(path) or not is_good(head, disk, newest.number):
            continue
        fresh = path.with_name(f"{path.name}.fresh")
        durable.unlink(fresh)
        with (
            ImageMap.open(head) as base,
            ImageMap.create(fresh, base.algorithm, base.grain, disk.size, point=0) as digests,
        ):
            digests.apply(base.iter_nonzero_runs(), disk.size, newest.number)
        durable.rename(fresh, path)


def _opens(path: Path) -> bool:
    try:
        ImageMap.open(path).close()
    except UNUSABLE:
        return False
    return True


def map_faults(path: Path) -> list[str]:
    """What is damaged in a map, from the top down."""
    try:
        with ImageMap.open(path) as digests:
            return [
                f"level {f.level}, page {f.index} (grains {f.first} to {f.first + f.count - 1}): {f.reason}"
                for f in digests.check()
            ]
    except UNUSABLE as error:
        return [str(error)]
