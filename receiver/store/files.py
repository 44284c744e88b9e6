# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which files a point's disk is made of, by the log. Looks at names only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from receiver.store.layout import VmPaths, chain_end
from replicator.domain.model import Point, PointDisk
from replicator.domain.vm import ProtectedVm


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
            between = vm.points.get(number)  # numbers may be left out
            older = between.disk(disk.disk) if between is not None else None
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
