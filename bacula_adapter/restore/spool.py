# SPDX-License-Identifier: AGPL-3.0-or-later
"""A file that came before it can be applied, kept in scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import trio

from bacula_adapter.restore.images import DeltaFold
from bacula_adapter.restore.lane import cpus
from replicator import durable
from replicator.errors import DamageError

_PIECE: Final = 1 << 20


class Spool:
    """One file; what comes is gathered to whole pieces."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._file = durable.DurableFile(path, create=True, exclusive=True)
        self._waiting = bytearray()
        self._written = 0

    async def put(self, offset: int | None, data: bytes) -> None:
        """Take the next bytes. Raises DamageError if some are missing, OSError."""
        at = self._written + len(self._waiting)
        if offset is not None and offset != at:
            raise DamageError(f"bytes {at} to {offset} of a delta are missing")
        self._waiting += data
        if len(self._waiting) >= _PIECE:
            await self.finish()

    async def finish(self) -> None:
        """Write what waits."""
        waiting, self._waiting = self._waiting, bytearray()
        await trio.to_thread.run_sync(self._file.write_at, waiting, self._written, limiter=cpus())
        self._written += len(waiting)

    async def apply(self, fold: DeltaFold) -> None:
        """Give all of it to a delta, up to its end. Raises DamageError."""
        at = 0
        try:
            while at < self._written:
                piece = await trio.to_thread.run_sync(
                    self._file.read_at, _PIECE, at, limiter=cpus()
                )
                await fold.put(None, piece)
                at += len(piece)
            await fold.finish()
        finally:
            await fold.close()

    def discard(self) -> None:
        """Close and remove the file."""
        self._file.close()
        Path(self._file.path).unlink(missing_ok=True)


__all__ = ["Spool"]
