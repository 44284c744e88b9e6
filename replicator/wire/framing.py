# SPDX-License-Identifier: AGPL-3.0-or-later
"""Messages over any byte stream: length, kind, body (docs/wire.md, section 3.2).

It knows nothing of keys (an authenticated stream or TLS lies below) nor of what a kind means.

Bodies are not copied where a stream hands up whole frames and a message fills one, as the sender of this module makes them;
elsewhere large bodies are put together in memory that is used again.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol, runtime_checkable

import trio

from replicator.errors import WireError
from replicator.wire.buffers import Buffers
from replicator.wire.frames import BUFFER_BYTES, PAYLOAD_BYTES_MAX

MESSAGE_HEAD_BYTES: Final = 5
CONTROL_BYTES_MAX: Final = 64 << 10
BODY_BYTES_MAX: Final = (1 << 32) - 1

_HEAD: Final = struct.Struct(">IB")
# Bodies up to this size are not worth a buffer of a pool.
_SMALL: Final = 16 << 10
_NO_LIMITS: Final[Mapping[int, int]] = MappingProxyType({})

Message = tuple[int, bytearray | memoryview]
"""Kind, and body. The body is the receiver's own; see ``MessageStream.recycle``."""


@runtime_checkable
class PayloadStream(Protocol):
    """A stream that sends pieces without joining them and hands up what came without copying it: our own two."""

    buffers: Buffers

    async def send_pieces(self, *pieces: bytes | bytearray | memoryview) -> None:
        """Send the pieces in order."""
        ...

    async def receive_payload(self) -> memoryview:
        """What came, at least a byte; empty at the end. Its memory may be given back to ``buffers``."""
        ...


class MessageLimits:
    """How long a body of each kind may be, in bytes: ``per_kind`` or ``control_bytes_max``."""

    def __init__(
        self,
        per_kind: Mapping[int, int] = _NO_LIMITS,
        *,
        control_bytes_max: int = CONTROL_BYTES_MAX,
    ) -> None:
        for kind, limit in per_kind.items():
            if not (0 <= kind <= 0xFF and 0 <= limit <= BODY_BYTES_MAX):
                raise ValueError(f"kind {kind} cannot have a limit of {limit} bytes")
        self._per_kind = dict(per_kind)
        self._control_bytes_max = control_bytes_max

    def body_bytes_max(self, kind: int) -> int:
        """The bound for a kind."""
        return self._per_kind.get(kind, self._control_bytes_max)


class MessageParser:
    """Cuts messages out of a stream of bytes; sans-I/O. After an error it raises it for ever.

    A body that came in one piece with its head, and fills it, is a view of that piece; else it is a copy.
    """

    def __init__(self, limits: MessageLimits, buffers: Buffers | None = None) -> None:
        self._limits = limits
        self._buffers = Buffers(BUFFER_BYTES) if buffers is None else buffers
        self._input = memoryview(b"")
        self._head = bytearray()
        self._body: bytearray | memoryview = bytearray()
        self._got = 0
        self._body_bytes = 0
        self._kind = 0
        self._error: WireError | None = None
        #: Whether a body was handed up that is a view of the piece last fed.
        self.lent_input = False

    @property
    def buffered_bytes(self) -> int:
        """Bytes kept at present, the unread rest of the piece last fed included."""
        return len(self._head) + self._got + len(self._input)

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Feed bytes, uncopied. Those fed before must be used up (``None``)."""
        if self._input:
            raise RuntimeError("take the messages of the bytes fed before feeding more")
        self._input = memoryview(data)
        self.lent_input = False

    def receive_eof(self) -> None:
        """Say that no more bytes will come. Raises :class:`WireError` inside a message."""
        if self._error is not None:
            raise self._error
        if self._head:
            raise self._fail("the stream ended inside a message")

    def next_message(self) -> Message | None:
        """The next whole message, or ``None`` when more bytes are needed.

        Raises :class:`WireError` when a length is above its kind's bound, before any of the body
        is kept.
        """
        if self._error is not None:
            raise self._error
        if len(self._head) < MESSAGE_HEAD_BYTES:
            fresh = not self._head
            self._head += self._take(MESSAGE_HEAD_BYTES - len(self._head))
            if len(self._head) < MESSAGE_HEAD_BYTES:
                return None
            self._begin_body()
            if fresh and len(self._input) == self._body_bytes:
                self.lent_input = True
                return self._finish(self._take(self._body_bytes))
            self._body = self._space(self._body_bytes)
            self._got = 0
        piece = self._take(self._body_bytes - self._got)
        if isinstance(self._body, bytearray):
            self._body += piece
        else:
            self._body[self._got : self._got + len(piece)] = piece
        self._got += len(piece)
        return None if self._got < self._body_bytes else self._finish(self._body)

    def _begin_body(self) -> None:
        self._body_bytes, self._kind = _HEAD.unpack(self._head)
        limit = self._limits.body_bytes_max(self._kind)
        if self._body_bytes > limit:
            raise self._fail(
                f"a message of kind {self._kind} and {self._body_bytes} bytes; {limit} are allowed"
            )

    def _space(self, size: int) -> bytearray | memoryview:
        return self._buffers.take()[:size] if _SMALL < size <= self._buffers.size else bytearray()

    def _finish(self, body: bytearray | memoryview) -> Message:
        self._body, self._got = bytearray(), 0
        self._head.clear()
        return self._kind, body

    def _take(self, count: int) -> memoryview:
        piece, self._input = self._input[:count], self._input[count:]
        return piece

    def _fail(self, reason: str) -> WireError:
        self._error = WireError(reason)
        self._input = memoryview(b"")
        self._body, self._got = bytearray(), 0
        return self._error


class MessageStream(trio.abc.AsyncResource):
    """Messages both ways over a stream, which it owns."""

    def __init__(self, stream: trio.abc.Stream, limits: MessageLimits) -> None:
        self._stream = stream
        self._payloads = stream if isinstance(stream, PayloadStream) else None
        self._fed: bytes | bytearray | memoryview = b""
        self._limits = limits
        self._buffers = Buffers(BUFFER_BYTES) if self._payloads is None else self._payloads.buffers
        self._parser = MessageParser(limits, self._buffers)
        self._send_lock = trio.Lock()
        self._send_broken = False

    @property
    def stream(self) -> trio.abc.Stream:
        """The stream below."""
        return self._stream

    async def send(self, kind: int, *pieces: bytes | bytearray | memoryview) -> None:
        """Send one message whose body is the pieces in order.

        Several tasks may send; messages go out whole, in the order of the calls. The pieces must
        not change until this returns. Raises :class:`ValueError` when the body is above the
        kind's bound (nothing is sent), and what the stream raises. When cancelled, or after an
        error, a part of the message may be out: nothing more can be sent
        (:class:`trio.BrokenResourceError`). Cancelled while waiting for its turn, it sends
        nothing and breaks nothing.
        """
        views = [memoryview(piece).cast("B") for piece in pieces]
        length = sum(map(len, views))
        limit = self._limits.body_bytes_max(kind)
        if length > limit:
            raise ValueError(f"a message of kind {kind} and {length} bytes; {limit} are allowed")
        head = _HEAD.pack(length, kind)
        async with self._send_lock:
            if self._send_broken:
                raise trio.BrokenResourceError("an earlier message was sent only in part")
            self._send_broken = True
            if self._payloads is not None and len(head) + length <= PAYLOAD_BYTES_MAX:
                await self._payloads.send_pieces(head, *views)
            else:
                await self._send_joined(head, views)
            self._send_broken = False

    async def _send_joined(self, head: bytes, views: list[memoryview]) -> None:
        room = self._buffers.take()
        end = 0
        for view in (memoryview(head), *views):
            if end + len(view) > len(room):
                await self._stream.send_all(room[:end])
                end = 0
            room[end : end + len(view)] = view
            end += len(view)
        await self._stream.send_all(room[:end])
        self._buffers.give(room)

    async def receive(self) -> Message | None:
        """The next message, or ``None`` at the other side's clean end between two messages.

        Raises :class:`WireError` for a message out of bounds or cut by a clean end, and what the
        stream raises. When cancelled, nothing is lost: call it again. One task at a time.
        """
        await trio.lowlevel.checkpoint()
        while (message := self._parser.next_message()) is None:
            # All of what was fed is used up; where no message is a view of it, its memory is free.
            if not self._parser.lent_input:
                self._buffers.give(self._fed)
            self._fed = b""  # not again, should this be cancelled
            self._fed = await self._next_data()
            if not self._fed:
                self._parser.receive_eof()
                return None
            self._parser.receive_data(self._fed)
        return message

    async def _next_data(self) -> bytes | bytearray | memoryview:
        if self._payloads is not None:
            return await self._payloads.receive_payload()
        return await self._stream.receive_some()

    def recycle(self, body: bytes | bytearray | memoryview) -> None:
        """Say that nobody will read a message's body, or a part of it, any more: its memory is used again."""
        self._buffers.give(body)

    async def aclose(self) -> None:
        """Close the stream below; see its promise."""
        await self._stream.aclose()
