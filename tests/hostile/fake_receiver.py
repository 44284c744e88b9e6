# SPDX-License-Identifier: AGPL-3.0-or-later
"""A receiver that holds the right key and says what a test tells it to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from replicator.wire import messages as m
from replicator.wire.framing import MessageLimits, MessageStream
from replicator.wire.keys import Keyring, PreSharedKey
from replicator.wire.stream import accept_stream
from tests.limits import HANG_S
from tests.sites import TOKEN

A = TypeVar("A", bound=m.Message)


class GoneError(Exception):
    """The source ended the session."""


class FakeSession:
    """One session of a source; its data is counted, its signs of life are passed over."""

    def __init__(self, stream: MessageStream) -> None:
        self.stream = stream
        self.data_bytes = 0

    async def hear(self, want: type[A]) -> A:
        """The next message that is neither data nor a sign of life; it must be of this type. Raises GoneError."""
        while True:
            try:
                message = await self.stream.receive()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                message = None
            if message is None:
                raise GoneError
            kind, body = message
            if kind == m.DATA:
                self.data_bytes += len(m.decode_data(body).payload)
                continue
            said = m.decode_from_source(body)
            if isinstance(said, m.Ping):
                continue
            assert isinstance(said, want), f"the source said {said}"
            return said

    async def say(self, *messages: m.Message) -> None:
        """Send control messages, the right ones or not. Raises GoneError."""
        for message in messages:
            await self.send(m.CONTROL, m.encode(message))

    async def send(self, kind: int, body: bytes) -> None:
        """Send any message. Raises GoneError."""
        try:
            await self.stream.send(kind, body)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise GoneError from None

    async def gone(self) -> None:
        """Wait until the source has ended the session; what it still says is passed over."""
        while True:
            try:
                if await self.stream.receive() is None:
                    return
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return


Script = Callable[[FakeSession], Awaitable[None]]


@dataclass
class FakeReceiver:
    """Listens on ``port``. ``sessions``: those that there were."""

    port: int
    sessions: list[FakeSession] = field(default_factory=list)


@asynccontextmanager
async def fake_receiver(script: Script) -> AsyncIterator[FakeReceiver]:
    """Plays ``script`` to each session, then closes it in order, as if all were well."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    fake = FakeReceiver(int(listeners[0].socket.getsockname()[1]))
    keys = Keyring([PreSharedKey.from_hex(TOKEN)])
    limits = MessageLimits(dict.fromkeys(range(256), 1 << 30))

    async def serve(transport: trio.SocketStream) -> None:
        stream = await accept_stream(transport, keys, deadline_s=HANG_S)
        async with MessageStream(stream, limits) as framed:
            session = FakeSession(framed)
            fake.sessions.append(session)
            try:
                await script(session)
            except GoneError:
                return

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield fake
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def raw_server(script: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[int]:
    """A port where no key is known: plays ``script`` to each connection and closes it."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def serve(transport: trio.SocketStream) -> None:
        async with transport:
            try:
                await script(transport)
            except trio.BrokenResourceError:
                return

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield int(listeners[0].socket.getsockname()[1])
        nursery.cancel_scope.cancel()
