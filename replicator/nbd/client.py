# SPDX-License-Identifier: AGPL-3.0-or-later
"""An NBD client on trio, over a Unix socket, with many requests in flight and no task of its own.

Whoever waits for a reply reads the socket for all who wait ("leader"), and hands that duty on when
its own reply has come. So a client needs no nursery, may be kept in any object, and a cancelled
request harms nobody: what was read so far stays in the client, and the reply that still comes is
read past.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from replicator.nbd.handshake import negotiate, send_all
from replicator.nbd.protocol import (
    PAYLOAD_MAX,
    REQUEST_LENGTH_MAX,
    Command,
    CommandFlag,
    ExportInfo,
    NbdDisconnectedError,
    NbdError,
    NbdProtocolError,
    Request,
    StatusExtent,
    TransmissionFlag,
)
from replicator.nbd.replies import Pending, ReplyParser

CONNECT_TIMEOUT_S = 30.0
DISCONNECT_TIMEOUT_S = 5.0
#: Replies not yet read, those of cancelled requests included. More means a server that has stopped
#: answering.
PENDING_MAX = 1024
SPARES_MAX = 16
_SPARE_SIZE = 1 << 20
_STATUS_STEP = 1 << 30


class NbdClient:
    """One connection to one export. Make it with ``connect`` or ``open_nbd``; close it with
    ``aclose``.

    Requests may be made from any number of tasks; at most ``depth`` travel at once. A request that
    fails raises NbdError with the server's error number, and the client can be used on;
    NbdDisconnectedError and NbdProtocolError are final. Cancelling a request gives up its answer
    only: a write may still take effect. Being cancelled while a request was half sent (a write to a
    server that does not read) ends the connection.
    """

    def __init__(
        self,
        sock: trio.socket.SocketType,
        info: ExportInfo,
        contexts: dict[str, int],
        depth: int,
    ) -> None:
        self._sock = sock
        self._info = info
        self._contexts = contexts
        self._slots = trio.Semaphore(depth, max_value=depth)
        self._send_lock = trio.Lock()
        self._pending: dict[int, Pending] = {}
        self._parser = ReplyParser(self._pending)
        self._spare: list[bytearray] = []
        self._cookie = 0
        self._leader: Pending | None = None
        self._broken: str | None = None

    @classmethod
    async def connect(
        cls, path: Path, export: str, *, contexts: Sequence[str] = (), depth: int = 16
    ) -> NbdClient:
        """Connect to the server at ``path`` and open ``export`` with the metadata ``contexts`` that
        it has.

        Raises NbdError (code ENOENT: no such export) within CONNECT_TIMEOUT_S. Cancellation closes
        the connection.
        """
        sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        try:
            with trio.fail_after(CONNECT_TIMEOUT_S):
                await sock.connect(str(path))
                info, ids = await negotiate(sock, export, contexts)
        except BaseException as error:
            sock.close()
            if isinstance(error, trio.TooSlowError):
                raise NbdError(
                    f"the NBD server at {path} does not answer", errno.ETIMEDOUT
                ) from None
            if isinstance(error, OSError):
                text = f"cannot connect to the NBD server at {path}: {error.strerror}"
                raise NbdError(text, error.errno or 0) from error
            raise
        return cls(sock, info, ids, depth)

    @property
    def size(self) -> int:
        """Size of the export in bytes."""
        return self._info.size

    @property
    def read_only(self) -> bool:
        """Whether the server refuses writes."""
        return bool(self._info.flags & TransmissionFlag.READ_ONLY)

    @property
    def contexts(self) -> frozenset[str]:
        """The metadata contexts that ``block_status`` can be asked for."""
        return frozenset(self._contexts)

    async def read(self, offset: int, length: int) -> bytes:
        """Read exactly ``length`` bytes; longer than the server's largest block: several requests
        in turn.
        """
        self._check_range(offset, length)
        unit = self._info.block_min
        start = offset // unit * unit
        end = min(-(-(offset + length) // unit) * unit, self.size)
        if end - start <= self._info.block_max:
            return await self._read(start, end - start, offset - start, length)
        pieces = []
        for at in range(start, end, self._info.block_max):
            count = min(self._info.block_max, end - at)
            skip = max(offset - at, 0)
            pieces.append(
                await self._read(at, count, skip, min(offset + length - at, count) - skip)
            )
        return b"".join(pieces)

    async def _read(self, offset: int, length: int, skip: int, keep: int) -> bytes:
        """Bytes ``skip`` to ``skip + keep`` of one read request.

        Received into a buffer used before, then copied: pages that the process already has cost
        less than the copy.
        """
        buffer = self._spare.pop() if self._spare else bytearray(_SPARE_SIZE)
        if len(buffer) < length:
            buffer = bytearray(length)
        pending = Pending(Command.READ, offset, length, buffer=memoryview(buffer)[:length])
        # A cancelled request's buffer is not put back: its reply is still to be received into it.
        await self._perform(pending)
        data = bytes(memoryview(buffer)[skip : skip + keep])
        if len(buffer) == _SPARE_SIZE and len(self._spare) < SPARES_MAX:
            self._spare.append(buffer)
        return data

    async def block_status(self, offset: int, length: int, context: str) -> list[StatusExtent]:
        """What ``context`` says of the whole range: ascending extents without gaps, neighbours of
        equal flags joined.

        The list is as long as the range is fragmented: ask for bounded ranges. Raises NbdError,
        KeyError for a context that was not negotiated.
        """
        number = self._contexts[context]
        self._check_range(offset, length)
        result: list[StatusExtent] = []
        at, end = offset, offset + length
        while at < end:
            pending = Pending(Command.BLOCK_STATUS, at, min(end - at, _STATUS_STEP), statuses={})
            await self._perform(pending)
            assert pending.statuses is not None
            extents = pending.statuses.get(number)
            if not extents:
                raise self._fail(NbdProtocolError("block status without the context asked for"))
            for extent in extents:
                _append(result, extent)
            at = extents[-1].offset + extents[-1].length
        return result

    async def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        """Write ``data`` (at most the server's largest block); with ``fua`` it is durable when this
        returns.
        """
        self._check_range(offset, len(data))
        if len(data) > min(self._info.block_max, PAYLOAD_MAX):
            raise ValueError(f"write of {len(data)} bytes: the server takes {self._info.block_max}")
        flags = CommandFlag.FUA if fua else CommandFlag.NONE
        await self._perform(Pending(Command.WRITE, offset, len(data)), flags, data)

    async def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros; the server may give back its space."""
        await self._over_range(Command.WRITE_ZEROES, offset, length)

    async def trim(self, offset: int, length: int) -> None:
        """Say that a range's content is not needed (a discard)."""
        await self._over_range(Command.TRIM, offset, length)

    async def flush(self) -> None:
        """Make every completed write durable."""
        await self._perform(Pending(Command.FLUSH, 0, 0))

    async def aclose(self) -> None:
        """Say goodbye and close, within DISCONNECT_TIMEOUT_S. Never fails; can be repeated."""
        if self._broken is None:
            self._fail(NbdDisconnectedError("the NBD client was closed"))
            with trio.move_on_after(DISCONNECT_TIMEOUT_S, shield=True):
                # The server may have gone first: closed is what was asked for.
                with suppress(OSError):
                    await send_all(self._sock, Request(0, Command.DISC, 0, 0, 0).encode())
        self._sock.close()
        await trio.lowlevel.checkpoint()

    async def _over_range(self, command: Command, offset: int, length: int) -> None:
        self._check_range(offset, length)
        step = REQUEST_LENGTH_MAX // _STATUS_STEP * _STATUS_STEP
        for at in range(offset, offset + length, step):
            await self._perform(Pending(command, at, min(step, offset + length - at)))

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length <= 0 or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset} of an export of {self.size} bytes")

    async def _perform(
        self, pending: Pending, flags: CommandFlag = CommandFlag.NONE, payload: bytes = b""
    ) -> None:
        """Send one request and wait for its answer; raises what went wrong."""
        async with self._slots:
            self._check_usable()
            if len(self._pending) >= PENDING_MAX:
                raise self._fail(NbdDisconnectedError("the NBD server stopped answering"))
            self._cookie += 1
            cookie = self._cookie
            request = Request(flags, pending.command, cookie, pending.offset, pending.length)
            await self._send(cookie, pending, request.encode() + payload)
            try:
                await self._wait(pending)
            finally:
                # Here and nowhere else: a task that was woken to lead and cancelled before it ran
                # hands on, too.
                pending.waiting = False
                if self._leader is None:
                    self._hand_over()
        if pending.error is not None:
            raise pending.error

    async def _send(self, cookie: int, pending: Pending, data: bytes) -> None:
        async with self._send_lock:
            self._check_usable()
            view = memoryview(data)
            # Known before it is sent: the answer may be read by another task before send() returns.
            self._pending[cookie] = pending
            try:
                while view:
                    view = view[await self._sock.send(view) :]
            except OSError as error:
                raise self._fail(_lost(error)) from error
            except BaseException:
                if len(view) == len(data):
                    del self._pending[cookie]
                else:
                    self._fail(NbdDisconnectedError("cancelled while a request was half sent"))
                raise

    async def _wait(self, pending: Pending) -> None:
        while not pending.done:
            if self._leader is not None:
                await pending.wake.wait()
                pending.wake = trio.Event()
                continue
            self._leader = pending
            try:
                while not pending.done:
                    await self._receive()
            except OSError as error:
                self._fail(_lost(error))
            except NbdError as error:
                self._fail(error)
            finally:
                self._leader = None

    async def _receive(self) -> None:
        """One step of reading: completes any number of requests. Cancelled, it has read nothing."""
        received = await self._sock.recv_into(self._parser.target())
        if not received:
            raise NbdDisconnectedError("the NBD server closed the connection")
        for finished in self._parser.received(received):
            finished.wake.set()

    def _hand_over(self) -> None:
        for other in self._pending.values():
            if other.waiting and not other.done:
                other.wake.set()
                return

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise NbdDisconnectedError(self._broken)

    def _fail(self, error: NbdError) -> NbdError:
        """The connection is over: everyone who waits learns why."""
        if self._broken is None:
            self._broken = str(error)
        for pending in self._pending.values():
            if not pending.done:
                pending.error = type(error)(str(error), error.code)
                pending.done = True
            pending.wake.set()
        self._pending.clear()
        return error


def _lost(error: OSError) -> NbdDisconnectedError:
    return NbdDisconnectedError(f"the NBD connection was lost: {error.strerror}", error.errno or 0)


def _append(result: list[StatusExtent], extent: StatusExtent) -> None:
    last = result[-1] if result else None
    if last is not None and last.flags == extent.flags:
        result[-1] = StatusExtent(last.offset, last.length + extent.length, last.flags)
    else:
        result.append(extent)


@asynccontextmanager
async def open_nbd(
    path: Path, export: str, *, contexts: Sequence[str] = (), depth: int = 16
) -> AsyncIterator[NbdClient]:
    """``NbdClient.connect`` as a context that closes the client at its end."""
    client = await NbdClient.connect(path, export, contexts=contexts, depth=depth)
    try:
        yield client
    finally:
        await client.aclose()
