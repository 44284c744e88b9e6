# SPDX-License-Identifier: AGPL-3.0-or-later
"""A TCP connection that carries PDUs: sending without waiting, receiving data straight into the place it belongs.

It knows nothing of logins, tasks or SCSI. The socket is used directly, as trio's wrapper yields at every call, which costs
more than the call where 256 KiB are there to be taken.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Final, Protocol

import trio

from replicator.iscsi import pdu
from replicator.iscsi.digest import crc32c
from replicator.iscsi.errors import PortalUnreachableError, SessionLostError
from replicator.iscsi.keys import Parameters
from replicator.iscsi.login import RECEIVE_MAX
from replicator.iscsi.pdu import HEADER_SIZE, DataIn, Pdu, PduError
from replicator.iscsi.settings import Portal

#: Bytes that wait to be sent. A session sends some dozens of bytes for each task: more means a target that does not read.
OUTBOX_MAX: Final = 1 << 20
_YIELD_BYTES: Final = 1 << 20


class Landing(Protocol):
    """Where a Data-In goes: ``room`` is asked before each receive, so that it can be taken away in between."""

    def room(self, start: int, length: int) -> memoryview | None:
        """The memory for ``length`` bytes at ``start`` of the task's data; None: throw them away."""
        ...


def _no_landing(_: DataIn) -> Landing:
    raise PduError("data that nobody asked for")


class Wire:
    """One connection. Made by ``connect``; one task receives, any may send. ``close`` can be repeated."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._sock = sock
        self._peer = peer
        self._outbox = bytearray()
        self._outgoing = trio.Event()
        self._header = bytearray(HEADER_SIZE + 4)
        self._have = 0  # bytes of the next header
        self._scratch = bytearray(64 << 10)
        self._tail = bytearray(8 + HEADER_SIZE + 4)
        self._header_digest = False
        self._data_digest = False
        self._unyielded = 0

    @classmethod
    async def connect(cls, portal: Portal, timeout_s: float, peer: str) -> Wire:
        """Connect within ``timeout_s``. ``peer`` names target and portal in errors. Raises PortalUnreachableError."""
        try:
            with trio.fail_after(timeout_s):
                stream = await trio.open_tcp_stream(portal.host, portal.port)
        except trio.TooSlowError:
            raise PortalUnreachableError(
                f"{peer}: no connection within {timeout_s:g} s: check the address and the firewall"
            ) from None
        except OSError as error:
            reason = _reason(error)
            raise PortalUnreachableError(f"{peer}: cannot connect: {reason}") from None
        sock = socket.socket(fileno=stream.socket.detach())
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return cls(sock, peer)

    def use(self, parameters: Parameters) -> None:
        """From the next PDU on, as agreed on in the login."""
        self._header_digest = parameters.header_digest
        self._data_digest = parameters.data_digest

    def send(self, request: bytes) -> None:
        """Send a PDU, or leave what the socket does not take to ``flush``. Raises SessionLostError."""
        data = self._with_digests(request)
        if not self._outbox:
            try:
                data = data[self._sock.send(data) :]
            except BlockingIOError:
                pass
            except OSError as error:
                raise self._lost(error) from None
        if data:
            if len(self._outbox) + len(data) > OUTBOX_MAX:
                raise SessionLostError(f"{self._peer} does not take what it is sent")
            self._outbox += data
            self._outgoing.set()

    def _with_digests(self, request: bytes) -> bytes:
        if not (self._header_digest or self._data_digest):
            return request
        header, data = request[:HEADER_SIZE], request[HEADER_SIZE:]
        parts = [header]
        if self._header_digest:
            parts.append(crc32c(header).to_bytes(4, "little"))
        if data:
            parts.append(data)
            if self._data_digest:
                parts.append(crc32c(data).to_bytes(4, "little"))
        return b"".join(parts)

    async def flush(self) -> None:
        """Wait until all is sent. Raises SessionLostError. Cancelled, the rest stays to be sent."""
        while self._outbox:
            await trio.lowlevel.wait_writable(self._sock)
            try:
                sent = self._sock.send(self._outbox)
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._lost(error) from None
            del self._outbox[:sent]

    async def flush_for_ever(self) -> None:
        """Send what ``send`` leaves, until cancelled or lost."""
        while True:
            await self._outgoing.wait()
            self._outgoing = trio.Event()
            await self.flush()

    async def receive(
        self, landing: Callable[[DataIn], Landing] = _no_landing
    ) -> tuple[Pdu, bytes]:
        """The next PDU and its data, which is empty for a Data-In: that went to where ``landing`` said.

        Raises PduError and SessionLostError. Cancelled, the connection can only be closed.
        """
        size = HEADER_SIZE + (4 if self._header_digest else 0)
        header = memoryview(self._header)[:size]
        while self._have < size:
            self._have += await self._some([header[self._have :]])
        self._have = 0
        if self._header_digest and not _fits(header[:HEADER_SIZE], header[HEADER_SIZE:]):
            raise PduError("a header whose digest is wrong")
        unit = pdu.decode(header[:HEADER_SIZE])
        length = unit.data_length
        if length > RECEIVE_MAX:
            raise PduError(f"a data segment of {length} bytes; we take {RECEIVE_MAX}")
        if isinstance(unit, DataIn):
            # Asked also for one without data: it must belong to a task, too.
            place = landing(unit)
            if length:
                await self._receive_data(place, unit.offset, length, size)
            return unit, b""
        buffer = bytearray(length)
        if length:
            await self._receive_data(_Whole(buffer), 0, length, size)
        return unit, bytes(buffer)

    async def _receive_data(self, place: Landing, start: int, length: int, size: int) -> None:
        """The data segment, what ends it, and as much of the next header as comes along."""
        pad = -length % 4
        extra = pad + (4 if self._data_digest else 0)
        tail = memoryview(self._tail)[: extra + size]
        at = more = 0
        while at < length or more < extra:
            left = length - at
            buffers = [tail[more:]]
            if left:
                # Asked anew each time: whoever waits may have been cancelled since, and owns the memory again.
                room = place.room(start + at, left)
                if room is None:
                    room = memoryview(self._scratch)[:left]
                buffers = [room, tail] if len(room) == left else [room]
            got = self._take(buffers)
            if not got:
                await trio.lowlevel.wait_readable(self._sock)
                continue
            taken = min(got, left)
            at += taken
            more += got - taken
            self._unyielded += got
            if self._unyielded > _YIELD_BYTES:
                await self.let_others_run()
        self._have = more - extra
        self._header[: self._have] = tail[extra:more]
        if self._data_digest:
            landed = place.room(start, length)
            if landed is None:
                return  # thrown away
            # The digest covers the padding (RFC 7143, 11.2.3).
            covered = bytes(landed) + bytes(tail[:pad]) if pad else landed
            if not _fits(covered, tail[pad:extra]):
                raise PduError("data whose digest is wrong")

    async def let_others_run(self) -> None:
        """A receiver that never has to wait must yield all the same."""
        self._unyielded = 0
        await trio.lowlevel.checkpoint()

    async def _some(self, buffers: list[memoryview]) -> int:
        while not (got := self._take(buffers)):
            await trio.lowlevel.wait_readable(self._sock)
        return got

    def _take(self, buffers: list[memoryview]) -> int:
        """How many bytes were there; 0 if one has to wait."""
        try:
            got = self._sock.recvmsg_into(buffers)[0]
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._lost(error) from None
        if not got:
            raise SessionLostError(f"{self._peer} closed the connection")
        return got

    def close(self) -> None:
        """Close the socket. What was not sent is lost."""
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
        self._sock.close()

    def _lost(self, error: OSError) -> SessionLostError:
        return SessionLostError(f"{self._peer}: the connection was lost: {error.strerror}")


class _Whole:
    """A landing of a whole data segment."""

    def __init__(self, buffer: bytearray) -> None:
        self._view = memoryview(buffer)

    def room(self, start: int, length: int) -> memoryview | None:
        return self._view[start : start + length]


def _reason(error: OSError) -> str:
    """Trio says that no address answered; each address' own error is in the cause."""
    cause = error.__cause__
    first = cause.exceptions[0] if isinstance(cause, ExceptionGroup) else error
    number = first.errno if isinstance(first, OSError) else None
    if isinstance(first, socket.gaierror):
        return "the name cannot be resolved"
    return os.strerror(number) if number else "no address of it answers"


def _fits(data: bytes | memoryview, digest: memoryview) -> bool:
    return crc32c(data) == int.from_bytes(digest, "little")


__all__ = ["OUTBOX_MAX", "Landing", "Wire"]
