# SPDX-License-Identifier: AGPL-3.0-or-later
"""A file as the body of a request: its SHA-256 first, then its bytes, holes as zeros that are never read. Bounded memory."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio

from replicator.errors import RefusedError, SourceError
from replicator.nursery import flat_nursery

_PIECE: Final = 1 << 20
#: In the making, on the way, and at the other end of the channel; one more, so that none is overwritten too early.
_BUFFERS: Final = 4
#: Bytes for one visit to a worker thread, after which a cancellation is looked at.
_TURN: Final = 64 << 20
_ZEROS: Final = bytes(_PIECE)


class UploadFile:
    """An open file that is sent. Reads in worker threads; raises SourceError where it cannot be read."""

    def __init__(self, fd: int, path: Path, size: int) -> None:
        self._fd = fd
        self._path = path
        self._limiter = trio.CapacityLimiter(1)
        self.size = size

    async def sha256(self) -> str:
        """Of all of it, in hex. Reads it once; cancelled, within a moment."""
        digest = hashlib.sha256()
        runs = self._runs()
        while await self._thread(self._hash_turn, digest, runs):
            pass
        return digest.hexdigest()

    def _hash_turn(self, digest: Any, runs: Iterator[tuple[int, int, bool]]) -> bool:
        buffer, done = memoryview(bytearray(_PIECE)), 0
        for offset, length, is_data in runs:
            if is_data:
                self._fill(buffer[:length], offset)
            digest.update(buffer[:length] if is_data else _ZEROS[:length])
            done += length
            if done >= _TURN:
                return True
        return False

    @asynccontextmanager
    async def pieces(self) -> AsyncGenerator[trio.MemoryReceiveChannel[bytes | memoryview], None]:
        """Its bytes in order; a piece is good until the next one is taken. The next is read while one is on its way."""
        send, receive = trio.open_memory_channel[bytes | memoryview](1)
        async with flat_nursery() as nursery:
            nursery.start_soon(self._read_ahead, send)
            try:
                yield receive
            finally:
                # Without waiting: in a scope that is cancelled, a wait would take the place of the error that ended the block.
                receive.close()
                nursery.cancel_scope.cancel()

    async def _read_ahead(self, send: trio.MemorySendChannel[bytes | memoryview]) -> None:
        buffers = [memoryview(bytearray(_PIECE)) for _ in range(_BUFFERS)]
        number = 0
        for offset, length, is_data in self._runs():
            piece: bytes | memoryview = memoryview(_ZEROS)[:length]
            if is_data:
                piece = buffers[number % _BUFFERS][:length]
                number += 1
                await self._thread(self._fill, piece, offset)
            await send.send(piece)
        # Only here: where reading has failed, whoever sends must not take that for the end.
        send.close()

    async def _thread(self, call: Any, *arguments: Any) -> Any:
        try:
            return await trio.to_thread.run_sync(call, *arguments, limiter=self._limiter)
        except OSError as error:
            raise SourceError(f"{self._path} cannot be read: {error.strerror}") from None

    def _fill(self, buffer: memoryview, offset: int) -> None:
        while buffer:
            count = os.preadv(self._fd, [buffer], offset)
            if not count:
                raise SourceError(f"{self._path} has become shorter")
            buffer, offset = buffer[count:], offset + count

    def _runs(self) -> Iterator[tuple[int, int, bool]]:
        """Pieces in order: offset, length, and whether there is anything but a hole. Blocks."""
        at = 0
        while at < self.size:
            data, hole = self._next_data(at)
            for start, end, is_data in ((at, data, False), (data, hole, True)):
                for offset in range(start, end, _PIECE):
                    yield offset, min(_PIECE, end - offset), is_data
            at = hole

    def _next_data(self, at: int) -> tuple[int, int]:
        """Where data begin at or after ``at``, and where they end."""
        try:
            data = os.lseek(self._fd, at, os.SEEK_DATA)
            return min(data, self.size), min(os.lseek(self._fd, data, os.SEEK_HOLE), self.size)
        except OSError as error:
            if error.errno == errno.ENXIO:
                if os.fstat(self._fd).st_size < self.size:  # that is no hole
                    raise SourceError(f"{self._path} has become shorter") from None
                return self.size, self.size
            if error.errno == errno.EINVAL:  # a file system that knows no holes
                return at, self.size
            raise


@asynccontextmanager
async def open_upload(path: Path, size: int) -> AsyncGenerator[UploadFile, None]:
    """The file, open until the block is left. Raises RefusedError where it has not ``size`` bytes, SourceError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from None
    try:
        found = os.fstat(fd).st_size
        if found != size:
            raise RefusedError(f"{path} holds {found} bytes, and should hold {size}")
        yield UploadFile(fd, path, size)
    finally:
        os.close(fd)


__all__ = ["UploadFile", "open_upload"]
