# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pages of changed regions put together: checked against each other, clipped, in order, without overlap. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from replicator.disk import Extent, normalise
from replicator.prism.errors import PrismAnswerError

#: The largest blocks that Prism computes in: it may widen what was asked to whole ones.
BLOCK_MAX: Final = 262144
_STEP_MIN: Final = 512


class RegionPages:
    """The pages about one disk. ``what`` names it in errors.

    ``old_size``: that of the reference, None without one: what lies beyond is changed, whether regions say so or not.
    """

    def __init__(self, what: str, old_size: int | None) -> None:
        self._what = what
        self._old_size = old_size
        self._ahead: list[Extent] = []  # of the last page, beyond where the next one begins
        self._reached = 0 if old_size is None else old_size  # what of the grown part was told of
        self.offset = 0
        self.file_size = 0
        self.done = False

    def take(
        self, regions: Iterable[Extent], following: int | None, file_size: int
    ) -> list[Extent]:
        """The extents that are certain after one more page. ``following``: where the next one begins; None or 0: nowhere.

        Raises PrismAnswerError where pages do not advance, or contradict each other.
        """
        if self.offset and file_size != self.file_size:
            raise self._wrong(f"a file of {file_size} bytes, after one of {self.file_size}")
        self.file_size = file_size
        end = following or file_size
        if end >= file_size:
            end, self.done = file_size, True
        elif end < self.offset + _STEP_MIN:
            raise self._wrong(f"the page after {self.offset} is to begin at {end}")
        fitting = []
        for region in regions:
            if region.end <= self.offset - BLOCK_MAX or region.offset >= file_size + BLOCK_MAX:
                raise self._wrong(f"a region at {region.offset}, outside what was asked")
            fitting.append(region)
        whole = normalise([*self._ahead, *fitting], file_size)
        inside = [part for extent in whole for part in _clip(extent, self.offset, end)]
        self._ahead = [part for extent in whole for part in _clip(extent, end, file_size)]
        self.offset = end
        return list(self._with_growth(inside, end))

    def _with_growth(self, extents: list[Extent], end: int) -> Iterator[Extent]:
        if self._old_size is None:
            yield from extents
            return
        for extent in extents:
            if extent.offset > self._reached:
                yield Extent(self._reached, extent.offset - self._reached)
            self._reached = max(self._reached, extent.end)
            yield extent
        if end > self._reached:
            yield Extent(self._reached, end - self._reached)
            self._reached = end

    def _wrong(self, what: str) -> PrismAnswerError:
        return PrismAnswerError(f"{self._what}: {what}")


def _clip(extent: Extent, start: int, end: int) -> Iterator[Extent]:
    start, end = max(start, extent.offset), min(end, extent.end)
    if start < end:
        yield Extent(start, end - start, extent.zero)


__all__ = ["BLOCK_MAX", "RegionPages"]
