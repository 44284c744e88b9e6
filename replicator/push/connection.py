# SPDX-License-Identifier: AGPL-3.0-or-later
"""A source's session with the receiver: connect, prove the key, ask, push one or more streams."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from replicator.config import Config
from replicator.errors import PeerRefusedError, ReplicatorError, WireError
from replicator.nursery import flat_nursery
from replicator.wire import messages as m
from replicator.wire.framing import MessageStream
from replicator.wire.keys import PreSharedKey
from replicator.wire.session import Session
from replicator.wire.stream import connect_stream

_logger = logging.getLogger(__name__)

CONNECT_S = 15
HANDSHAKE_S = 15
#: A Ping goes out this often, so that neither side takes long reading for a dead line.
PING_S = 15
#: How long a refusal may still be on its way when the line breaks.
_LAST_WORDS_S = 1
#: Bytes on the way that are not acknowledged yet; then sending waits.
UNACKED_MAX = 64 << 20

A = TypeVar("A", bound=m.Message)
B = TypeVar("B", bound=m.Message)


class ConnectionLostError(ReplicatorError):
    """The line broke, or could not be made; what was acknowledged is safe. Try again."""


class Connection:
    """One session. Made by ``connect``; one push at a time."""

    def __init__(self, stream: MessageStream) -> None:
        self._stream = stream
        self._session = Session()
        self._replies_in, self._replies = trio.open_memory_channel[m.FromReceiver](16)
        self._acked: list[int] = []
        self._sent: list[int] = []
        self._room = trio.Event()
        self._end: Exception | None = None
        #: Whether something came to be durable on the receiver in this session.
        self.progressed = False

    async def ask(self, message: m.Message, want: type[A], other: type[B] | None = None) -> A | B:
        """Send a request and wait for its answer, one of two types. Raises as ``reply``."""
        await self.send(message)
        return await self.reply(want, other)

    async def send(self, message: m.Message) -> None:
        """Send one control message."""
        self._session.message(message)
        await self._send(m.CONTROL, m.encode(message))

    async def _send(self, kind: int, *pieces: bytes | memoryview) -> None:
        try:
            await self._stream.send(kind, *pieces)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            with trio.move_on_after(_LAST_WORDS_S):
                await self._last_words()
            raise ConnectionLostError(f"the line to the receiver broke: {error}") from error

    async def _last_words(self) -> None:
        """Read the line to its end: a refusal that came before it broke goes first."""
        async for answer in self._replies:
            if isinstance(answer, m.Refused):
                raise PeerRefusedError(answer.code, answer.reason)

    async def reply(self, want: type[A], other: type[B] | None = None) -> A | B:
        """The next answer, of one of these types. Raises PeerRefusedError, ConnectionLostError, WireError."""
        try:
            answer = await self._replies.receive()
        except trio.EndOfChannel:
            raise self._lost() from self._end
        if isinstance(answer, m.Refused):
            raise PeerRefusedError(answer.code, answer.reason)
        if isinstance(answer, want) or (other is not None and isinstance(answer, other)):
            return answer
        raise WireError(f"the receiver answered {type(answer).__name__}")

    def begin(self, positions: tuple[int, ...]) -> None:
        """The push's streams go on from here."""
        self._acked = list(positions)
        self._sent = list(positions)

    async def data(self, disk: int, offset: int, pieces: list[bytes | memoryview]) -> None:
        """Send the next piece of a disk's stream; waits while too much is unacknowledged."""
        self._check_refused()
        self._session.message(m.Data(disk, offset, b""))
        length = sum(len(piece) for piece in pieces)
        while sum(self._sent) + length - sum(self._acked) > UNACKED_MAX:
            self._room = trio.Event()
            await self._room.wait()
            self._check_refused()
        # Before it goes out: its Ack may be here before this task goes on.
        self._sent[disk] = offset + length
        await self._send(m.DATA, m.data_head(disk, offset), *pieces)

    def _lost(self) -> ReplicatorError:
        """Why no answer will come: a broken line can be tried again, a broken protocol cannot."""
        end = self._end
        if isinstance(end, WireError) and not isinstance(end, trio.BrokenResourceError):
            return WireError(str(end))
        why = "the receiver ended the session" if end is None else f"the line broke: {end}"
        return ConnectionLostError(why)

    def _check_refused(self) -> None:
        """A refusal in the middle of a push ends it at once."""
        try:
            answer = self._replies.receive_nowait()
        except trio.WouldBlock:
            return
        except trio.EndOfChannel:
            raise self._lost() from self._end
        if isinstance(answer, m.Refused):
            raise PeerRefusedError(answer.code, answer.reason)
        raise WireError(f"the receiver answered {type(answer).__name__} in the middle of a push")

    @property
    def acked(self) -> tuple[int, ...]:
        """Each disk's durable position at the receiver."""
        return tuple(self._acked)

    async def read_replies(self) -> None:
        """Take what the receiver says until the session ends; why it did is kept for who waits. Run by ``connect``."""
        try:
            await self._read_replies()
        except (WireError, trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            self._end = error
        finally:
            self._replies_in.close()
            self._room.set()

    async def _read_replies(self) -> None:
        while (message := await self._stream.receive()) is not None:
            kind, body = message
            if kind != m.CONTROL:
                raise WireError("the receiver sent data")
            answer = m.decode_from_receiver(body)
            self._session.message(answer)
            if isinstance(answer, m.Ack):
                self._take_ack(answer)
            elif not isinstance(answer, m.Pong):
                await self._replies_in.send(answer)
                self._room.set()

    def _take_ack(self, ack: m.Ack) -> None:
        if ack.disk >= len(self._acked) or not (
            self._acked[ack.disk] <= ack.position <= self._sent[ack.disk]
        ):
            raise WireError(f"the receiver acknowledged {ack.position} of disk {ack.disk}")
        self.progressed |= ack.position > self._acked[ack.disk]
        self._acked[ack.disk] = ack.position
        self._room.set()

    async def ping(self) -> None:
        """Say now and then that this side lives, for as long as the line bears it. Run by ``connect``."""
        try:
            while True:
                await trio.sleep(PING_S)
                await self._stream.send(m.CONTROL, m.encode(m.Ping()))
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            # The push finds it out as well, by reading or sending, and knows what to do.
            _logger.debug("no more pings: %s", error)


def _why(error: BaseException) -> str:
    """Why no connection could be made, for people: what the attempts failed of, each reason once."""
    if isinstance(error, trio.TooSlowError):
        return f"no answer within {CONNECT_S} s"
    return ", ".join(dict.fromkeys(_reason(attempt) for attempt in _attempts(error)))


def _reason(error: BaseException) -> str:
    if isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)  # trio's own text repeats the address
    return str(error) or type(error).__name__


def _attempts(error: BaseException) -> Iterator[BaseException]:
    """The errors of the single attempts: trio sums them up in one whose cause is the error, or a group of them."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _attempts(inner)
    elif isinstance(error, OSError) and error.errno is None and error.__cause__ is not None:
        yield from _attempts(error.__cause__)
    else:
        yield error


@asynccontextmanager
async def connect(config: Config, key: PreSharedKey) -> AsyncIterator[Connection]:
    """A session with the receiver of ``config``, ended on leaving.

    Raises ConnectionLostError where the line cannot be made or breaks, AuthenticationError where the keys differ,
    WireError where the other side breaks the protocol; what the body raises comes through unchanged.
    """
    where = f"{config.dr_host}:{config.dr_port}"
    try:
        with trio.fail_after(CONNECT_S):
            transport = await trio.open_tcp_stream(config.dr_host, config.dr_port)
    except (OSError, trio.TooSlowError) as error:
        raise ConnectionLostError(f"cannot reach the receiver at {where}: {_why(error)}") from error
    try:
        stream = await connect_stream(transport, key, deadline_s=HANDSHAKE_S)
    except trio.BrokenResourceError as error:
        raise ConnectionLostError(
            f"{where}: the line broke while authenticating: {error}"
        ) from error
    async with MessageStream(stream, m.LIMITS) as framed:
        connection = Connection(framed)
        async with flat_nursery() as nursery:
            nursery.start_soon(connection.read_replies)
            nursery.start_soon(connection.ping)
            try:
                yield connection
            finally:
                nursery.cancel_scope.cancel()
