# SPDX-License-Identifier: AGPL-3.0-or-later
"""Takes an NBD server's reply stream apart without input or output: a buffer to fill in, finished
requests out.

Data lands where it belongs: once a chunk's head is known, the next bytes are received straight into
the buffer of the request that asked for them.
"""

from __future__ import annotations

import errno
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import trio

from replicator.nbd.protocol import (
    CHUNK,
    CHUNK_DONE,
    CHUNK_ERROR,
    ERROR_PAYLOAD_MAX,
    OFFSET_HOLE,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STATUS_PAYLOAD_MAX,
    STRUCTURED_REPLY_MAGIC,
    U16,
    U32,
    U64,
    Chunk,
    Command,
    NbdError,
    NbdProtocolError,
    StatusExtent,
    decode_status,
    error_text,
)

#: Heads are received through this: small, since what it catches of a payload is copied once more.
_STAGING = 512


@dataclass(slots=True, eq=False)
class Pending:
    """A request whose reply has not come in whole."""

    command: Command
    offset: int
    length: int
    buffer: memoryview | None = None
    statuses: dict[int, list[StatusExtent]] | None = None
    filled: int = 0
    done: bool = False
    waiting: bool = True
    error: NbdError | None = None
    wake: trio.Event = field(default_factory=trio.Event)


class ReplyParser:
    """Reply stream in, finished requests out.

    Receive into ``target()``, then say how much came with ``received``: it yields what that
    finished. Raises NbdProtocolError when the server breaks the protocol; then the parser is of no
    more use.
    """

    def __init__(self, pending: dict[int, Pending]) -> None:
        self._pending = pending
        self._staging = bytearray(_STAGING)
        self._have = 0
        self._finished: list[Pending] = []
        self._machine = self._run()
        self._wanted: memoryview | None = None
        self._filled = 0
        self._need = next(self._machine)

    def target(self) -> memoryview:
        """Where the next bytes from the socket belong; never empty."""
        if self._wanted is not None:
            return self._wanted[self._filled :]
        return memoryview(self._staging)[self._have :]

    def received(self, count: int) -> Iterator[Pending]:
        """``count`` bytes were put into ``target()``. Yields the requests that are finished now."""
        if self._wanted is not None:
            self._filled += count
        else:
            self._have += count
        self._advance()
        finished, self._finished = self._finished, []
        return iter(finished)

    def _advance(self) -> None:
        """Run the machine as far as the bytes go."""
        while True:
            if self._wanted is not None:
                if self._filled < len(self._wanted):
                    return
                self._wanted = None
                self._need = self._machine.send(b"")
                continue
            need = self._need
            if isinstance(need, memoryview):
                self._start_direct(need)
            elif self._have >= need:
                piece = bytes(self._staging[:need])
                self._drop(need)
                self._need = self._machine.send(piece)
            else:
                return

    def _start_direct(self, destination: memoryview) -> None:
        """What the staging buffer holds of the payload goes first; the rest is received in place."""
        count = min(self._have, len(destination))
        destination[:count] = self._staging[:count]
        self._drop(count)
        self._wanted = destination
        self._filled = count

    def _drop(self, count: int) -> None:
        left = self._have - count
        self._staging[:left] = self._staging[count : self._have]
        self._have = left

    def _run(self) -> Generator[int | memoryview, bytes, None]:
        """The reply grammar. Yields a small count (bytes come back) or a buffer to be filled."""
        while True:
            magic = yield U32.size
            number = U32.unpack(magic)[0]
            if number == STRUCTURED_REPLY_MAGIC:
                head = yield CHUNK.size - U32.size
                _, flags, kind, cookie, length = CHUNK.unpack(magic + head)
                pending = self._find(cookie)
                yield from self._chunk(pending, kind, length)
                if flags & CHUNK_DONE:
                    self._finish(cookie, pending)
            elif number == SIMPLE_REPLY_MAGIC:
                head = yield SIMPLE_REPLY.size - U32.size
                _, code, cookie = SIMPLE_REPLY.unpack(magic + head)
                pending = self._find(cookie)
                if code:
                    pending.error = _error(pending, code, "")
                elif pending.command in (Command.READ, Command.BLOCK_STATUS):
                    raise _broken("simple reply where a structured one was negotiated")
                self._finish(cookie, pending)
            else:
                raise _broken("reply without its magic number")

    def _find(self, cookie: int) -> Pending:
        pending = self._pending.get(cookie)
        if pending is None:
            raise _broken("reply to a request that was not made")
        return pending

    def _chunk(
        self, pending: Pending, kind: int, length: int
    ) -> Generator[int | memoryview, bytes, None]:
        if kind == Chunk.NONE:
            if length:
                raise _broken("empty chunk that is not empty")
        elif kind == Chunk.OFFSET_DATA:
            if length <= U64.size:
                raise _broken("data chunk without data")
            offset = U64.unpack((yield U64.size))[0]
            yield self._room(pending, offset, length - U64.size)
        elif kind == Chunk.OFFSET_HOLE:
            if length != OFFSET_HOLE.size:
                raise _broken(f"hole chunk of {length} bytes")
            offset, count = OFFSET_HOLE.unpack((yield OFFSET_HOLE.size))
            self._room(pending, offset, count)[:] = bytes(count)
        elif kind == Chunk.BLOCK_STATUS:
            yield from self._status(pending, length)
        elif kind & CHUNK_ERROR:
            yield from self._error_chunk(pending, length)
        else:
            raise _broken(f"chunk of unknown kind {kind}")

    def _room(self, pending: Pending, offset: int, count: int) -> memoryview:
        """The part of a read's buffer that a chunk fills; the range must lie inside what was asked."""
        at = offset - pending.offset
        if pending.buffer is None or count == 0 or at < 0 or at + count > pending.length:
            raise _broken("data for a range that was not asked for")
        pending.filled += count
        return pending.buffer[at : at + count]

    def _status(self, pending: Pending, length: int) -> Generator[int | memoryview, bytes, None]:
        if pending.statuses is None or length > STATUS_PAYLOAD_MAX:
            raise _broken(f"block status of {length} bytes")
        payload = bytearray(length)
        yield memoryview(payload)
        context, extents = decode_status(payload, pending.offset, pending.length)
        if context in pending.statuses:
            raise _broken("block status given twice")
        pending.statuses[context] = extents

    def _error_chunk(
        self, pending: Pending, length: int
    ) -> Generator[int | memoryview, bytes, None]:
        if not U32.size + U16.size <= length <= ERROR_PAYLOAD_MAX:
            raise _broken(f"error chunk of {length} bytes")
        payload = bytearray(length)
        yield memoryview(payload)
        code = U32.unpack_from(payload)[0]
        text_length = U16.unpack_from(payload, U32.size)[0]
        start = U32.size + U16.size
        if start + text_length > length:
            raise _broken("error text longer than its chunk")
        said = payload[start : start + text_length].decode(errors="replace")
        pending.error = _error(pending, code or errno.EIO, said)

    def _finish(self, cookie: int, pending: Pending) -> None:
        if pending.error is None:
            if pending.buffer is not None and pending.filled != pending.length:
                raise _broken(f"{pending.filled} bytes for a read of {pending.length}")
            if pending.statuses is not None and not pending.statuses:
                raise _broken("block status without a status")
        pending.done = True
        del self._pending[cookie]
        self._finished.append(pending)


def _broken(text: str) -> NbdProtocolError:
    return NbdProtocolError(f"the NBD server broke the protocol: {text}", errno.EINVAL)


def _error(pending: Pending, code: int, said: str) -> NbdError:
    what = f"{pending.command.name} of {pending.length} bytes at {pending.offset}"
    why = error_text(code) + (f" ({' '.join(said.split())[:200]})" if said else "")
    return NbdError(f"the NBD server failed {what}: {why}", code)
