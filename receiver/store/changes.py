# SPDX-License-Identifier: AGPL-3.0-or-later
"""What changed of a disk between two recovery points: what the deltas between them cover, forward or reverse. Blocks.

Looks at indexes, never at content: a grain that was written with what it held before counts as changed.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from receiver.store.layout import VmPaths
from replicator.disk import Extent
from replicator.domain.model import Point, PointDisk
from replicator.domain.vm import ProtectedVm
from replicator.errors import RefusedError
from replicator.phcbt.read import StoredDelta


@dataclass(frozen=True, slots=True)
class ChangeFiles:
    """The deltas that lead from one point to another, and the ranges by which the disk grew meanwhile."""

    deltas: tuple[Path, ...]
    grown: tuple[Extent, ...]


def change_files(
    vm: ProtectedVm, paths: VmPaths, older: Point, newer: Point, name: str
) -> ChangeFiles:
    """The files that tell what changed, by the log. Raises RefusedError where that cannot be told: the points do not go on from
    each other, or the disk does not.
    """
    if older.number > newer.number:
        raise RefusedError(f"point {newer.number} is older than point {older.number}")
    numbers = [n for n in sorted(vm.points) if older.number <= n <= newer.number]
    deltas: list[Path] = []
    grown: list[Extent] = []
    for before, after in itertools.pairwise(numbers):
        old, new = _disk(vm, before, name), _disk(vm, after, name)
        if vm.points[after].parent != before or old.since != new.since:
            raise RefusedError(
                f"{name} of point {after} does not go on from point {before}: what changed is not kept"
            )
        deltas.append(
            paths.forward(after, new) if after > vm.applied else paths.reverse(before, old)
        )
        if new.size > old.size:
            grown.append(Extent(old.size, new.size - old.size))
    return ChangeFiles(tuple(deltas), tuple(grown))


def _disk(vm: ProtectedVm, number: int, name: str) -> PointDisk:
    found = vm.points[number].disk(name)
    if found is None:
        raise RefusedError(f"point {number} has no {name}: what changed of it is not kept")
    return found


def changed(deltas: Sequence[StoredDelta], grown: Sequence[Extent], size: int) -> Iterator[Extent]:
    """Ascending, disjoint ranges of a disk of ``size`` bytes. Raises PhcbtError."""
    pending: Extent | None = None
    rows = [delta.extents() for delta in deltas]
    for extent in heapq.merge(*rows, grown, key=lambda each: each.offset):
        begin, end = extent.offset, min(extent.end, size)
        if begin >= end:
            continue
        if pending is not None and begin <= pending.end:
            pending = Extent(pending.offset, max(pending.end, end) - pending.offset)
            continue
        if pending is not None:
            yield pending
        pending = Extent(begin, end - begin)
    if pending is not None:
        yield pending


__all__ = ["ChangeFiles", "change_files", "changed"]
