# SPDX-License-Identifier: AGPL-3.0-or-later
"""A disk in memory whose reads can be made to fail, and a server for it."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from receiver.export.nbd_server import serve_nbd
from replicator.disk import DiskView, Extent
from replicator.errors import DamageError


class MemoryView:
    """``content``, of which ``extents`` are said to be data; reading over ``bad`` raises
    DamageError.
    """

    def __init__(
        self, content: bytes, extents: Sequence[Extent] | None = None, *, bad: int | None = None
    ) -> None:
        self.content = content
        self.known = [Extent(0, len(content))] if extents is None else list(extents)
        self.bad = bad
        self.walks = 0

    @property
    def size(self) -> int:
        return len(self.content)

    async def extents(self, since: str | None = None) -> AsyncGenerator[Extent, None]:
        assert since is None
        self.walks += 1
        for extent in self.known:
            await trio.lowlevel.checkpoint()
            yield extent

    async def read(self, offset: int, length: int) -> bytes:
        assert offset >= 0
        assert offset + length <= self.size
        await trio.lowlevel.checkpoint()
        if self.bad is not None and offset <= self.bad < offset + length:
            raise DamageError("this part is damaged")
        return self.content[offset : offset + length]


class Served:
    """A running server: where, and what it reported."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.errors: list[tuple[str, int, int, str]] = []

    def on_error(self, export: str, offset: int, length: int, error: Exception) -> None:
        self.errors.append((export, offset, length, str(error)))

    def uri(self, export: str) -> str:
        return f"nbd+unix:///{export}?socket={self.path}"


@asynccontextmanager
async def served(exports: Mapping[str, DiskView]) -> AsyncIterator[Served]:
    """Serve ``exports`` on a short path for the length of the context."""
    with tempfile.TemporaryDirectory(prefix="nb", dir="/tmp") as folder:
        server = Served(Path(folder) / "s")
        async with trio.open_nursery() as nursery:

            async def serve(task_status: trio.TaskStatus[None]) -> None:
                await serve_nbd(
                    server.path, exports, on_error=server.on_error, task_status=task_status
                )

            await nursery.start(serve)
            yield server
            nursery.cancel_scope.cancel()
