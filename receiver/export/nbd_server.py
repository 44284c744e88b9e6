# SPDX-License-Identifier: AGPL-3.0-or-later
"""An NBD server on trio for anything that is a ``DiskView``: read-only, several exports on one Unix
socket.

Fixed newstyle with structured replies and ``base:allocation``, which is what QEMU, libnbd and our
own client use. A client that goes away or speaks nonsense ends its own connection and nothing else.
Memory per connection is bounded: at most ``_DEPTH`` pieces of ``_PIECE`` bytes, whatever lengths
the client asks for.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import aclosing
from pathlib import Path

import trio

from receiver.export.nbd_allocation import AllocationCursor
from receiver.export.nbd_negotiation import Chosen, Negotiation
from replicator import durable
from replicator.disk import DiskView
from replicator.errors import StateError
from replicator.nbd.protocol import (
    CHUNK,
    CHUNK_DONE,
    OFFSET_HOLE,
    PAYLOAD_MAX,
    REQUEST,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STATUS,
    STRUCTURED_REPLY_MAGIC,
    U16,
    U32,
    U64,
    Chunk,
    Command,
    CommandFlag,
    NbdDisconnectedError,
    NbdProtocolError,
    Request,
)

#: Told of every read that the view could not answer: export, offset, length, the error.
OnError = Callable[[str, int, int, Exception], None]

HANDSHAKE_TIMEOUT_S = 30.0
CONNECTIONS_MAX = 64
_DEPTH = 16
_PIECE = 1 << 20
_STATUS_EXTENTS_MAX = 1024
_ZEROS = bytes(_PIECE)
_WRITES = (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)


def _ignore(export: str, offset: int, length: int, error: Exception) -> None:
    """Used where the caller has nobody to tell: the client still gets EIO."""
    del export, offset, length, error


async def serve_nbd(
    path: Path,
    exports: Mapping[str, DiskView],
    *,
    on_error: OnError = _ignore,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``exports`` (name to view; the empty name is the default export) on a Unix socket until
    cancelled.

    An old socket at ``path`` is removed first, and ours at the end; only the owner can connect.
    Reports started when clients can connect. Raises StateError if the socket cannot be made.
    Cancellation drops every client.
    """
    listener = await _listen(path)
    limit = trio.CapacityLimiter(CONNECTIONS_MAX)

    async def handle(stream: trio.SocketStream) -> None:
        try:
            limit.acquire_nowait()
        except trio.WouldBlock:
            await stream.aclose()
            return
        try:
            await _serve_client(stream, exports, on_error)
        finally:
            limit.release()

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, handle, [listener])
            task_status.started()
    finally:
        durable.unlink(path)


async def _listen(path: Path) -> trio.SocketListener:
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            durable.unlink(path)
    except FileNotFoundError:
        pass  # Nothing in the way.
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    try:
        # Nobody can connect before listen(), so there is no moment at which others could.
        await sock.bind(str(path))
        os.chmod(path, 0o600)
        sock.listen(CONNECTIONS_MAX)
    except BaseException as error:
        sock.close()
        if not isinstance(error, OSError):
            raise
        raise StateError(f"cannot serve NBD at {path}: {error.strerror or error}") from error
    return trio.SocketListener(sock)


async def _serve_client(
    stream: trio.SocketStream, exports: Mapping[str, DiskView], on_error: OnError
) -> None:
    """One client from greeting to end. Whatever it does wrong ends here."""
    async with stream:
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT_S):
                chosen = await Negotiation(stream, exports).run()
            if chosen is not None:
                session = _Session(stream, exports[chosen.export], chosen, on_error)
                await session.run()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # The client went away, or never spoke.
        except* (NbdProtocolError, NbdDisconnectedError):
            pass  # It spoke nonsense: there is nobody to answer.


class _Session:
    """The transmission phase of one client."""

    def __init__(
        self,
        stream: trio.SocketStream,
        view: DiskView,
        chosen: Chosen,
        on_error: OnError,
    ) -> None:
        self._stream = stream
        self._name = chosen.export
        self._view = view
        self._structured = chosen.structured
        self._context = chosen.context
        self._on_error = on_error
        self._send_lock = trio.Lock()
        self._slots = trio.Semaphore(_DEPTH, max_value=_DEPTH)
        self._cursor = AllocationCursor(view)
        self._cursor_lock = trio.Lock()
        self._buffer = bytearray()

    async def run(self) -> None:
        """Read requests and answer each in a task of its own, until the client leaves."""
        async with aclosing(self._cursor), trio.open_nursery() as nursery:
            while True:
                head = await self._receive_head()
                if head is None:
                    break
                request = Request.decode(head)
                if request.command == Command.DISC:
                    break
                if request.command == Command.WRITE:
                    await self._skip(request.length)
                await self._slots.acquire()
                nursery.start_soon(self._answer, request)

    async def _receive_head(self) -> bytes | None:
        while len(self._buffer) < REQUEST.size:
            data = await self._stream.receive_some(16 << 10)
            if not data:
                if self._buffer:
                    raise NbdDisconnectedError("the client left in the middle of a request")
                return None
            self._buffer += data
        head = bytes(self._buffer[: REQUEST.size])
        del self._buffer[: REQUEST.size]
        return head

    async def _skip(self, count: int) -> None:
        """Read past a refused write's payload, holding little of it."""
        if count > PAYLOAD_MAX:
            raise NbdProtocolError(f"write of {count} bytes", errno.EINVAL)
        held = min(count, len(self._buffer))
        del self._buffer[:held]
        count -= held
        while count:
            data = await self._stream.receive_some(min(count, 64 << 10))
            if not data:
                raise NbdDisconnectedError("the client left in the middle of a write")
            count -= len(data)

    async def _answer(self, request: Request) -> None:
        try:
            if request.command == Command.READ:
                await self._read(request)
            elif request.command == Command.BLOCK_STATUS:
                await self._block_status(request)
            elif request.command == Command.FLUSH:
                await self._simple(request, 0)
            elif request.command in _WRITES:
                await self._refuse(request, errno.EPERM)
            else:
                await self._refuse(request, errno.EINVAL)
        finally:
            self._slots.release()

    def _inside(self, request: Request, length_max: int) -> bool:
        return 0 < request.length <= length_max and request.offset + request.length <= (
            self._view.size
        )

    async def _read(self, request: Request) -> None:
        if not self._inside(request, PAYLOAD_MAX):
            await self._refuse(request, errno.EINVAL)
            return
        offset, end = request.offset, request.offset + request.length
        while offset < end:
            count = min(_PIECE, end - offset)
            try:
                data = await self._view.read(offset, count)
            except Exception as error:
                self._on_error(self._name, offset, count, error)
                if not self._structured and offset > request.offset:
                    raise NbdDisconnectedError("read failed after its reply had begun") from error
                await self._refuse(request, errno.EIO)
                return
            last = offset + count == end
            if self._structured:
                await self._send_piece(request, offset, data, last)
            elif offset == request.offset and last:
                await self._send(_simple_head(request, 0), data)
            else:
                await self._stream_simple(request, data)
                return
            offset += count

    async def _send_piece(self, request: Request, offset: int, data: bytes, last: bool) -> None:
        flags = CHUNK_DONE if last else 0
        # memcmp against zeros stops at the first byte that differs: nearly free for data.
        if _ZEROS.startswith(data):
            payload = OFFSET_HOLE.pack(offset, len(data))
            await self._send(_chunk(request, Chunk.OFFSET_HOLE, len(payload), flags), payload)
        else:
            head = _chunk(request, Chunk.OFFSET_DATA, U64.size + len(data), flags)
            await self._send(head + U64.pack(offset), data)

    async def _stream_simple(self, request: Request, first: bytes) -> None:
        """A long read without structured replies: one head, then pieces. A failure now can only cut
        the connection.
        """
        offset = request.offset + len(first)
        end = request.offset + request.length
        async with self._send_lock:
            await self._stream.send_all(_simple_head(request, 0))
            await self._stream.send_all(first)
            while offset < end:
                count = min(_PIECE, end - offset)
                try:
                    data = await self._view.read(offset, count)
                except Exception as error:
                    self._on_error(self._name, offset, count, error)
                    raise NbdDisconnectedError("read failed after its reply had begun") from error
                await self._stream.send_all(data)
                offset += count

    async def _block_status(self, request: Request) -> None:
        if self._context is None or not self._inside(request, 0xFFFFFFFF):
            await self._refuse(request, errno.EINVAL)
            return
        limit = 1 if request.flags & CommandFlag.REQ_ONE else _STATUS_EXTENTS_MAX
        try:
            async with self._cursor_lock:
                extents = await self._cursor.status(request.offset, request.length, limit)
        except Exception as error:  # noqa: BLE001 - whatever a view raises, the client gets EIO
            self._on_error(self._name, request.offset, request.length, error)
            await self._refuse(request, errno.EIO)
            return
        payload = U32.pack(self._context) + b"".join(
            STATUS.pack(extent.length, extent.flags) for extent in extents
        )
        await self._send(_chunk(request, Chunk.BLOCK_STATUS, len(payload), CHUNK_DONE), payload)

    async def _simple(self, request: Request, code: int) -> None:
        await self._send(_simple_head(request, code), b"")

    async def _refuse(self, request: Request, code: int) -> None:
        if self._structured and request.command in (Command.READ, Command.BLOCK_STATUS):
            payload = U32.pack(code) + U16.pack(0)
            await self._send(_chunk(request, Chunk.ERROR, len(payload), CHUNK_DONE), payload)
        else:
            await self._simple(request, code)

    async def _send(self, head: bytes, payload: bytes) -> None:
        async with self._send_lock:
            if len(payload) < 4096:
                await self._stream.send_all(head + payload)
            else:
                await self._stream.send_all(head)
                await self._stream.send_all(payload)


def _chunk(request: Request, kind: Chunk, length: int, flags: int) -> bytes:
    return CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, length)


def _simple_head(request: Request, code: int) -> bytes:
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, code, request.cookie)
