# SPDX-License-Identifier: AGPL-3.0-or-later
"""What takes the data of one file of a restore, by what the file is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import trio

from bacula_adapter.description import Description, decode_file
from bacula_adapter.restore.images import DeltaFold, FullFold, Image
from bacula_adapter.restore.lane import cpus
from bacula_adapter.restore.spool import Spool
from replicator.errors import DamageError

_DESCRIPTION_MAX: Final = 16 << 20


class Receiver(Protocol):
    """Takes one file. ``close`` in any case, also after ``finish``."""

    async def put(self, offset: int | None, data: bytes) -> None:
        """The next bytes; ``offset`` None: where the last ended. Raises DamageError, OSError."""
        ...

    async def finish(self) -> None:
        """All of it has come. Raises DamageError."""
        ...

    async def close(self) -> None:
        """Wait until nothing is under way, and let go."""
        ...


class FullReceiver:
    """An image on its way; it is removed unless it comes to its end."""

    def __init__(
        self, image: Image, fold: FullFold, then: Callable[[Image], Awaitable[None]]
    ) -> None:
        self._image = image
        self._fold = fold
        self._then = then
        self._given = False

    async def put(self, offset: int | None, data: bytes) -> None:
        """See ``Receiver``."""
        await self._fold.put(offset, data)

    async def finish(self) -> None:
        """See ``Receiver``."""
        await self._fold.finish()
        self._given = True
        await self._then(self._image)

    async def close(self) -> None:
        """See ``Receiver``."""
        await self._fold.close()
        if not self._given:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._image.discard, limiter=cpus())


class DeltaReceiver:
    """A delta that goes into an image as it comes."""

    def __init__(self, fold: DeltaFold, then: Callable[[], Awaitable[None]]) -> None:
        self._fold = fold
        self._then = then

    async def put(self, offset: int | None, data: bytes) -> None:
        """See ``Receiver``."""
        await self._fold.put(offset, data)

    async def finish(self) -> None:
        """See ``Receiver``."""
        await self._fold.finish()
        await self._then()

    async def close(self) -> None:
        """See ``Receiver``."""
        await self._fold.close()


class SpoolReceiver:
    """A delta that waits."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    async def put(self, offset: int | None, data: bytes) -> None:
        """See ``Receiver``."""
        await self._spool.put(offset, data)

    async def finish(self) -> None:
        """See ``Receiver``."""
        await self._spool.finish()

    async def close(self) -> None:
        """It stays for later."""


class DescriptionFile:
    """A description that is learnt from the stream."""

    def __init__(self, then: Callable[[Description], Awaitable[None]]) -> None:
        self._then = then
        self._data = bytearray()

    async def put(self, offset: int | None, data: bytes) -> None:
        """See ``Receiver``."""
        if offset not in (None, len(self._data)) or len(self._data) + len(data) > _DESCRIPTION_MAX:
            raise DamageError("a description in the backup has gaps, or is too long")
        self._data += data

    async def finish(self) -> None:
        """See ``Receiver``."""
        await self._then(decode_file(bytes(self._data)))

    async def close(self) -> None:
        """Nothing is held."""


__all__ = ["DeltaReceiver", "DescriptionFile", "FullReceiver", "Receiver", "SpoolReceiver"]
