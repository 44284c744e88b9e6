# SPDX-License-Identifier: AGPL-3.0-or-later
"""Reading a few of the grains that change tracking calls unchanged, to see whether they are.

Tracking that misses a change makes every later point wrong, and nothing else would ever notice: the changes that it reports
are pushed and proven, but nobody looks at the rest. A sample of it, new in each cycle, bounds how much can be missed.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from replicator.disk import DiskView
from replicator.domain.model import Suspicion
from replicator.errors import DamageError, ReplicatorError
from replicator.imagemap import FANOUT, ImageMap
from replicator.nursery import flat_nursery

#: How long the commit waits for a sample that is not read yet when everything is sent, seconds.
GRACE_S = 0.25
#: A disk that would be made readable for its sample alone is sampled in one cycle of so many, chosen at random. The commit then
#: waits longer: in seconds.
IDLE_EVERY = 12
IDLE_GRACE_S = 120.0
#: Grains that are read at once.
_READS = 4
#: Grains drawn for each one that is wanted: as many as are found to have changed can be left out.
_DRAWN = 4


class ChangesMissedError(ReplicatorError):
    """A grain that change tracking calls unchanged has changed; ``missed`` says where."""

    def __init__(self, missed: Suspicion) -> None:
        super().__init__(
            f"change tracking missed a change on {missed.disk} at byte {missed.offset}, since point {missed.point} or before"
        )
        self.missed = missed


@dataclass(frozen=True, slots=True)
class Tracked:
    """A disk whose changes since ``since`` are told by change tracking; ``known``: its map of the point ``point``."""

    disk: str
    view: DiskView
    since: str
    known: Path
    point: int


@dataclass(slots=True)
class Sample:
    """What the sampling has come to: grains that were as they should be, the first that was not, why it stopped."""

    clean: int = 0
    missed: Suspicion | None = None
    error: Exception | None = None


@asynccontextmanager
async def sampling(
    disks: Sequence[Tracked], size: int, rng: random.Random, grace_s: float = GRACE_S
) -> AsyncIterator[Sample]:
    """Sample ``size`` bytes of what the disks' tracking calls unchanged while the block runs, and at most ``grace_s`` after it.

    The positions are uniform over all grains of all disks that tracking calls unchanged, holes among them. Memory follows
    the number of grains sampled. Raises ChangesMissedError at the end of the block if one has changed, DamageError if a map
    is damaged, and what the views raise.
    """
    sample = Sample()
    if not disks or size <= 0:
        yield sample
        return
    sampler = _Sampler(disks, sample)
    try:
        done = trio.Event()

        async def run() -> None:
            try:
                await sampler.run(size, rng)
            except (ReplicatorError, OSError) as error:
                # For later: to break off a message that is being sent would break the line.
                sample.error = error
            done.set()

        async with flat_nursery() as nursery:
            nursery.start_soon(run)
            yield sample
            with trio.move_on_after(grace_s):
                await done.wait()
            nursery.cancel_scope.cancel()
    finally:
        sampler.close()
    if sample.error is not None:
        raise sample.error
    if sample.missed is not None:
        raise ChangesMissedError(sample.missed)


class _Sampler:
    def __init__(self, disks: Sequence[Tracked], sample: Sample) -> None:
        self._disks = disks
        self._sample = sample
        self._maps: list[ImageMap] = []
        try:
            for disk in disks:
                self._maps.append(ImageMap.open(disk.known))
        except BaseException:
            self.close()
            raise
        # Of a disk that has grown only what the point has: beyond it nothing is known.
        #: Number of the first grain of each disk, counted through all of them, and of what comes after the last.
        self._firsts = list(itertools.accumulate((known.grains for known in self._maps), initial=0))

    def close(self) -> None:
        for known in self._maps:
            known.close()

    async def run(self, size: int, rng: random.Random) -> None:
        """Read the sample; stops at the first grain that has changed."""
        total = self._firsts[-1]
        wanted = min(total, -(-size // max(known.grain for known in self._maps)))
        drawn = rng.sample(range(total), min(total, wanted * _DRAWN))
        changed = await self._changed(sorted(drawn))
        left = iter([number for number in drawn if number not in changed][:wanted])
        async with flat_nursery() as nursery:
            for _ in range(_READS):
                nursery.start_soon(self._read, left)

    async def _changed(self, drawn: list[int]) -> set[int]:
        """Those of the grains drawn (ascending) that tracking says have changed."""
        found: set[int] = set()
        for disk, known, first in zip(self._disks, self._maps, self._firsts, strict=False):
            async with aclosing(disk.view.extents(disk.since)) as extents:
                async for extent in extents:
                    begin = first + min(extent.offset // known.grain, known.grains)
                    end = first + min(-(-extent.end // known.grain), known.grains)
                    at, to = bisect.bisect_left(drawn, begin), bisect.bisect_left(drawn, end)
                    found.update(drawn[at:to])
        return found

    async def _read(self, left: Iterator[int]) -> None:
        for number in left:
            if self._sample.missed is not None:
                return
            index = bisect.bisect_right(self._firsts, number) - 1
            disk, known = self._disks[index], self._maps[index]
            grain = number - self._firsts[index]
            offset = grain * known.grain
            plain = await disk.view.read(offset, min(known.grain, disk.view.size - offset))
            # A fraction of what a hop to a worker thread costs.
            if known.algorithm.digest_grains(plain, known.grain) == known.digests(grain, 1):
                self._sample.clean += 1
                continue
            _check_map(known, grain)
            if self._sample.missed is None:
                self._sample.missed = Suspicion(disk.disk, offset, disk.point)


def _check_map(known: ImageMap, grain: int) -> None:
    """Raise DamageError if it is the map that is wrong."""
    index = grain // FANOUT
    first = index * FANOUT
    if not known.page_fits(index, known.digests(first, min(FANOUT, known.grains - first))):
        raise DamageError(f"page {index} of a map of digests is damaged")


__all__ = ["ChangesMissedError", "Sample", "Tracked", "sampling"]
