# SPDX-License-Identifier: AGPL-3.0-or-later
"""The client of a control API: HTTP/1.1 over a Unix socket, answers in JSON or line by line."""

from __future__ import annotations

import errno
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import h11
import trio

from replicator import __version__
from replicator.errors import RefusedError, ReplicatorError, UsageError, WireError

#: The longest answer that is not a stream, and the longest line of one, bytes.
BODY_LENGTH_MAX = 64 << 20
LINE_LENGTH_MAX = 4 << 20
#: How long an answer that is no stream may take, seconds.
ANSWER_S = 60
_RECEIVE = 65536

Items = AsyncGenerator[dict[str, Any], None]


def vm_path(vm: str, *action: str) -> str:
    """The path of a request about a VM, by name or UUID."""
    return "/".join(["/v1/vms", quote(vm, safe=""), *action])


@dataclass(frozen=True, slots=True)
class Server:
    """Who should answer: what it is called, and what to do where it does not."""

    name: str
    absent: str
    start: str


RECEIVER = Server("the receiver", "no receiver listens", "start it with replctl receiver")
SOURCE = Server(
    "the source",
    "nothing that pushes is running: nobody listens",
    "start it with replctl run (seed and push answer while they run)",
)


class ControlClient:
    """Speaks to the ``server`` that listens at ``path``. One connection a request.

    Every method raises what it answered as the error that it was there (UsageError, RefusedError, ReplicatorError),
    ReplicatorError if nobody listens, WireError if the answer is none. Cancelled, it hangs up.
    """

    def __init__(self, path: Path, server: Server = RECEIVER) -> None:
        self._path = path
        self._server = server

    async def get(self, target: str) -> dict[str, Any]:
        """The JSON object at ``target``."""
        with trio.move_on_after(ANSWER_S):
            async with self._request("GET", target, None) as (exchange, _):
                return exchange.object(await exchange.body())
        raise ReplicatorError(
            f"{self._server.name} at {self._path} did not answer within {ANSWER_S} s"
        )

    async def post(self, target: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that a POST is answered with, however long its work takes."""
        async with self._request("POST", target, body) as (exchange, _):
            return exchange.object(await exchange.body())

    @asynccontextmanager
    async def stream(self, target: str, body: dict[str, Any]) -> AsyncIterator[Items]:
        """The lines that a POST is answered with. An error among them is raised; leaving the block hangs up."""
        async with (
            self._request("POST", target, body) as (exchange, _),
            aclosing(exchange.items()) as items,
        ):
            yield items

    @asynccontextmanager
    async def _request(
        self, method: str, target: str, body: dict[str, Any] | None
    ) -> AsyncIterator[tuple[_Exchange, h11.Response]]:
        stream = await self._connect()
        async with stream:
            exchange = _Exchange(stream, self._server.name)
            response = await exchange.ask(method, target, body)
            if response.status_code != 200:
                raise exchange.answered(exchange.object(await exchange.body()))
            yield exchange, response

    async def _connect(self) -> trio.SocketStream:
        try:
            return await trio.open_unix_socket(str(self._path))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                text = (
                    f"the control socket {self._path} is not open to this user: run as"
                    f" {self._server.name}'s"
                )
            else:
                text = (
                    f"{self._server.absent} at {self._path} ({error.strerror or error}):"
                    f" {self._server.start}"
                )
            raise ReplicatorError(text) from error
        except ValueError as error:
            raise UsageError(f"control_socket: {self._path}: {error}") from error


class _Exchange:
    """One request and its answer on a connection of its own."""

    def __init__(self, stream: trio.SocketStream, name: str) -> None:
        self._stream = stream
        self._name = name
        self._http = h11.Connection(h11.CLIENT)

    async def ask(self, method: str, target: str, body: dict[str, Any] | None) -> h11.Response:
        data = b"" if body is None else json.dumps(body).encode()
        headers = [
            ("host", "replctl"),
            ("user-agent", f"replctl/{__version__}"),
            ("content-type", "application/json"),
            ("content-length", str(len(data))),
            ("connection", "close"),
        ]
        request = h11.Request(method=method, target=target, headers=headers)
        pieces = [
            self._http.send(event) for event in (request, h11.Data(data=data), h11.EndOfMessage())
        ]
        # A receiver that hangs up early may have answered why.
        with suppress(trio.BrokenResourceError):
            await self._stream.send_all(b"".join(piece for piece in pieces if piece))
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise WireError(f"{self._name} hung up without an answer")

    async def _next(self) -> Any:
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self._stream.receive_some(_RECEIVE))
        except (h11.RemoteProtocolError, trio.BrokenResourceError) as error:
            raise WireError(f"{self._name}'s answer broke off: {error}") from error
        return event

    async def body(self) -> bytes:
        data = bytearray()
        while isinstance(event := await self._next(), h11.Data):
            data += event.data
            if len(data) > BODY_LENGTH_MAX:
                raise WireError(f"{self._name}'s answer is longer than {BODY_LENGTH_MAX} bytes")
        return bytes(data)

    async def items(self) -> Items:
        """Each line as an object; one with an error is raised."""
        data = bytearray()
        while isinstance(event := await self._next(), h11.Data):
            data += event.data
            *lines, rest = data.split(b"\n")
            data = bytearray(rest)
            if max(map(len, [*lines, rest])) > LINE_LENGTH_MAX:
                raise WireError(f"{self._name} sent a line longer than {LINE_LENGTH_MAX} bytes")
            for line in filter(None, lines):
                item = self.object(line)
                if "error" in item:
                    raise self.answered(item)
                yield item
        if data:
            raise WireError(f"{self._name}'s answer ends inside a line")

    def object(self, data: bytes | bytearray) -> dict[str, Any]:
        """An answer, or a line of one, which must be a JSON object."""
        try:
            value = json.loads(data)
        except ValueError as error:
            raise WireError(f"{self._name}'s answer is not JSON") from error
        if not isinstance(value, dict):
            raise WireError(f"{self._name}'s answer is not a JSON object")
        return value

    def answered(self, item: dict[str, Any]) -> ReplicatorError:
        """The error that was answered, as the class that it had there."""
        kinds = {2: UsageError, 3: RefusedError}
        code, text = item.get("exit_code"), item.get("error")
        if not isinstance(text, str) or not text:
            return WireError(f"{self._name} refused without a reason")
        if not isinstance(code, int):
            return ReplicatorError(text)
        return kinds.get(code, ReplicatorError)(text)


__all__ = [
    "BODY_LENGTH_MAX",
    "LINE_LENGTH_MAX",
    "RECEIVER",
    "SOURCE",
    "ControlClient",
    "Items",
    "Server",
    "vm_path",
]
