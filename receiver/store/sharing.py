# SPDX-License-Identifier: AGPL-3.0-or-later
"""Points that share a damaged file: a damage found in one of them is one of all that take the same grains from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from receiver.store.view import PointView
from replicator.domain.model import Damage, Point, PointDisk
from replicator.domain.vm import ProtectedVm
from replicator.errors import DamageError, PhcbtError

#: Grains of one damage that are looked up for another point; a damage that large is met again in that point itself.
_GRAINS_MAX = 4096


def find_shared(
    vm: ProtectedVm,
    open_view: Callable[[Point, PointDisk], PointView],
    root: Path,
    damages: list[Damage],
) -> list[Damage]:
    """The damages of other points that follow from these, located; ``root`` is where their file names begin.

    A point that cannot be opened is damaged as a whole. Blocks; reads indexes only.
    """
    found: list[Damage] = []
    for name in sorted({damage.disk for damage in damages}):
        here = [damage for damage in damages if damage.disk == name]
        known = {damage.point for damage in here}
        chains = {disk.since for n in known if n in vm.points and (disk := vm.points[n].disk(name))}
        for number, point in vm.points.items():
            disk = point.disk(name)
            if number in known or disk is None or disk.since not in chains:
                continue
            try:
                view = open_view(point, disk)
            except DamageError as error:
                found.append(Damage(number, name, 0, disk.size, "", str(error)))
                continue
            try:
                for damage in here:
                    found += _of_point(view, root, msgspec.structs.replace(damage, point=number))
            finally:
                view.close()
    return found


def _of_point(view: PointView, root: Path, damage: Damage) -> list[Damage]:
    """The parts of a damage that a view takes from the damaged file, neighbours as one."""
    if not damage.file:
        return []
    file, grain = root / damage.file, view.grain
    end = min(damage.offset + damage.length, view.size)
    first = damage.offset // grain
    found: list[Damage] = []
    for number in range(first, min(-(-end // grain), first + _GRAINS_MAX)):
        at = max(number * grain, damage.offset)
        length = min((number + 1) * grain, end) - at
        if not _holds(view, number, file):
            continue
        if found and found[-1].offset + found[-1].length == at:
            length += found[-1].length
            found[-1] = msgspec.structs.replace(found[-1], length=length)
        else:
            found.append(msgspec.structs.replace(damage, offset=at, length=length))
    return found


def _holds(view: PointView, grain: int, file: Path) -> bool:
    try:
        return view.holder(grain) == file
    except (DamageError, PhcbtError):
        return False  # the index of another file is damaged there: another finding
