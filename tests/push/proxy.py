# SPDX-License-Identifier: AGPL-3.0-or-later
"""A line between source and receiver that a test can cut, or make silent, at any byte."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import trio


@dataclass(frozen=True, slots=True)
class Cut:
    """Break a connection after so many bytes; a ``silent`` one stays open and nothing passes any more."""

    to_receiver: int | None = None
    to_source: int | None = None
    silent: bool = False


@dataclass
class Line:
    """``cuts``: one for each connection to come, in order; None lets it pass. ``passed``: bytes each way, by connection."""

    port: int
    cuts: list[Cut | None] = field(default_factory=list)
    always: Cut | None = None
    passed: list[list[int]] = field(default_factory=list)
    accepted: Callable[[], Awaitable[None]] | None = None


@asynccontextmanager
async def proxied(receiver_port: int) -> AsyncIterator[Line]:
    """A line to the receiver's port."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    line = Line(listeners[0].socket.getsockname()[1])

    async def serve(source: trio.SocketStream) -> None:
        cut = (line.cuts.pop(0) if line.cuts else line.always) or Cut()
        if line.accepted is not None:
            await line.accepted()
        passed = [0, 0]
        line.passed.append(passed)
        async with (
            source,
            await trio.open_tcp_stream("127.0.0.1", receiver_port) as receiver,
            trio.open_nursery() as nursery,
        ):

            async def pump(
                way: int, a: trio.SocketStream, b: trio.SocketStream, limit: int | None
            ) -> None:
                # One side is gone: so goes the other.
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    while data := await a.receive_some(65536):
                        room = len(data) if limit is None else max(0, limit - passed[way])
                        passed[way] += len(data[:room])
                        await b.send_all(data[:room])
                        if room < len(data):
                            if cut.silent:
                                await trio.sleep_forever()
                            break
                nursery.cancel_scope.cancel()

            nursery.start_soon(pump, 0, source, receiver, cut.to_receiver)
            nursery.start_soon(pump, 1, receiver, source, cut.to_source)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield line
        nursery.cancel_scope.cancel()
