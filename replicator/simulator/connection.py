# SPDX-License-Identifier: AGPL-3.0-or-later
"""One HTTP/1.1 connection (h11): heads and bodies in, replies out, kept alive between them. It knows no routes."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import h11
import msgspec
import trio

from replicator.simulator.web import HttpError, Reply

#: The most that a body may have that is read whole, in bytes.
BODY_MAX = 4 << 20
_HEAD_MAX = 64 << 10
_READ = 64 << 10
_SKIP_MAX = 64 << 10
#: How long a connection may stay idle, and how long a request that is read whole, or a piece of a reply, may take. Seconds.
_IDLE_S, _REQUEST_S = 300.0, 60.0
_HEADER_PAIRS_MAX = 100


@dataclass(frozen=True, slots=True)
class Head:
    """The start of a request; header names in lower case. Of a header that is there twice, the values are joined by a comma."""

    method: str
    target: str
    headers: dict[str, str]


class Connection:
    """Raises h11.RemoteProtocolError for what is no HTTP, trio's errors for what the stream does."""

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD_MAX)

    async def head(self) -> Head | None:
        """The next request's head; None: the client has gone, or has been idle for too long."""
        if self._http.our_state is h11.DONE:
            if self._http.their_state is not h11.DONE:
                return None
            self._http.start_next_cycle()
        if self._http.our_state is not h11.IDLE:
            return None
        with trio.move_on_after(_IDLE_S):
            event = await self._next()
            if isinstance(event, h11.Request):
                return _head(event)
        return None

    async def _next(self) -> h11.Event | type[h11.PAUSED]:
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                return event  # type: ignore[return-value]  # h11 types both sentinels as one
            if self._http.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                await self._stream.send_all(self._http.send(go_on) or b"")
            self._http.receive_data(bytes(await self._stream.receive_some(_READ)))

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body of the request, piece by piece."""
        while True:
            event = await self._next()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return
            else:
                raise trio.BrokenResourceError("the client went away in the middle of a body")

    async def body(self) -> bytes:
        """The whole body. Raises HttpError 413 for one that is too long, 408 for one that takes too long."""
        whole = bytearray()
        with trio.move_on_after(_REQUEST_S):
            async with aclosing(self.pieces()) as pieces:
                async for piece in pieces:
                    whole += piece
                    if len(whole) > BODY_MAX:
                        raise HttpError(413, f"a body of more than {BODY_MAX} bytes")
            return bytes(whole)
        raise HttpError(408, f"the body did not come within {_REQUEST_S:.0f} s")

    async def skip(self) -> None:
        """Read what is left of a request that was refused, if it is short: then the connection can be kept."""
        if (
            self._http.their_state is not h11.SEND_BODY
            or self._http.they_are_waiting_for_100_continue
        ):
            return
        left = _SKIP_MAX
        with trio.move_on_after(_REQUEST_S):
            async with aclosing(self.pieces()) as pieces:
                async for piece in pieces:
                    left -= len(piece)
                    if left < 0:
                        return

    async def send(self, method: str, reply: Reply, more: Sequence[tuple[str, str]]) -> None:
        """Answer. A connection whose request was not read to its end is closed by this."""
        data = b"" if reply.stream is not None else encoded(reply)
        length = reply.length if reply.stream is not None else len(data)
        headers = [("Content-Type", reply.content_type), *reply.headers.items(), *more]
        if length is not None and reply.status != 204:
            headers.append(("Content-Length", str(length)))
        if self._http.their_state is h11.SEND_BODY:
            headers.append(("Connection", "close"))
        await self._put(h11.Response(status_code=reply.status, headers=headers))
        if method != "HEAD" and reply.stream is not None:
            try:
                async for piece in reply.stream:
                    await self._put(h11.Data(data=piece))
            finally:
                if isinstance(reply.stream, AsyncGenerator):
                    await reply.stream.aclose()
        elif method != "HEAD" and data and reply.status != 204:
            await self._put(h11.Data(data=data))
        await self._put(h11.EndOfMessage())

    async def _put(self, event: h11.Response | h11.Data | h11.EndOfMessage) -> None:
        sent = self._http.send(event)
        if sent:
            with trio.fail_after(_REQUEST_S):
                await self._stream.send_all(sent)

    async def cut(self) -> None:
        """Reset the connection: the client gets ECONNRESET."""
        sock = self._stream.transport_stream.socket
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await trio.aclose_forcefully(self._stream)


def _head(event: h11.Request) -> Head:
    if len(event.headers) > _HEADER_PAIRS_MAX:
        raise h11.RemoteProtocolError("too many headers", error_status_hint=431)
    headers: dict[str, str] = {}
    for name, value in event.headers:
        key, text = name.decode("ascii"), value.decode("latin-1")
        joint = "; " if key == "cookie" else ", "
        headers[key] = f"{headers[key]}{joint}{text}" if key in headers else text
    return Head(event.method.decode("ascii"), event.target.decode("latin-1"), headers)


def encoded(reply: Reply) -> bytes:
    """The bytes of a reply that is no stream."""
    if reply.raw is not None:
        return reply.raw
    return b"" if reply.body is None else msgspec.json.encode(reply.body)


__all__ = ["BODY_MAX", "Connection", "Head", "encoded"]
