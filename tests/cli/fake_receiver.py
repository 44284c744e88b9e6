# SPDX-License-Identifier: AGPL-3.0-or-later
"""A control socket that answers as a test wants, well or badly."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import trio

Reply = Callable[[trio.SocketStream], Awaitable[None]]


@dataclass
class FakeReceiver:
    """Listens at ``path``; ``requests`` are those that came: method, target, body."""

    path: Path
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    hung_up: trio.Event = field(default_factory=trio.Event)


@asynccontextmanager
async def fake_receiver(path: Path, reply: Reply) -> AsyncIterator[FakeReceiver]:
    fake = FakeReceiver(path)

    async def serve(stream: trio.SocketStream) -> None:
        http = h11.Connection(h11.SERVER)
        request: Any = None
        body = b""
        while not isinstance(event := http.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                http.receive_data(await stream.receive_some(65536))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
        target = request.target.decode()
        fake.requests.append((request.method.decode(), target, json.loads(body) if body else None))
        try:
            await reply(stream)
            await stream.aclose()
        except trio.BrokenResourceError:
            fake.hung_up.set()

    with trio.socket.socket(trio.socket.AF_UNIX) as sock:
        await sock.bind(str(path))
        sock.listen(5)
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, serve, [trio.SocketListener(sock)])
            yield fake
            nursery.cancel_scope.cancel()


def says(raw: bytes) -> Reply:
    """These bytes, then the end."""

    async def reply(stream: trio.SocketStream) -> None:
        await stream.send_all(raw)

    return reply


def answers(value: object, status: int = 200) -> Reply:
    """One JSON document."""
    body = json.dumps(value).encode()
    return says(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body)


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def lines(*items: object) -> Reply:
    """Lines of JSON in a chunked answer, cut where no line ends."""
    text = b"".join(json.dumps(item).encode() + b"\n" for item in items)
    pieces = [text[at : at + 7] for at in range(0, len(text), 7)]
    return says(CHUNKED + b"".join(map(chunk, pieces)) + b"0\r\n\r\n")
