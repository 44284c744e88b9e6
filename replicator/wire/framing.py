# SPDX-License-Identifier: AGPL-3.0-or-later
"""Messages over any byte stream: length, kind, body (docs/wire.md, section 3.2).

It knows nothing of keys (an authenticated stream or TLS lies below) nor of what a kind means.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import trio

from replicator.errors import WireError

MESSAGE_HEAD_BYTES: Final = 5
CONTROL_BYTES_MAX: Final = 64 << 10
BODY_BYTES_MAX: Final = (1 << 32) - 1

_HEAD: Final = struct.Struct(">IB")
# Below this, copying a piece into its neighbour costs less than a frame of its own.
_JOIN_BYTES_MAX: Final = 16 << 10
_NO_LIMITS: Final[Mapping[int, int]] = MappingProxyType({})

Message = tuple[int, bytearray]
"""Kind, and body. The body is the receiver's own."""


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
    """Cuts messages out of a stream of bytes; sans-I/O. After an error it raises it for ever."""

    def __init__(self, limits: MessageLimits) -> None:
        self._limits = limits
        self._input = memoryview(b"")
        self._head = bytearray()
        self._body = bytearray()
        self._body_bytes = 0
        self._kind = 0
        self._error: WireError | None = None

    @property
    def buffered_bytes(self) -> int:
        """Bytes kept at present, the unread rest of the piece last fed included."""
        return len(self._head) + len(self._body) + len(self._input)

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Feed bytes, uncopied. Those fed before must be used up (``None``)."""
        if self._input:
            raise RuntimeError("take the messages of the bytes fed before feeding more")
        self._input = memoryview(data)

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
            self._head += self._take(MESSAGE_HEAD_BYTES - len(self._head))
            if len(self._head) < MESSAGE_HEAD_BYTES:
                return None
            self._body_bytes, self._kind = _HEAD.unpack(self._head)
            limit = self._limits.body_bytes_max(self._kind)
            if self._body_bytes > limit:
                raise self._fail(
                    f"a message of kind {self._kind} and {self._body_bytes} bytes; "
                    f"{limit} are allowed"
                )
        self._body += self._take(self._body_bytes - len(self._body))
        if len(self._body) < self._body_bytes:
            return None
        body, self._body = self._body, bytearray()
        self._head.clear()
        return self._kind, body

    def _take(self, count: int) -> memoryview:
        piece, self._input = self._input[:count], self._input[count:]
        return piece

    def _fail(self, reason: str) -> WireError:
        self._error = WireError(reason)
        self._input = memoryview(b"")
        self._body = bytearray()
        return self._error


class MessageStream(trio.abc.AsyncResource):
    """Messages both ways over a stream, which it owns."""

    def __init__(self, stream: trio.abc.Stream, limits: MessageLimits) -> None:
        self._stream = stream
        self._limits = limits
        self._parser = MessageParser(limits)
        self._send_lock = trio.Lock()
        self._send_broken = False

    @property
    def stream(self) -> trio.abc.Stream:
        """The stream below."""
        return self._stream

    async def send(self, kind: int, *pieces: bytes | bytearray | memoryview) -> None:
        """Send one message whose body is the pieces in order; large pieces are not copied.

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
        async with self._send_lock:
            if self._send_broken:
                raise trio.BrokenResourceError("an earlier message was sent only in part")
            self._send_broken = True
            await self._send_pieces(_HEAD.pack(length, kind), views)
            self._send_broken = False

    async def _send_pieces(self, head: bytes, pieces: list[memoryview]) -> None:
        small = bytearray(head)
        for piece in pieces:
            if len(piece) <= _JOIN_BYTES_MAX:
                small += piece
                continue
            if small:
                await self._stream.send_all(small)
                small = bytearray()
            await self._stream.send_all(piece)
        if small:
            await self._stream.send_all(small)

    async def receive(self) -> Message | None:
        """The next message, or ``None`` at the other side's clean end between two messages.

        Raises :class:`WireError` for a message out of bounds or cut by a clean end, and what the
        stream raises. When cancelled, nothing is lost: call it again. One task at a time.
        """
        await trio.lowlevel.checkpoint()
        while (message := self._parser.next_message()) is None:
            data = await self._stream.receive_some()
            if not data:
                self._parser.receive_eof()
                return None
            self._parser.receive_data(data)
        return message

    async def aclose(self) -> None:
        """Close the stream below; see its promise."""
        await self._stream.aclose()
