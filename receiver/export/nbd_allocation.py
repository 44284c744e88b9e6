# SPDX-License-Identifier: AGPL-3.0-or-later
"""Turns a view's extents into answers to BLOCK_STATUS, which may be asked in any order."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from replicator.disk import DiskView, Extent
from replicator.nbd.protocol import STATE_HOLE, STATE_ZERO, StatusExtent


class AllocationCursor:
    """Walks a view's extents once for a client that asks in ascending order; starts anew where one
    goes back.

    Holds one extent and one answer. Not for use by two tasks at once.
    """

    def __init__(self, view: DiskView) -> None:
        self._view = view
        self._source: AsyncGenerator[Extent, None] | None = None
        self._extent: Extent | None = None
        self._covered = 0

    async def status(self, offset: int, length: int, limit: int) -> list[StatusExtent]:
        """``base:allocation`` from ``offset`` on: at least one extent, at most ``limit``, within
        ``length`` bytes.

        Raises what the view raises. Cancellation costs no more than starting anew.
        """
        result: list[StatusExtent] = []
        at, end = offset, offset + length
        while at < end and len(result) < limit:
            extent = await self._extent_at(at)
            start = end if extent is None else min(extent.offset, end)
            if at < start:
                _append(result, StatusExtent(at, start - at, STATE_HOLE | STATE_ZERO))
                at = start
            elif extent is not None:
                stop = min(extent.end, end)
                flags = STATE_HOLE | STATE_ZERO if extent.zero else 0
                _append(result, StatusExtent(at, stop - at, flags))
                at = stop
        return result

    async def _extent_at(self, position: int) -> Extent | None:
        """The first extent that ends after ``position``."""
        if self._source is None or position < self._covered:
            await self._restart()
        while self._extent is None or self._extent.end <= position:
            assert self._source is not None
            if self._extent is not None:
                self._covered = self._extent.end
            try:
                self._extent = await anext(self._source)
            except StopAsyncIteration:
                # Stands for the end: nothing is beyond it.
                self._extent = Extent(self._view.size, 1)
            except BaseException:
                # A generator that raised, or was cancelled, has ended: the next question starts
                # anew.
                self._source = None
                raise
        return self._extent if self._extent.offset < self._view.size else None

    async def aclose(self) -> None:
        """Let go of the view's extents; can be repeated."""
        source, self._source = self._source, None
        if source is not None:
            await source.aclose()

    async def _restart(self) -> None:
        await self.aclose()
        self._extent, self._covered = None, 0
        self._source = self._view.extents()


def _append(result: list[StatusExtent], extent: StatusExtent) -> None:
    last = result[-1] if result else None
    if last is not None and last.flags == extent.flags:
        result[-1] = StatusExtent(last.offset, last.length + extent.length, last.flags)
    else:
        result.append(extent)
