# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where two states of a disk differ, found from the tops of their maps downwards: only below nodes that differ can grains
differ, so the cost follows the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from replicator.imagemap import ImageMap
from replicator.imagemap.tree import FANOUT, NODE_SIZE, slots_in


@dataclass(frozen=True, slots=True)
class Difference:
    """A grain that differs. ``zero``: it is zeros in the newer state."""

    grain: int
    zero: bool


def differing_slots(one: bytes, other: bytes, width: int, slots: int) -> Iterator[tuple[int, int]]:
    """The runs ``(first, end)`` of the first ``slots`` entries of ``width`` bytes that differ in two pages."""
    if one == other:
        return
    start = -1
    for slot in range(slots):
        at = slot * width
        if one[at : at + width] != other[at : at + width]:
            start = slot if start < 0 else start
        elif start >= 0:
            yield start, slot
            start = -1
    if start >= 0:
        yield start, slots


def differences(old: ImageMap, new: ImageMap, start: int = 0) -> Iterator[Difference]:
    """The grains of ``new`` from ``start`` on that are not as in ``old``, ascending.

    ``new`` is as large as ``old`` or larger; what ``old`` does not have counts as zeros. Blocks; holds one page a level of
    each. Raises ValueError if the two have other grains or digests, DamageError if a page does not fit the node above it.
    """
    if (old.algorithm, old.grain) != (new.algorithm, new.grain):
        raise ValueError("two maps of other grains or digests cannot be compared")
    if new.grains < old.grains:
        raise ValueError(f"a map of {new.grains} grains is compared with one of {old.grains}")
    if new.disk_size == old.disk_size and new.root() == old.root():
        return
    yield from _below(old, new, new.height - 1, 0, start)


def _below(
    old: ImageMap, new: ImageMap, level: int, index: int, start: int
) -> Iterator[Difference]:
    before, now = old.page(level, index), new.page(level, index)
    slots = slots_in(level, index, new.grains)
    span = FANOUT**level  # grains below one slot
    width = NODE_SIZE if level else new.algorithm.digest_size
    for first, end in differing_slots(before, now, width, slots):
        for slot in range(first, end):
            below = index * FANOUT + slot
            if (below + 1) * span <= start:
                continue
            if level:
                yield from _below(old, new, level - 1, below, start)
            else:
                yield Difference(below, not any(now[slot * width : (slot + 1) * width]))


__all__ = ["Difference", "differences", "differing_slots"]
