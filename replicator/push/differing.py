# SPDX-License-Identifier: AGPL-3.0-or-later
"""What of a disk is to be sent after a resync has compared it: where the map of what was read differs from the receiver's."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Self

import trio

from replicator.disk import Extent
from replicator.imagemap import ImageMap
from replicator.imagemap.compare import differences

#: Extents that are looked up in one go by a worker thread.
_BATCH = 1024


class Differing:
    """The differing extents of a disk, ascending, in whole grains; can be gone through more than once.

    Both maps are opened at once and belong to this object. Raises DamageError, also while it is gone through, and
    StateError.
    """

    def __init__(self, known: Path, scan: Path) -> None:
        self._old = ImageMap.open(known)
        try:
            self._new = ImageMap.open(scan)
        except BaseException:
            self._old.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the maps; can be repeated."""
        self._old.close()
        self._new.close()

    def __call__(self) -> AsyncIterator[Extent]:
        """From the first one on."""
        return _Batches(self.extents())

    def extents(self) -> Iterator[Extent]:
        """The same, for a worker thread: looking up blocks."""
        new = self._new
        pending: Extent | None = None
        for found in differences(self._old, new):
            offset = found.grain * new.grain
            length = min(new.grain, new.disk_size - offset)
            if pending is not None and pending.end == offset and pending.zero == found.zero:
                pending = Extent(pending.offset, pending.length + length, found.zero)
                continue
            if pending is not None:
                yield pending
            pending = Extent(offset, length, found.zero)
        if pending is not None:
            yield pending


class _Batches:
    # Not an async generator: who reads it need not close it.
    def __init__(self, extents: Iterator[Extent]) -> None:
        self._extents = extents
        self._batch: Iterator[Extent] = iter(())

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Extent:
        found = next(self._batch, None)
        if found is None:
            self._batch = iter(await trio.to_thread.run_sync(self._more))
            found = next(self._batch, None)
        if found is None:
            raise StopAsyncIteration
        return found

    def _more(self) -> list[Extent]:
        return list(itertools.islice(self._extents, _BATCH))


__all__ = ["Differing"]
